"""Block sizes, warps and grids, as data. Nothing here was tuned on a GPU yet; see perf/NOTES.md."""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class StreamConfig(NamedTuple):
    """How a kernel that does little to each loss walks them."""

    block: int
    """Losses a tile."""
    warps: int
    programs: int
    """Programs launched for each multiprocessor: enough to fill it, few enough that one walks several tiles."""


STREAM = StreamConfig(block=1024, warps=4, programs=8)


class PixelConfig(NamedTuple):
    """How a kernel walks the logits."""

    chunk: int
    """Classes held in registers at a time."""
    block: int
    """Pixels a tile."""
    warps: int
    programs: int
    """As in `StreamConfig`."""


WHOLE = 32
"""Up to here all classes of a pixel stay in registers; above, chunks of at most CHUNK with an online softmax."""
CHUNK = 10


def pixel_config(classes: int) -> PixelConfig:
    """The configuration for a number of classes; `perf/static.py` shows the registers it comes to."""
    if classes <= WHOLE:
        # Above 24 classes, 4 pixels a thread would need more than 255 registers on sm_100: 2 then.
        return PixelConfig(classes, 512 if classes <= 24 else 256, 4, 8)
    # A chunk that divides the classes wastes no loads; otherwise the last one is masked.
    chunk = next((size for size in range(CHUNK, 6, -1) if classes % size == 0), CHUNK)
    return PixelConfig(chunk, 512, 4, 8)


class SelectConfig(NamedTuple):
    """How the threshold search walks the losses."""

    block: int
    """Losses a tile."""
    warps: int
    programs: int
    """As in `StreamConfig`."""
    capacity: int
    """Losses of the bracket the short list can hold; if there are more, the last program walks all losses."""
    passes: tuple[int, ...]
    """Segments longer than the k-th entry get k + 1 passes that narrow the bracket before the list is made."""


SELECT = SelectConfig(block=1024, warps=16, programs=4, capacity=8192, passes=(1 << 13, 1 << 19, 1 << 25))


class SortConfig(NamedTuple):
    """How the sort solver walks the losses."""

    run: int
    """Losses a program sorts, a power of two."""
    lanes: int
    """Runs searched at a time."""
    warps: int


SORT = SortConfig(run=2048, lanes=128, warps=8)

SORT_UP_TO = 2048
"""solver="auto": segments up to this length are sorted, longer ones searched. See perf/NOTES.md."""


def solver_for(length: int, solver: str) -> str:
    """The solver "auto" means for segments of `length` losses; any other name is itself."""
    return solver if solver != "auto" else "sort" if length <= SORT_UP_TO else "select"


def programs(length: int, rows: int, config: StreamConfig | SelectConfig | PixelConfig, device: torch.device) -> int:
    """How many programs share the tiles of one row (an image or a segment), with `rows` rows in the launch.

    Grids have one dimension, rows × programs: the others end at 65535.
    """
    tiles = -(-length // config.block)
    return min(tiles, -(-config.programs * multiprocessors(device) // rows))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 in the interpreter, where programs run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def unit_of(*tensors: Tensor) -> int:
    """The largest power of two up to 16 that divides the row length and the outer strides of (N, …, L) tensors.

    Kernels get these sizes in units of it, multiplied back by a constant, so that the compiler knows what divides them
    and loads vectors. By itself it looks for divisibility by 16 only, and 550·550 is divisible by 4.
    """
    return math.gcd(16, *(size for x in tensors for size in (x.shape[-1], *x.stride()[:-1])))


def fraction_bits(length: int) -> int:
    """Fixed point: a power is at most 1, so this many fractional bits leave room for the sum of `length` of them."""
    return 62 - length.bit_length()
