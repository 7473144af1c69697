"""What a kernel would take if nothing but bandwidth and instruction issue cost time: a model, not a measurement.

A launch takes the larger of its bytes over the bandwidth and its issue slots over the issue rate, plus what each
program does once; a call the sum over its launches, plus what launches, waits and the last program of the search cost.
All that is assumed for it:

| what | assumed | where from |
| --- | --- | --- |
| bandwidth, clock, multiprocessors | `DEVICES` | data sheets, less a tenth; H100: what a large copy reached |
| instructions of a warp that a multiprocessor starts a cycle | 4 | four schedulers |
| special functions, conversions | 4 slots | 16 to 32 lanes a cycle, beside other instructions |
| float64 | 2 slots (sm_80, 90, 100), else 64 | lanes a cycle in the CUDA programming guide |
| 64-bit integer adds | 2 slots | they are two instructions |
| an atomic of a warp on shared memory | `CONFLICTS` slots | losses of a warp that meet in a bank (`perf/search.py`) |
| path of a tile | the cheapest through the loop body | no tile lists a loss; the dearest stands beside it |
| losses listed | at most as many as are sorted at once | `perf/search.py`, p = 1.3, networks not very well trained |
| rounds where there are more: "searched" | 2 over one tile | the same |
| path of the last program of a launch | the dearest, a loop once, past the rounds where it sorts | an upper bound |
| a step of the last program | 5 cycles a slot, or one a scheduler's warp | it waits for the step before |
| launch, wait | 1.5 µs each | an estimate, in a CUDA graph |

Not in it: latency of the first loads, caches (losses and labels that stay in the second level), the tail of a launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Device(NamedTuple):
    """One GPU of an architecture."""

    name: str
    multiprocessors: int
    ghz: float
    gb_s: float
    """A tenth below the data sheet; of the H100 and H200, what a large copy reached."""
    float64: int = 64
    """Issue slots of a float64 instruction."""
    issue: int = 4
    """Instructions of a warp that a multiprocessor starts a cycle."""
    warp: int = 32


DEVICES: dict[int | str, Device] = {
    80: Device("A100 SXM 80 GB", 108, 1.41, 1830, float64=2),
    86: Device("RTX 3090", 82, 1.70, 840),
    89: Device("RTX 4090", 128, 2.52, 907),
    90: Device("H100 SXM", 132, 1.755, 3000, float64=2),
    100: Device("B200", 148, 1.85, 7200, float64=2),
    120: Device("RTX 5090", 170, 2.41, 1612),
    "gfx942": Device("MI300X", 304, 2.10, 4770, warp=64),
}

LAUNCH_US = 1.5
"""From the end of one kernel to the start of the next in a CUDA graph."""
WAIT_US = 1.5
"""For all programs of a segment to hear of the last one."""
ROUNDS = 2
STEP = 5.0
"""Cycles from an instruction to the next one of a warp that needs its result."""
QUARTER = ("MUFU", "F2I", "I2F", "F2F", "FRND", "F2FP.E", "I2I")
FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")
CONFLICTS = {"trained": 3.7, "untrained": 7.3}
"""Of the 256 bins of stage one: `python perf/search.py --conflicts`."""


def slots(device: Device, losses: str = "untrained") -> Callable[[str], float]:
    """The issue slots of an instruction, given with its modifiers, where losses are of a trained network or not."""

    def cost(opcode: str) -> float:
        if opcode.startswith("ATOMS"):
            return CONFLICTS[losses]
        if opcode.startswith(FLOAT64):
            return device.float64
        return 4 if opcode.startswith(QUARTER) else 1

    return cost


def pixel_ns(device: Device, slots: float, read: float, written: float) -> tuple[float, float]:
    """Nanoseconds a pixel by issue and by bandwidth; slots a pixel are those of threads."""
    by_issue = slots / device.warp / (device.multiprocessors * device.ghz * device.issue)
    return by_issue, (read + written) / device.gb_s


def once_us(device: Device, slots: float, warps: int, programs: int) -> float:
    """Microseconds of what each program does once, by issue."""
    return slots * warps * programs / (device.multiprocessors * device.ghz * device.issue) / 1e3


def alone_us(device: Device, slots: float, warps: int) -> float:
    """Microseconds of what one program does while the others are done."""
    return slots * max(STEP, warps / device.issue) / device.ghz / 1e3


def floors(device: Device, pixels: int, classes: int, logit: int = 2, label: int = 8) -> tuple[float, float]:
    """Microseconds: of two reads and one write of the logits; of every byte that must move in this design.

    Must: logits and labels read, losses and narrowed labels written; a loss read by the search; logits and narrowed
    labels read, and losses where the gradient does not hold all classes at once, and the gradient written.
    """
    narrow = 1 if classes <= 255 else 2
    must = (classes * logit + label + 4 + narrow) + 4 + (2 * classes * logit + narrow + 4 * (classes > 32))
    return 3 * pixels * classes * logit / device.gb_s / 1e3, pixels * must / device.gb_s / 1e3
