"""Block sizes, warps and grids, as data. Nothing here was tuned on a GPU yet; see perf/NOTES.md."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class PixelConfig(NamedTuple):
    """How a kernel walks the logits."""

    chunk: int
    """Classes held in registers at a time."""
    block: int
    """Pixels a tile."""
    warps: int


WHOLE = 32
"""Up to here all classes of a pixel stay in registers; above, chunks of at most CHUNK with an online softmax."""
CHUNK = 10


def pixel_config(classes: int) -> PixelConfig:
    """The configuration for a number of classes: 4 pixels a thread, registers below 128 (compiled for sm_90)."""
    if classes <= WHOLE:
        return PixelConfig(classes, 512, 4)
    # A chunk that divides the classes wastes no loads; otherwise the last one is masked.
    chunk = next((size for size in range(CHUNK, 6, -1) if classes % size == 0), CHUNK)
    return PixelConfig(chunk, 512, 4)


class SelectConfig(NamedTuple):
    """How the solver walks the losses."""

    block: int
    """Losses a tile."""
    warps: int
    capacity: int
    """Losses of the bracket the short list can hold; if there are more, the last program walks all losses."""


SELECT = SelectConfig(block=1024, warps=8, capacity=16384)

PROGRAMS_PER_SM = 8
"""Programs launched for each multiprocessor: enough to fill it, few enough that a program walks several tiles."""


def programs(pixels: int, block: int, rows: int, device: torch.device) -> int:
    """How many programs share the tiles of one row (an image or a segment), with `rows` rows in the launch.

    Grids have one dimension, rows × programs: the others end at 65535.
    """
    tiles = max(1, -(-pixels // block))
    return min(tiles, max(1, -(-PROGRAMS_PER_SM * multiprocessors(device) // max(1, rows))))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 in the interpreter, where programs run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def unit_of(tensor: Tensor) -> int:
    """The largest power of two up to 16 that divides the row length and the outer strides of (N, C, L) logits."""
    return math.gcd(tensor.shape[2], tensor.stride(0), tensor.stride(1), 16)


def fraction_bits(length: int) -> int:
    """Fixed point: a power is at most 1, so this many fractional bits leave room for the sum of `length` of them."""
    return 62 - length.bit_length()
