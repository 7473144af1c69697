"""Compile a Triton kernel for a GPU that is not there, and read what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", re.MULTILINE)
LABEL = re.compile(r"^(\.L_x_\d+):")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Compiled:
    """What is known of one kernel compiled for one architecture."""

    registers: int
    """a thread."""
    stack: int
    """Bytes of local memory a thread."""
    shared: int
    """Bytes a CTA."""
    opcodes: tuple[str, ...]
    """SASS instructions with their modifiers, in program order."""
    loops: tuple[int, ...] = ()
    """Instructions from the head of each loop to its backward branch (loops inside it included), by their heads."""

    def count(self, prefix: str) -> int:
        """How many instructions start with `prefix`."""
        return sum(opcode.startswith(prefix) for opcode in self.opcodes)

    def histogram(self) -> Counter[str]:
        """How often each opcode with its modifiers occurs."""
        return Counter(self.opcodes)


def compile_for(
    kernel: Any,
    capability: int,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    aligned: bool = True,
) -> Compiled:
    """Compile `kernel` for sm_`capability` and disassemble it.

    Args:
        signature: the type of each argument that is not a constant, as "*bf16" or "i32".
        constants: the tl.constexpr arguments.
        aligned: pointers are divisible by 16, as PyTorch's allocations are.
    """
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if aligned and t.startswith("*")}
    built = triton.compile(
        ASTSource(kernel, types, dict(constants), attrs),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": True},
    )
    numbers = resources(built.asm["cubin"])
    sass = _run("nvdisasm", built.asm["cubin"], "-c")
    opcodes = tuple(name + modifiers for name, modifiers in OPCODE.findall(sass))
    opcodes = opcodes[: len(opcodes) - next((i for i, o in enumerate(reversed(opcodes)) if o != "NOP"), 0)]
    stack = numbers["STACK"] + numbers["LOCAL"]
    return Compiled(numbers["REG"], stack, built.metadata.shared, opcodes, _loops(sass))


def _loops(sass: str) -> tuple[int, ...]:
    """The sizes of the loops: from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    ends: dict[str, int] = {}
    place = 0
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = place
        elif OPCODE.match(line):
            place += 1
            target = BRANCH.search(line)
            if target and target[1] in labels and labels[target[1]] < place - 1:  # not the halt at the end
                ends[target[1]] = place
    return tuple(ends[label] - labels[label] for label in labels if label in ends)


def resources(cubin: bytes) -> dict[str, int]:
    """REG a thread, STACK and LOCAL bytes a thread, SHARED bytes a program, of a compiled kernel."""
    usage = _run("cuobjdump", cubin, "--dump-resource-usage")
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


def _run(tool: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *arguments, file.name], check=True, capture_output=True, text=True).stdout
