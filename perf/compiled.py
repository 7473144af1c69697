"""What the compiler made of a Triton kernel."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from . import paths

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NVIDIA_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "E": 32, "64": 64, "128": 128}
AMD_OPCODE = re.compile(r"^\t((?:s|v|ds|global|buffer|flat|scratch)_\w+)", re.MULTILINE)
AMD_WIDTHS = {
    "ubyte": 8,
    "byte": 8,
    "sbyte": 8,
    "ushort": 16,
    "short": 16,
    "sshort": 16,
    "dword": 32,
    "dwordx2": 64,
    "dwordx3": 96,
    "dwordx4": 128,
}
MEMORY = re.compile(r"\b(?:st|red|atom)\.")
GLOBAL = re.compile(r"\b(?:ld|st|red|atom)\.global\b")
SHUFFLE = re.compile(r"\bshfl\.sync\.\S+\s+(%\w+)")
FUSED = re.compile(r"\bfma\.rn\.\S+\s+%\w+, %\w+, %\w+, (%\w+);")
RELEASE = re.compile(r"\b(?:atom|red)\S*\.(?:release|acq_rel)\b")


@dataclass(frozen=True)
class Compiled:
    """What is known of one kernel compiled for one architecture."""

    registers: int
    """a thread."""
    spills: int
    """Instructions that move registers to and from local memory; on AMD, vector registers that were moved."""
    stack: int
    """Bytes of local memory a thread."""
    shared: int
    """Bytes a program."""
    warp: int
    """Threads a warp."""
    warps: int
    """Warps a program."""
    opcodes: tuple[str, ...]
    """Instructions with their modifiers, in program order."""
    loads: Counter[int] = field(default_factory=Counter)
    """Loads from global memory by their width in bits."""
    stores: Counter[int] = field(default_factory=Counter)
    flow: paths.Code | None = None
    """Its branches and loops; not read from AMD's assembly."""
    releases: int = 0
    """Atomics that publish what other threads of the program wrote."""
    unguarded: int = 0
    """Those of them without a barrier of the program between them and what was written before."""
    lopsided: int = 0
    """Products fused into a sum with another lane's: the two lanes come to different sums."""
    dependent: bool = False
    """Waits for the launch before it (see `kernels.launcher.DEPENDENT`) before it touches memory."""

    def count(self, prefix: str) -> int:
        """How many instructions start with `prefix`."""
        return sum(opcode.startswith(prefix) for opcode in self.opcodes)


def read(built: Any) -> Compiled:
    """Disassemble what Triton compiled."""
    if "amdgcn" in built.asm:
        return _amd(built.asm["amdgcn"], built.metadata)
    numbers = resources(built.asm["cubin"])
    sass = _run("nvdisasm", built.asm["cubin"], "-c")
    flow = paths.parse(sass)
    opcodes = flow.opcodes
    releases, unguarded = _releases(built.asm["ptx"])
    return Compiled(
        numbers["REG"],
        sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        numbers["STACK"] + numbers["LOCAL"],
        built.metadata.shared,
        32,
        built.metadata.num_warps,
        opcodes,
        _widths(opcodes, "LDG"),
        _widths(opcodes, "STG"),
        flow,
        releases,
        unguarded,
        _lopsided(built.asm["ptx"]),
        _dependent(built.asm["ptx"]) and built.metadata.launch_pdl,
    )


def _amd(assembly: str, metadata: Any) -> Compiled:
    numbers = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", assembly)}
    assert numbers["wavefront_size"] == 64
    assert numbers["max_flat_workgroup_size"] == 64 * metadata.num_warps
    opcodes = tuple(AMD_OPCODE.findall(assembly))
    found: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for opcode in opcodes:
        parts = opcode.split("_")
        if parts[0] in ("global", "buffer") and parts[1] in found:
            found[parts[1]][AMD_WIDTHS[parts[2]]] += 1
    return Compiled(
        numbers["vgpr_count"],
        numbers["vgpr_spill_count"],
        numbers["private_segment_fixed_size"],
        metadata.shared,
        64,
        metadata.num_warps,
        opcodes,
        found["load"],
        found["store"],
    )


def _widths(opcodes: tuple[str, ...], kind: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name == kind:
            found[next((NVIDIA_WIDTHS[m] for m in reversed(modifiers) if m in NVIDIA_WIDTHS and m != "E"), 32)] += 1
    return found


def _releases(ptx: str) -> tuple[int, int]:
    """How many atomics release, and how many of them do so before a barrier has come after the last write."""
    releases = unguarded = 0
    synchronised = False
    for line in ptx.splitlines():
        if "bar.sync" in line or "barrier.sync" in line:
            synchronised = True
        if RELEASE.search(line):
            releases += 1
            unguarded += not synchronised
        if MEMORY.search(line) and "shared" not in line:
            synchronised = False
    return releases, unguarded


def _lopsided(ptx: str) -> int:
    """How many fused multiply-adds add to what came straight from another lane."""
    shuffled = set(SHUFFLE.findall(ptx))
    return sum(addend in shuffled for addend in FUSED.findall(ptx))


def _dependent(ptx: str) -> bool:
    touched = GLOBAL.search(ptx)
    return "griddepcontrol.wait" in ptx[: touched.start() if touched else None]


@functools.lru_cache(maxsize=4)
def resources(cubin: bytes) -> dict[str, int]:
    """REG a thread, STACK and LOCAL bytes a thread, SHARED bytes a program, of a compiled kernel."""
    usage = _run("cuobjdump", cubin, "--dump-resource-usage")
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


def _run(tool: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *arguments, file.name], check=True, capture_output=True, text=True).stdout
