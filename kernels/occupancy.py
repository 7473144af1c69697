"""How many programs a multiprocessor holds at once: for cooperative launches, and for the static report."""

from typing import NamedTuple


class Limits(NamedTuple):
    """Of a multiprocessor (CUDA C++ Programming Guide, technical specifications per compute capability)."""

    warps: int
    programs: int
    shared: int
    """Bytes, of which each program takes 1024 for the system."""
    registers: int = 65536


LIMITS = {
    80: Limits(64, 32, 164 << 10),
    86: Limits(48, 16, 100 << 10),
    87: Limits(48, 16, 164 << 10),
    89: Limits(48, 24, 100 << 10),
    90: Limits(64, 32, 228 << 10),
    100: Limits(64, 32, 228 << 10),
    103: Limits(64, 32, 228 << 10),
    120: Limits(48, 24, 100 << 10),
    121: Limits(48, 24, 100 << 10),
}
"""By compute capability, 10 · major + minor."""


def programs_a_multiprocessor(limits: Limits, registers: int, shared: int, warps: int) -> int:
    """Programs of `warps` warps, `registers` a thread and `shared` bytes that are on a multiprocessor at once.

    A warp takes registers in steps of 256, and a program's warps are dealt out to four schedulers, a quarter of the
    registers each.
    """
    a_warp = -(-registers * 32 // 256) * 256
    a_scheduler = limits.registers // 4 // a_warp
    by_registers = 4 * a_scheduler // warps if warps <= 4 else a_scheduler // -(-warps // 4)
    return min(limits.warps // warps, limits.programs, limits.shared // (shared + 1024), by_registers)
