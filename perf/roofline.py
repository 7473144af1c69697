"""What a kernel would take if nothing but bandwidth and instruction issue cost time: a model, not a measurement.

The model of a launch is max(bytes / bandwidth, instructions / issue rate); of a pipeline the sum over its launches,
plus what launches, waits and the last program's rounds cost. The floor is two reads and one write of the logits.
"""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """One GPU of an architecture."""

    name: str
    multiprocessors: int
    ghz: float
    gb_s: float
    """A tenth below the data sheet; of the H100 and H200, what a large copy reached."""
    issue: int = 4
    """Instructions of a warp that a multiprocessor starts a cycle."""
    warp: int = 32


DEVICES: dict[int | str, Device] = {
    80: Device("A100 SXM 80 GB", 108, 1.41, 1830),
    86: Device("RTX 3090", 82, 1.70, 840),
    89: Device("RTX 4090", 128, 2.52, 907),
    90: Device("H100 SXM", 132, 1.755, 3000),
    100: Device("B200", 148, 1.85, 7200),
    120: Device("RTX 5090", 170, 2.41, 1612),
    "gfx942": Device("MI300X", 304, 2.10, 4770, warp=64),
}

LAUNCH_US = 1.5
"""From the end of one kernel to the start of the next in a CUDA graph; an estimate."""
WAIT_US = 1.5
"""For all programs of a segment to hear of the last one; an estimate."""
SOLVE_US = 6.0
"""For the last program's rounds over the short list, while the others are done; an estimate."""


def pixel_ns(device: Device, instructions: float, read: float, written: float) -> tuple[float, float]:
    """Nanoseconds a pixel by issue and by bandwidth; instructions a pixel are those of threads."""
    by_issue = instructions / device.warp / (device.multiprocessors * device.ghz * device.issue)
    return by_issue, (read + written) / device.gb_s
