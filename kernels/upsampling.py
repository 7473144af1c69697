"""Logits that are upsampled bilinearly on the way in: what the kernels of both directions share.

The logits given are nodes on a coarse grid. Four of them make a cell, and the pixels inside it are interpolated from
these four. A thread has a span: up to C.span pixels side by side in one cell, in row after row of pixels.

A softmax does not change when all classes of a pixel move alike, and what is added to all classes of a node moves those
of its pixels alike. So nodes are kept relative to their largest class: an interpolated logit is then at most 0, and its
exponential needs no maximum of its own.

Classes are taken C.groups at a time, side by side: of a chunk of classes, (C.groups, C.lanes) tensors hold the i-th of
every group, class first + i·C.groups + group. Warps share the groups of a span, so that the registers of a thread hold
its part of all classes, and a compiler sees each operation once, not once a class.

The pixels of a span lie at equal distances, and along a row of pixels a class is a straight line. So its exponentials
are a geometric progression: two of them are computed, the others are products.
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
"""All classes of a node with NaN or +inf: the pixels it touches are far above 0, no others are."""
NO_PIXEL = tl.constexpr(1e35)
"""log2 Σ 2^x of what is no pixel: no exponential relative to it is above 0."""
STEEP = tl.constexpr(80.0)
"""Where no class changes by more from node to node along a row, no exponential of a progression gets lost or too large
that counts: one below 2^-126 at the first pixel is below 2^-46 at all of them."""


LANES_A_SHARED_SPAN = 16
"""Programs of the gradient overlap by a sixteenth at most."""


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
    """Classes at a time, a multiple of groups; there may be less."""
    groups: int
    """A power of two."""
    lanes: int
    """Spans a program."""
    span: int
    """Pixels, a power of two."""
    spans: int
    """That a cell has."""
    overlap: int
    """Spans that a program of the gradient has and the one before it, too: those of a cell; 0 if they are too many."""
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
    approximation: str
    """See `configs.SelectConfig`."""


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
    place: Any
    """Of the first pixel between left and right, from 0 to 1."""
    pace: Any
    """From there to the next."""


class RowOfCells(NamedTuple):
    """The cells that the spans of a program are in at a time, (C.lanes,) each."""

    there: Any
    above: Any
    """Rows of nodes."""
    below: Any
    first: Any
    """Rows of pixels, as in `Spans`."""
    end: Any
    place: Any
    """Of the first row between above and below."""
    pace: Any


class Corners(NamedTuple):
    """Where the nodes of spans are in those of a class."""

    upper: Any
    """Above and left."""
    lower: Any
    """Below and left."""
    right: Any
    """From left to right: 1, or 0 outside of the nodes."""


class Cells(NamedTuple):
    """A chunk of classes of the cells of spans: the value at (x, y) is base + x·across + y·(down + x·both)."""

    base: Any
    """A tuple of (C.groups, C.lanes) tensors, as the others."""
    across: Any
    down: Any
    both: Any
    depth: Any
    """No pixel's largest class is below it, (C.groups, C.lanes)."""
    steep: Any
    """By how much a class changes along a row, at most, (C.groups, C.lanes)."""


@triton.jit
def edge(cell, along):
    """The first pixel that is not before a cell (int64)."""
    before = tl.maximum(along.denominator * cell - along.offset, 0)
    return tl.minimum((before + along.slope - 1) // along.slope, along.pixels).to(tl.int32)


@triton.jit
def pixels_of_cell(cell, along, PIXELS: tl.constexpr, SHIFT: tl.constexpr):
    """The first pixel of a cell, and the end."""
    if PIXELS:
        first = cell * PIXELS + SHIFT
        end = tl.zeros(cell.shape, tl.int32) + along.pixels
    else:
        first = edge(cell.to(tl.int64), along)
        end = edge(cell.to(tl.int64) + 1, along)
    return first, end


@triton.jit
def places(pixel, cell, along, STEADY: tl.constexpr, PLACE: tl.constexpr, PACE: tl.constexpr):
    """Of a pixel in its cell, from 0 to 1 and exact but for one rounding, and from there to the next."""
    if STEADY:
        place = tl.zeros(pixel.shape, tl.float32) + PLACE
        pace = tl.zeros(pixel.shape, tl.float32) + PACE
    else:
        numerator = along.slope * pixel + along.offset - along.denominator * cell.to(tl.int64)
        denominator = along.denominator.to(tl.float32)
        place = numerator.to(tl.float32) / denominator
        pace = tl.zeros(pixel.shape, tl.float32) + along.slope.to(tl.float32) / denominator
    return place, pace


@triton.jit
def spans_of(lane, grid, C: tl.constexpr):
    """The spans of lanes, counted in an image."""
    SPAN: tl.constexpr = C.span
    columns = grid.columns
    a_row = (columns.nodes - C.first_cell) * C.spans
    index = lane % a_row
    cell = index // C.spans + C.first_cell
    first, end = pixels_of_cell(cell, columns, C.along.pixels, C.along.shift)
    last = columns.nodes - 1
    left = tl.minimum(tl.maximum(cell, 0), last)
    # Outside of the nodes, where `left` is not the cell, every place will do.
    place, pace = places(first, left, columns, C.along.pixels, C.along.place, C.along.pace)
    if C.spans > 1:
        before = index % C.spans * SPAN
        first += before
        place += before.to(tl.float32) * pace
    return Spans(lane // a_row, index, left, tl.minimum(cell + 1, last), first, end, place, pace)


@triton.jit
def row_of_cells(number, spans, grid, C: tl.constexpr):
    """Row `number` of the strips."""
    cell = spans.strip * grid.height + number + C.first_cell
    first, end = pixels_of_cell(cell, grid.rows, C.down.pixels, C.down.shift)
    last = grid.rows.nodes - 1
    above = tl.minimum(tl.maximum(cell, 0), last)
    place, pace = places(first, above, grid.rows, C.down.pixels, C.down.place, C.down.pace)
    return RowOfCells(cell <= last, above, tl.minimum(cell + 1, last), first, end, place, pace)


@triton.jit
def corners_of(cells, spans, grid):
    """Of the cells that spans are in."""
    width = grid.columns.nodes
    return Corners(cells.above * width + spans.left, cells.below * width + spans.left, spans.right - spans.left)


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
def within_span(k, index, first, end, grid, C: tl.constexpr):
    """Whether pixel k of spans, whose index, first and end are given, is one of theirs."""
    x = first + k
    there = (x >= 0) & (x < grid.width * C.unit)
    if C.along.pixels:
        if C.along.pixels % C.span:  # the last span of a cell is not full
            there = there & (index % C.spans * C.span + k < C.along.pixels)
    else:
        there = there & (x < end)
    return there


@triton.jit
def row_of_pixels(number, cells, spans, grid, C: tl.constexpr):
    """Row `number` of pixels in a row of cells."""
    column = tl.arange(0, C.span)[None, :]
    y = cells.first + number
    first = spans.first[:, None]
    there = within_span(column, spans.index[:, None], first, spans.end[:, None], grid, C)
    there = there & (cells.there & (y >= 0) & (y < cells.end))[:, None]
    x_place = spans.place[:, None] + column.to(tl.float32) * spans.pace[:, None]
    return Row(y, cells.place + number * cells.pace, first + column, x_place, there)


@triton.jit
def load_cells(nodes, corners, plane, first, COUNT: tl.constexpr, GROUPS: tl.constexpr, CLASSES: tl.constexpr):
    """COUNT · GROUPS classes from class `first` on of the nodes of an image; past the last one: as low as can be."""
    group = first + tl.arange(0, GROUPS)[:, None]
    # From class to class by a step: addresses that depend on no row a compiler keeps for all classes, or spills.
    upper = group * plane + corners.upper
    lower = group * plane + corners.lower
    base = ()
    across = ()
    down = ()
    both = ()
    depth = tl.zeros(upper.shape, tl.float32) + LOWEST_NODE
    steep = tl.zeros(upper.shape, tl.float32)
    for i in tl.static_range(COUNT):
        there = within_classes(corners.right >= 0, group + i * GROUPS, COUNT * GROUPS, CLASSES)
        a = tl.load(nodes + upper, mask=there, other=LOWEST_NODE)
        b = tl.load(nodes + (upper + corners.right), mask=there, other=LOWEST_NODE)
        c = tl.load(nodes + lower, mask=there, other=LOWEST_NODE)
        d = tl.load(nodes + (lower + corners.right), mask=there, other=LOWEST_NODE)
        upper += plane * GROUPS
        lower += plane * GROUPS
        depth = tl.maximum(depth, tl.minimum(tl.minimum(a, b), tl.minimum(c, d)))
        steep = tl.maximum(steep, tl.maximum(tl.abs(b - a), tl.abs(d - c)))
        base = base + (a,)
        across = across + (b - a,)
        down = down + (c - a,)
        both = both + ((d - c) - (b - a),)
    return Cells(base, across, down, both, depth, steep)


@triton.jit
def along_row(cells, y, i: tl.constexpr):
    """The i-th classes along a row of pixels: its value at the left, and the difference to the right."""
    return cells.base[i] + y * cells.down[i], cells.across[i] + y * cells.both[i]


@triton.jit
def zeros(COUNT: tl.constexpr, C: tl.constexpr):
    """A tuple of COUNT float32 tensors (C.groups, C.lanes)."""
    GROUPS: tl.constexpr = C.groups
    LANES: tl.constexpr = C.lanes
    xs = ()
    for _ in tl.static_range(COUNT):
        xs = xs + (tl.zeros([GROUPS, LANES], tl.float32),)
    return xs


@triton.jit
def sums_of_groups(xs, C: tl.constexpr):
    """A tile (C.lanes, C.span) of a tuple of C.span tensors (C.groups, C.lanes), added up over the groups."""
    GROUPS: tl.constexpr = C.groups
    LANES: tl.constexpr = C.lanes
    WIDTH: tl.constexpr = C.span
    # A join adds the lowest digit of the number of a column, so the highest one is joined first.
    for level in tl.static_range(1, WIDTH.bit_length()):
        halves = ()
        for i in tl.static_range(WIDTH >> level):
            halves = halves + (tl.join(xs[i], xs[i + (WIDTH >> level)]),)
        xs = halves
    return tl.sum(tl.reshape(xs[0], [GROUPS, LANES, WIDTH]), 0)


class Plan(NamedTuple):
    """How the kernels go over logits that are upsampled."""

    grid: Grid
    constants: Constants
    config: UpsampledConfig
    target_strides: Strides
    spans: int
    """A row of cells."""
    overlapping: int
    """Programs an image, where they overlap."""
    sides: int
    """Of a node whose sums are kept apart: 1 where programs overlap, else 2."""


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
    upsampled, approximation = table.upsampled, table.select.approximation
    return _plan(logits.shape, size, target_stride, align_corners, upsampled, enough, smooth, approximation)


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    size: tuple[int, ...],
    target_stride: tuple[int, ...],
    align_corners: bool,
    config: UpsampledConfig,
    enough: int,
    smooth: bool,
    approximation: str,
) -> Plan:
    images, classes, *nodes = shape
    rows, columns = (axis(n, pixels, align_corners) for n, pixels in zip(nodes, size, strict=True))
    groups = min(config.groups, 1 << (classes - 1).bit_length())
    chunks = -(-classes // config.chunk)
    span = min(config.span, 1 << (columns.longest_cell - 1).bit_length())
    spans = -(-columns.longest_cell // span)
    a_row = columns.cells * spans
    # As high as leaves enough programs: where strips meet, sums are kept twice.
    height = max(1, min(config.height, images * rows.cells * a_row // (config.lanes * enough)))
    strips = -(-rows.cells // height)
    overlap = spans if spans * LANES_A_SHARED_SPAN <= config.lanes else 0
    adjacent = target_stride[2] == 1
    unit = unit_of(size[1], *(target_stride[:2] if adjacent else ()))
    target_unit = unit if adjacent else 1
    return Plan(
        Grid(_along(rows), _along(columns), size[1] // unit, strips, height, -(-strips * a_row // config.lanes)),
        Constants(
            classes,
            groups * -(-classes // (groups * chunks)),
            groups,
            config.lanes,
            span,
            spans,
            overlap,
            rows.first_cell,
            _steps(rows),
            _steps(columns),
            unit,
            adjacent,
            False,
            smooth,
            approximation,
        ),
        config,
        Strides(target_stride[0] // target_unit, 0, 0, target_stride[1] // target_unit, target_stride[2]),
        a_row,
        max(1, -(-(strips * a_row - overlap) // (config.lanes - overlap))),
        1 if overlap else 2,
    )


def _along(along: Axis) -> Along:
    return Along(along.nodes, along.pixels, along.slope, along.offset, along.denominator, along.longest_cell)


def _steps(along: Axis) -> Steps:
    if along.denominator % along.slope:
        return Steps(0, 0, 0.0, 0.0)
    first = -(along.offset // along.slope)
    place = (along.slope * first + along.offset) / along.denominator
    return Steps(along.denominator // along.slope, first, place, along.slope / along.denominator)
