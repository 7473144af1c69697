"""Block sizes, warps, grids and thresholds, as data: one table an architecture. None was tuned on a GPU yet.

What they rest on is in perf/NOTES.md and perf/results/static.csv: registers, spills, instructions. Nothing is tuned at
run time.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..settings import MAX_CLASSES


class StreamConfig(NamedTuple):
    """How a kernel that does little to each loss walks them."""

    block: int
    """Losses a tile."""
    warps: int
    per_multiprocessor: int
    """Programs launched for each multiprocessor: enough to fill it, few enough that one walks several tiles."""


class LogitsConfig(NamedTuple):
    """How a kernel walks the logits."""

    rows: bool
    """The classes of a pixel lie side by side and are loaded so; otherwise pixel vectors are, class by class."""
    chunk: int
    """Classes held in registers at a time; below the number of classes: the softmax is an online one."""
    block: int
    """Pixels a tile."""
    warps: int
    per_multiprocessor: int
    """As in `StreamConfig`."""


class PixelVectors(NamedTuple):
    """`LogitsConfig` for up to some number of classes, where pixels lie side by side."""

    up_to: int
    """Classes."""
    chunk: int
    """At most; below it all classes are one chunk."""
    block: int
    warps: int
    per_multiprocessor: int


class ClassRows(NamedTuple):
    """`LogitsConfig` where the classes of a pixel lie side by side."""

    above: int
    """Up to this many classes a thread loads those of a pixel one after another: rows of lanes would be half empty, and
    adding up across them most of the work. The lines come from the first-level cache after the first class."""
    block: int
    """Pixels a tile up to there; above, elements / chunk, a chunk being what a warp loads at once."""
    elements: int
    """Logits a tile: with twice as many a thread, some compilers spill (Triton 3.6 on sm_80, 3.9 on sm_100)."""
    wide_elements: int
    """The same, where a thread loads 16 bytes at once."""
    warps: int
    per_multiprocessor: int


class SelectConfig(NamedTuple):
    """How the threshold search walks the losses."""

    block: int
    """Losses a tile."""
    warps: int
    per_multiprocessor: int
    """As in `StreamConfig`."""
    capacity: int
    """Losses of the bracket the short list can hold; if there are more, the last program walks all losses."""
    solve_block: int
    """Losses of the list a tile, for the program that solves: four thresholds are tried on each."""
    exact_solve_block: int
    """The same, where powers are exact: they need more registers a loss."""
    sorted: int
    """Losses on the list that are sorted at once, a power of two; if there are more, they are searched in rounds."""
    passes: tuple[int, ...]
    """Segments longer than the k-th entry get k + 1 passes that narrow the bracket before the list is made."""
    approximation: str
    """Of powers, where one is precise enough: see `numerics.power`."""


class SortConfig(NamedTuple):
    """How the sort solver walks the losses."""

    run: int
    """Losses a program sorts, a power of two."""
    lanes: int
    """Runs searched at a time."""
    warps: int
    up_to: int
    """solver="auto": segments up to this length are sorted, longer ones searched."""
    registers: int
    """That a thread may have, see `launcher.launch`: without, and with fewer, some are spilled."""


class NodesConfig(NamedTuple):
    """How the logits that are to be upsampled are made ready."""

    block: int
    """Nodes a program."""
    chunk: int
    """Classes at a time."""
    warps: int


class UpsampledConfig(NamedTuple):
    """How a kernel walks logits that are upsampled on the way."""

    chunk: int
    """Classes held in registers for all pixels of a cell; if there are more, parts of them."""
    groups: int
    """Of classes that go side by side, a power of two."""
    span: int
    """Pixels of a cell side by side that a thread has."""
    lanes: int
    """Spans a program."""
    height: int
    """Rows of cells a program walks down, at most."""
    warps: int
    per_multiprocessor: int
    """Programs that are enough for each multiprocessor: more rows of cells a program only where these are left."""
    registers: int
    """A thread may have."""


class Table(NamedTuple):
    """All there is to choose on one architecture."""

    pixels: tuple[PixelVectors, ...]
    rows: ClassRows
    stream: StreamConfig
    select: SelectConfig
    forward_solve_block: int
    """`SelectConfig.solve_block` where the solve shares a launch, and so its warps, with the losses."""
    sort: SortConfig
    nodes: NodesConfig
    upsampled: UpsampledConfig


AMPERE = Table(
    pixels=(
        PixelVectors(up_to=32, chunk=32, block=512, warps=4, per_multiprocessor=8),
        PixelVectors(up_to=MAX_CLASSES, chunk=10, block=512, warps=4, per_multiprocessor=8),
    ),
    rows=ClassRows(above=32, block=256, elements=2048, wide_elements=8192, warps=8, per_multiprocessor=8),
    stream=StreamConfig(block=1024, warps=4, per_multiprocessor=8),
    select=SelectConfig(
        block=1024,
        warps=8,
        per_multiprocessor=2,
        capacity=8192,
        solve_block=512,
        exact_solve_block=256,
        sorted=256,
        passes=(1 << 13, 1 << 21, 1 << 27),
        approximation="approx",
    ),
    forward_solve_block=128,
    sort=SortConfig(run=2048, lanes=128, warps=8, up_to=2048, registers=96),
    nodes=NodesConfig(block=128, chunk=16, warps=4),
    upsampled=UpsampledConfig(
        chunk=24, groups=4, span=8, lanes=64, height=8, warps=4, per_multiprocessor=4, registers=255
    ),
)
# Above 24 classes, 4 pixels a thread would need more than 255 registers there: 2 then.
BLACKWELL = AMPERE._replace(
    pixels=(
        PixelVectors(up_to=24, chunk=24, block=512, warps=4, per_multiprocessor=8),
        PixelVectors(up_to=32, chunk=32, block=256, warps=4, per_multiprocessor=8),
        AMPERE.pixels[-1],
    ),
)
# With 128 losses a tile the rounds at the end of the one launch spill there.
CONSUMER_BLACKWELL = BLACKWELL._replace(forward_solve_block=256)
# The interpreter and AMD GPUs have no such instruction.
OTHERS = AMPERE._replace(select=AMPERE.select._replace(approximation="log2"))
TABLES: dict[int, Table] = {
    80: AMPERE,
    86: AMPERE,
    89: AMPERE,
    90: AMPERE,
    100: BLACKWELL,
    120: CONSUMER_BLACKWELL,
}
"""By compute capability, 10 · major + minor."""


def table_for(capability: int) -> Table:
    """The table of a compute capability, or of the next older one listed; 0: of what is no NVIDIA GPU."""
    known = [listed for listed in sorted(TABLES) if listed <= capability]
    return TABLES[known[-1] if known else min(TABLES)] if capability else OTHERS


_in_use: Table | None = None


@contextlib.contextmanager
def using(table: Table) -> Iterator[None]:
    """For every device, while the context lasts: to measure and to test other configurations."""
    global _in_use
    before, _in_use = _in_use, table
    try:
        yield
    finally:
        _in_use = before


def table(device: torch.device) -> Table:
    """The table for a device: that of capability 0 in the interpreter and on AMD GPUs, which are numbered otherwise."""
    return _in_use or _table(device)


@functools.cache
def _table(device: torch.device) -> Table:
    if device.type != "cuda" or torch.version.hip:
        return table_for(0)
    major, minor = torch.cuda.get_device_capability(device)
    return table_for(10 * major + minor)


@functools.lru_cache(maxsize=1024)
def pixel_config(table: Table, classes: int, adjacent_classes: bool = False) -> LogitsConfig:
    """For a number of classes; `perf/static.py` shows the registers it comes to."""
    if adjacent_classes:
        return LogitsConfig(False, classes, table.rows.block, table.rows.warps, table.rows.per_multiprocessor)
    entry = next(entry for entry in table.pixels if classes <= entry.up_to)
    chunk = entry.chunk
    if classes <= chunk:
        chunk = classes
    else:
        # A chunk that divides the classes wastes no loads; otherwise the last one is masked.
        chunk = next((size for size in range(chunk, chunk * 2 // 3, -1) if classes % size == 0), chunk)
    return LogitsConfig(False, chunk, entry.block, entry.warps, entry.per_multiprocessor)


@functools.lru_cache(maxsize=1024)
def row_config(table: Table, classes: int, unit: int, itemsize: int) -> LogitsConfig:
    """For rows of classes that start at multiples of `unit` elements of `itemsize` bytes."""
    vector = min(unit, 16 // itemsize)  # what a thread loads at once
    chunk = min(32 * vector, 1 << (classes - 1).bit_length())
    elements = table.rows.wide_elements if vector * itemsize == 16 else table.rows.elements
    return LogitsConfig(True, chunk, elements // chunk, table.rows.warps, table.rows.per_multiprocessor)


def passes_for(length: int, config: SelectConfig) -> int:
    """How many passes narrow the bracket of segments of `length` losses."""
    return sum(length > longest for longest in config.passes)


def neighbours(unit: int, config: SelectConfig | LogitsConfig) -> int:
    """How many losses of a tile that lie side by side a thread has, in segments whose length `unit` divides."""
    return max(1, min(unit, config.block // (32 * config.warps)))


def solver_for(length: int, solver: str, config: SortConfig) -> str:
    """The solver "auto" means for segments of `length` losses; any other name is itself."""
    return solver if solver != "auto" else "sort" if length <= config.up_to else "select"


def programs_a_row(
    length: int, rows: int, config: StreamConfig | SelectConfig | LogitsConfig, device: torch.device
) -> int:
    """How many programs share the tiles of one row (an image or a segment), with `rows` rows in the launch.

    Grids have one dimension, rows × programs: the others end at 65535.
    """
    tiles = -(-length // config.block)
    return min(tiles, -(-config.per_multiprocessor * multiprocessors(device) // rows))


def programs_of_device(config: UpsampledConfig, device: torch.device) -> int:
    """How many programs are enough for all of a device."""
    return config.per_multiprocessor * multiprocessors(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 in the interpreter, where programs run one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def fraction_bits(length: int) -> int:
    """Fixed point: a power is at most 1, so this many fractional bits leave room for the sum of `length` of them."""
    return 62 - length.bit_length()
