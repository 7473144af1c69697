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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _run("nvdisasm", "-c", cubin.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    opcodes = tuple(name + modifiers for name, modifiers in OPCODE.findall(sass))
    opcodes = opcodes[: len(opcodes) - next((i for i, o in enumerate(reversed(opcodes)) if o != "NOP"), 0)]
    return Compiled(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], built.metadata.shared, opcodes)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout
