"""Logits that are upsampled bilinearly on the way in: what the kernels of both directions share.

The logits given are nodes on a coarse grid. Four of them make a cell, and the pixels inside it are interpolated from
these four. A thread has a span: up to C.span pixels side by side in one cell, in row after row of pixels.

A softmax does not change when all classes of a pixel move alike, and what is added to all classes of a node moves those
of its pixels alike. So nodes are kept relative to their largest class: an interpolated logit is then at most 0, and its
exponential needs no maximum of its own.
"""

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..bilinear import Axis, axis
from .configs import Table, UpsampledConfig, programs_of_device
from .layout import Strides, unit_of
from .logits import within_classes

LOWEST_NODE = tl.constexpr(-1e30)
"""What a class below it counts as, −inf included: 0·(−inf) would be NaN."""
BAD_NODE = tl.constexpr(1e30)
"""All classes of a node with NaN or +inf: the exponentials of the pixels it touches overflow, of no others."""


class Steps(NamedTuple):
    """Along an axis all cells have as many pixels, at the same places."""

    pixels: int
    """A cell; 0: this is not so, and the rest is 0 as well."""
    shift: int
    """The first pixel of cell 0."""
    place: float
    """Of the first pixel of a cell between its nodes, from 0 to 1."""
    pace: float
    """From there to the next."""


class Constants(NamedTuple):
    """What the kernels are compiled for."""

    classes: int
    chunk: int
    """Classes at a time."""
    lanes: int
    """Spans a program."""
    span: int
    """Pixels, a power of two."""
    spans: int
    """That a cell has."""
    first_cell: int
    """See `lmp_triton.bilinear.Axis`."""
    down: Steps
    along: Steps
    unit: int
    """The width, and the strides of the target, are in units of so many pixels, see `layout.unit_of`."""
    adjacent: bool
    """The pixels of a row lie side by side in the target."""
    per_image: bool
    """A segment an image; otherwise one for all."""
    smooth: bool
    """Labels are smoothed."""


class Along(NamedTuple):
    """`lmp_triton.bilinear.Axis`, for a kernel."""

    nodes: tl.int32
    pixels: tl.int32
    slope: tl.int64
    offset: tl.int64
    denominator: tl.int64
    longest: tl.int32
    """The most pixels that a cell has along it."""


class Grid(NamedTuple):
    """Where the pixels are among the nodes, and who takes which."""

    rows: Along
    columns: Along
    width: tl.int32
    """Pixels a row, in units."""
    strips: tl.int32
    """Of rows of cells, that an image has."""
    height: tl.int32
    """Rows of cells a strip."""
    programs: tl.int32
    """An image."""


class Spans(NamedTuple):
    """The spans of a program, (C.lanes,) each: side by side in a strip, and on in the next one."""

    strip: Any
    index: Any
    """In a row of cells."""
    left: Any
    """Nodes."""
    right: Any
    first: Any
    """Pixels; those below 0 are none."""
    end: Any
    places: Any
    """Of the pixels between left and right, from 0 to 1: a tuple of C.span."""


class RowOfCells(NamedTuple):
    """The cells that the spans of a program are in at a time, (C.lanes,) each."""

    there: Any
    above: Any
    """Rows of nodes."""
    below: Any
    first: Any
    """Rows of pixels, as in `Spans`."""
    end: Any


class Cells(NamedTuple):
    """Some classes of the cells of spans: the value at (x, y) is base + x·across + y·(down + x·both)."""

    base: Any
    """A tuple, an entry a class, as the others."""
    across: Any
    down: Any
    both: Any
    depth: Any
    """No pixel's largest class is below it."""


@triton.jit
def edge(cell, along):
    """The first pixel that is not before a cell (int64)."""
    before = tl.maximum(along.denominator * cell - along.offset, 0)
    return tl.minimum((before + along.slope - 1) // along.slope, along.pixels).to(tl.int32)


@triton.jit
def pixels_of_cell(cell, along, STEPS: tl.constexpr):
    """The first pixel of a cell, and the end."""
    if STEPS.pixels:
        first = cell * STEPS.pixels + STEPS.shift
        end = tl.zeros(cell.shape, tl.int32) + along.pixels
    else:
        first = edge(cell.to(tl.int64), along)
        end = edge(cell.to(tl.int64) + 1, along)
    return first, end


@triton.jit
def place_of(pixel, cell, along):
    """Of a pixel in its cell, from 0 to 1: exact but for one rounding."""
    numerator = along.slope * pixel + along.offset - along.denominator * cell.to(tl.int64)
    return numerator.to(tl.float32) / along.denominator.to(tl.float32)


@triton.jit
def spans_of(program, grid, C: tl.constexpr):
    """The spans of a program (of those of an image)."""
    LANES: tl.constexpr = C.lanes
    SPAN: tl.constexpr = C.span
    columns = grid.columns
    a_row = (columns.nodes - C.first_cell) * C.spans
    lane = program * LANES + tl.arange(0, LANES)
    index = lane % a_row
    cell = index // C.spans + C.first_cell
    first, end = pixels_of_cell(cell, columns, C.along)
    first += index % C.spans * SPAN
    last = columns.nodes - 1
    left = tl.minimum(tl.maximum(cell, 0), last)
    places = ()
    for k in tl.static_range(SPAN):
        if C.along.pixels and C.spans == 1:
            places = places + (C.along.place + k * C.along.pace,)
        else:
            places = places + (place_of(first + k, left, columns),)
    return Spans(lane // a_row, index, left, tl.minimum(cell + 1, last), first, end, places)


@triton.jit
def row_of_cells(number, spans, grid, C: tl.constexpr):
    """Row `number` of the strips."""
    cell = spans.strip * grid.height + number + C.first_cell
    first, end = pixels_of_cell(cell, grid.rows, C.down)
    last = grid.rows.nodes - 1
    return RowOfCells(cell <= last, tl.minimum(tl.maximum(cell, 0), last), tl.minimum(cell + 1, last), first, end)


class Row(NamedTuple):
    """A row of pixels in a row of cells."""

    y: Any
    """(C.lanes,)"""
    place: Any
    """Between the nodes above and below, from 0 to 1: (C.lanes,)"""
    x: Any
    """(C.lanes, C.span), as the others."""
    x_place: Any
    there: Any
    """Which pixels there are."""


@triton.jit
def row_of_pixels(number, cells, spans, grid, C: tl.constexpr):
    """Row `number` of pixels in a row of cells."""
    SPAN: tl.constexpr = C.span
    column = tl.arange(0, SPAN)[None, :]
    y = cells.first + number
    x = spans.first[:, None] + column
    there = (x >= 0) & (x < grid.width * C.unit)
    if C.along.pixels:
        if C.along.pixels % SPAN:  # the last span of a cell is not full
            there = there & ((spans.index % C.spans * SPAN)[:, None] + column < C.along.pixels)
    else:
        there = there & (x < spans.end[:, None])
    there = there & (cells.there & (y >= 0) & (y < cells.end))[:, None]
    # Outside of the nodes, where `above` and `left` are not the cell, every place will do.
    if C.down.pixels:
        place = tl.zeros(y.shape, tl.float32) + (C.down.place + number * C.down.pace)
    else:
        place = place_of(y, cells.above, grid.rows)
    if C.along.pixels and C.spans == 1:
        x_place = tl.zeros(x.shape, tl.float32) + (C.along.place + column * C.along.pace)
    else:
        x_place = place_of(x, spans.left[:, None], grid.columns)
    return Row(y, place, x, x_place, there)


@triton.jit
def load_cells(nodes, cells, spans, grid, first, COUNT: tl.constexpr, CLASSES: tl.constexpr):
    """COUNT classes from class `first` on; those past the last one are as low as can be. nodes: of an image."""
    width = grid.columns.nodes
    plane = grid.rows.nodes * width
    # From class to class by a step: addresses that depend on no row a compiler keeps for all classes, or spills.
    upper = first * plane + cells.above * width
    lower = first * plane + cells.below * width
    base = ()
    across = ()
    down = ()
    both = ()
    depth = tl.zeros(spans.left.shape, tl.float32) + LOWEST_NODE
    everywhere = spans.index >= 0
    for i in tl.static_range(COUNT):
        there = within_classes(everywhere, first + i, COUNT, CLASSES)
        a = tl.load(nodes + (upper + spans.left), mask=there, other=LOWEST_NODE)
        b = tl.load(nodes + (upper + spans.right), mask=there, other=LOWEST_NODE)
        c = tl.load(nodes + (lower + spans.left), mask=there, other=LOWEST_NODE)
        d = tl.load(nodes + (lower + spans.right), mask=there, other=LOWEST_NODE)
        upper += plane
        lower += plane
        depth = tl.maximum(depth, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)))
        base = base + (a,)
        across = across + (b - a,)
        down = down + (c - a,)
        both = both + ((d - c) - (b - a),)
    return Cells(base, across, down, both, depth)


@triton.jit
def along_row(cells, y, i: tl.constexpr):
    """Class i along a row of pixels: its value at the left, and the difference to the right."""
    return cells.base[i] + y * cells.down[i], cells.across[i] + y * cells.both[i]


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """A tuple of COUNT float32 vectors (BLOCK,)."""
    xs = ()
    for _ in tl.static_range(COUNT):
        xs = xs + (tl.zeros([BLOCK], tl.float32),)
    return xs


@triton.jit
def side_by_side(xs, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile (BLOCK, WIDTH) of COUNT vectors (BLOCK,), which its store puts side by side by way of shared memory.

    WIDTH is a power of two; the last columns repeat the last vector.
    """
    for _ in tl.static_range(COUNT, WIDTH):
        xs = xs + (xs[COUNT - 1],)
    # A join adds the lowest digit of the number of a column, so the highest one is joined first.
    for level in tl.static_range(1, WIDTH.bit_length()):
        halves = ()
        for i in tl.static_range(WIDTH >> level):
            halves = halves + (tl.join(xs[i], xs[i + (WIDTH >> level)]),)
        xs = halves
    return tl.reshape(xs[0], [xs[0].shape[0], WIDTH])


@triton.jit
def apart(tile, WIDTH: tl.constexpr):
    """The columns of a tile (BLOCK, WIDTH), WIDTH vectors (BLOCK,): what `side_by_side` made of them."""
    BLOCK: tl.constexpr = tile.shape[0]
    xs = (tile,)
    for level in tl.static_range(1, WIDTH.bit_length()):
        low = ()
        high = ()
        for i in tl.static_range(1 << (level - 1)):
            even, odd = tl.split(tl.reshape(xs[i], [BLOCK, WIDTH >> level, 2]))
            low = low + (even,)
            high = high + (odd,)
        xs = low + high
    columns = ()
    for i in tl.static_range(WIDTH):
        columns = columns + (tl.reshape(xs[i], [BLOCK]),)
    return columns


class Plan(NamedTuple):
    """How the kernels go over logits that are upsampled."""

    grid: Grid
    constants: Constants
    config: UpsampledConfig
    target_strides: Strides
    spans: int
    """A row of cells."""


def plan(
    logits: Tensor,
    size: tuple[int, ...],
    target_stride: tuple[int, ...],
    align_corners: bool,
    table: Table,
    smooth: bool,
) -> Plan:
    """From logits (N, C, h, w) to size (H, W), whose target has these strides. per_image is left open, False."""
    enough = programs_of_device(table.upsampled, logits.device)
    return _plan(logits.shape, size, target_stride, align_corners, table.upsampled, enough, smooth)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    target_stride: tuple[int, ...],
    align_corners: bool,
    config: UpsampledConfig,
    enough: int,
    smooth: bool,
) -> Plan:
    images, classes, *nodes = shape
    rows, columns = (axis(n, pixels, align_corners) for n, pixels in zip(nodes, size, strict=True))
    span = min(config.span, 1 << (columns.longest_cell - 1).bit_length())
    spans = -(-columns.longest_cell // span)
    a_row = columns.cells * spans
    # As high as leaves enough programs: where strips meet, sums are kept twice.
    height = max(1, min(config.height, images * rows.cells * a_row // (config.lanes * enough)))
    strips = -(-rows.cells // height)
    adjacent = target_stride[2] == 1
    unit = unit_of(size[1], *(target_stride[:2] if adjacent else ()))
    target_unit = unit if adjacent else 1
    return Plan(
        Grid(_along(rows), _along(columns), size[1] // unit, strips, height, -(-strips * a_row // config.lanes)),
        Constants(
            classes,
            classes if classes <= config.whole else config.chunk,
            config.lanes,
            span,
            spans,
            rows.first_cell,
            _steps(rows),
            _steps(columns),
            unit,
            adjacent,
            False,
            smooth,
        ),
        config,
        Strides(target_stride[0] // target_unit, 0, 0, target_stride[1] // target_unit, target_stride[2]),
        a_row,
    )


def _along(along: Axis) -> Along:
    return Along(along.nodes, along.pixels, along.slope, along.offset, along.denominator, along.longest_cell)


def _steps(along: Axis) -> Steps:
    if along.denominator % along.slope:
        return Steps(0, 0, 0.0, 0.0)
    first = -(along.offset // along.slope)
    place = (along.slope * first + along.offset) / along.denominator
    return Steps(along.denominator // along.slope, first, place, along.slope / along.denominator)
