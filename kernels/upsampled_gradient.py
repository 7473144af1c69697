"""Stage three for logits that are upsampled on the way: ∂value/∂logits of the small logits, in two launches.

Each node gets what the pixels of the four cells around it give it, by the transpose of the interpolation. No pixel is
added to a sum by two programs, and no sum depends on which program comes first: a program walks down a strip of cells
and adds up in registers what its spans give the nodes to their left and right, row of nodes by row of nodes; then
the sums of the spans of a node, and of two strips that meet in it, are added in one order.

What a span gives to its right goes to where the spans to the right of that node have what they give to it. Programs
overlap by as many spans as that takes, the first ones of a program being there for what they give to their right. Where
it would take too many, both sides are stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import StreamConfig
from .launcher import launch
from .layout import Strides
from .logits import within_classes
from .numerics import log2_of_share
from .softmax import class_weight, sum_of_weights
from .upsampling import (
    NO_PIXEL,
    STEEP,
    Grid,
    Plan,
    along_row,
    corners_of,
    load_cells,
    row_of_cells,
    row_of_pixels,
    spans_of,
    zeros,
)
from .weighting import Scale, relative_weight, segment_weights


class Task(NamedTuple):
    """What `upsampled_gradient_kernel` is given."""

    nodes: Tensor
    """(N, C, h·w) float32, as losses, labels and log_totals of `upsampled_losses`"""
    losses: Tensor
    labels: Tensor
    log_totals: Tensor
    weights: Tensor | None
    """(N, L) float32: w*·grad_output, where they are at hand; else they follow from losses and scale."""
    scale: Scale
    weight: Tensor | None
    """(C,)"""
    sums: Tensor
    """(N, rows of cells + strips, sides, C, spans a row) float32: what is given to the nodes of a row, of one side, by
    spans to their right and to their left, of two, by those to their right (0) and to their left (1). Strip after
    strip: to the nodes above each of its rows of cells, then to those below the last that has any."""
    exchanged: Tensor
    """(programs, 2, lanes · (3 · span + 1)) float32: a program's own, for what its threads hand each other; with
    smoothing 4 · span"""
    grid: Grid
    smoothing: tl.float32
    chunks: tl.int32
    """Of C.chunk classes, each one a program of its own."""


class Sums(NamedTuple):
    """Over pixels of a span, with x and y as places between nodes; a tuple of classes each.

    d_c = s·softmax_c − h·[c = y] − e·v_c of a pixel. Σ e, the same for all classes, comes after the last one where
    labels are smoothed, and is taken off when the sums are stored.
    """

    d: Any
    x: Any
    """Σ x·d, as the others."""
    y: Any
    xy: Any


class Pixels(NamedTuple):
    """What a row of pixels gives to every class, a tuple of C.span tensors (1, C.lanes) each."""

    lowest: Any
    """The smallest log_total of them, (1, C.lanes)."""
    softmax: Any
    """s, relative to an exponential that is itself relative to `lowest`."""
    label: Any
    hit: Any
    """h"""
    share: Any
    """e"""


@triton.jit
def weight_of(loss, weights, C: tl.constexpr):
    """`relative_weight`, by fewer instructions where the exponent is small enough for them, see `numerics.power`."""
    POWER: tl.constexpr = C.approximation
    if POWER == "none":  # noqa: SIM114 - known to the compiler; the other one, on the device alone
        weight = relative_weight(loss, weights)
    elif weights.exponent > 20.0:
        weight = relative_weight(loss, weights)
    else:
        pivot = weights.pivot
        share, rest = log2_of_share(tl.minimum(loss, pivot), pivot, POWER)
        below = tl.exp2(weights.exponent * share + (weights.exponent * rest - weights.drop))
        below = tl.where(loss >= 0, below, 0.0)
        below = tl.where(pivot > 0, below, 0.0)
        weight = tl.where(loss > pivot, 1.0, below)
    return weight


@triton.jit
def exchange(tile, here, lane, C: tl.constexpr):
    """Put a tile (C.lanes, C.span) where all threads find it: 4-byte words from `here` on, in the order of lane."""
    tl.store(here + (lane * C.span + tl.arange(0, C.span)[None, :]), tile)


@triton.jit
def prepare_pixels(task, row, turn, image, here, weighting, weight_sum, C: tl.constexpr):
    """What a row of pixels gives to every class, each pixel by one thread; `pixels_at` reads it.

    turn: the only pixel of a span that counts; below 0: all do. image: where its pixels begin; here: where to put it.
    """
    WORDS: tl.constexpr = C.lanes * C.span
    lane = tl.arange(0, C.lanes)[:, None]
    place = image + (row.y * (task.grid.width * C.unit))[:, None] + row.x
    there = row.there & ((turn < 0) | (turn == tl.arange(0, C.span)[None, :]))
    loss = tl.load(task.losses + place, mask=there, other=-1.0)
    label = tl.load(task.labels + place, mask=there, other=0).to(tl.int32)
    log_total = tl.load(task.log_totals + place, mask=there, other=NO_PIXEL)
    if task.weights is not None:
        share = tl.load(task.weights + place, mask=there, other=0.0)
    else:
        share = tl.where(loss == -1.0, 0.0, weight_of(loss, weighting, C) * weighting.step)
    hit = share
    if task.weight is not None:
        hit *= tl.load(task.weight + label, mask=there, other=0.0).to(tl.float32)
    spread = hit
    if C.smooth:
        hit *= 1 - task.smoothing
        share *= task.smoothing / C.classes
        spread = hit + share * weight_sum
        exchange(share, here + 3 * WORDS, lane, C)
    lowest = tl.min(log_total, 1)[:, None]
    exchange(spread * tl.exp2(lowest - log_total), here, lane, C)
    exchange(hit, here + WORDS, lane, C)
    exchange(label.to(tl.float32, bitcast=True), here + 2 * WORDS, lane, C)
    tl.store(here + (3 + C.smooth) * WORDS + lane, lowest)


@triton.jit
def pixels_at(here, C: tl.constexpr):
    """A row of pixels from where `prepare_pixels` has put it."""
    SPAN: tl.constexpr = C.span
    WORDS: tl.constexpr = C.lanes * C.span
    lane = tl.arange(0, C.lanes)[None, :]
    first = here + lane * C.span
    softmax = ()
    labels = ()
    hits = ()
    shares = ()
    for k in tl.static_range(SPAN):
        softmax = softmax + (tl.load(first + k),)
        hits = hits + (tl.load(first + (WORDS + k)),)
        labels = labels + (tl.load(first + (2 * WORDS + k)).to(tl.int32, bitcast=True),)
        if C.smooth:
            shares = shares + (tl.load(first + (3 * WORDS + k)),)
    return Pixels(tl.load(here + (3 + C.smooth) * WORDS + lane), softmax, labels, hits, shares)


@triton.jit
def add_softmax(sums, pixels, values, y, place, pace, C: tl.constexpr):
    """The sums with a row of pixels added, their labels left out. place, pace: as in `Spans`."""
    SPAN: tl.constexpr = C.span
    new_d = ()
    new_x = ()
    new_y = ()
    new_xy = ()
    COUNT: tl.constexpr = C.chunk // C.groups
    for i in tl.static_range(COUNT):
        left, across = along_row(values, y, i)
        x = tl.exp2((left - pixels.lowest) + place * across)
        ratio = tl.exp2(pace * across)
        # Σ s_k·ratio^k and Σ k·s_k·ratio^k by Horner's rule, from the last pixel to the first.
        total = pixels.softmax[SPAN - 1]
        total_k = tl.zeros(total.shape, tl.float32)
        for k in tl.static_range(SPAN - 2, -1, -1):
            total_k = total_k * ratio + total
            total = total * ratio + pixels.softmax[k]
        total_k *= ratio
        total_x = place * total + pace * total_k
        below = y * x
        new_d = new_d + (sums.d[i] + x * total,)
        new_x = new_x + (sums.x[i] + x * total_x,)
        new_y = new_y + (sums.y[i] + below * total,)
        new_xy = new_xy + (sums.xy[i] + below * total_x,)
    if C.smooth:
        new_d = new_d + (sums.d[COUNT],)
        new_x = new_x + (sums.x[COUNT],)
        new_y = new_y + (sums.y[COUNT],)
        new_xy = new_xy + (sums.xy[COUNT],)
    return Sums(new_d, new_x, new_y, new_xy)


@triton.jit
def either(a, b):
    """Bits of one or the other."""
    return a | b


@triton.jit
def labels_there(pixels, first, C: tl.constexpr):
    """Which of the classes from `first` on are labels of pixels that count: a bit for the i-th of all groups."""
    SPAN: tl.constexpr = C.span
    bits = tl.zeros(pixels.lowest.shape, tl.int32)
    for k in tl.static_range(SPAN):
        c = pixels.label[k] - first
        bit = tl.where(pixels.hit[k] != 0.0, 1 << (c // C.groups & 31), 0)
        if C.chunk < C.classes:
            bit = tl.where((c >= 0) & (c < C.chunk), bit, 0)
        bits |= bit
    return tl.reduce(tl.reduce(bits, 1, either), 0, either)


@triton.jit
def add_labels(sums, pixels, y, place, pace, first, C: tl.constexpr):
    """What `add_softmax` leaves out. A row of a program has few labels: the other classes have nothing to add."""
    SPAN: tl.constexpr = C.span
    COUNT: tl.constexpr = C.chunk // C.groups
    present = labels_there(pixels, first, C)
    group = first + tl.arange(0, C.groups)[:, None]
    new_d = ()
    new_x = ()
    new_y = ()
    new_xy = ()
    for i in tl.static_range(COUNT):
        d, x, down, both = sums.d[i], sums.x[i], sums.y[i], sums.xy[i]
        if (present >> i) & 1 != 0:
            hit = tl.zeros(d.shape, tl.float32)
            hit_k = hit
            for k in tl.static_range(SPAN):
                h = tl.where(pixels.label[k] == group + i * C.groups, pixels.hit[k], 0.0)
                hit += h
                hit_k += k * h
            hit_x = place * hit + pace * hit_k
            d -= hit
            x -= hit_x
            down -= y * hit
            both -= y * hit_x
        new_d = new_d + (d,)
        new_x = new_x + (x,)
        new_y = new_y + (down,)
        new_xy = new_xy + (both,)
    if C.smooth:
        share = tl.zeros(sums.d[COUNT].shape, tl.float32)
        share_k = share
        for k in tl.static_range(SPAN):
            share += pixels.share[k]
            share_k += k * pixels.share[k]
        share_x = place * share + pace * share_k
        new_d = new_d + (sums.d[COUNT] + share,)
        new_x = new_x + (sums.x[COUNT] + share_x,)
        new_y = new_y + (sums.y[COUNT] + y * share,)
        new_xy = new_xy + (sums.xy[COUNT] + y * share_x,)
    return Sums(new_d, new_x, new_y, new_xy)


@triton.jit
def store_sums(place, row, sums, weight, there, spans, a_row, first, C: tl.constexpr):
    """Σ (1 − y)·d of spans, for row `row` of sums that begin at `place`: what the left node gets and the right one."""
    COUNT: tl.constexpr = C.chunk // C.groups
    CLASSES: tl.constexpr = C.classes
    SIDES: tl.constexpr = 1 if C.overlap else 2
    alone = spans.left == spans.right
    lane = tl.arange(0, C.lanes)[None, :]
    # Of the spans it shares with the program before it, that one stores what the nodes to their left get.
    mine = there & ((lane >= C.overlap) | ((spans.strip == 0) & (spans.index < C.overlap)))
    # From class to class by a step: addresses that depend on no row a compiler keeps for all classes, or spills.
    group = first + tl.arange(0, C.groups)[:, None]
    at = (row * (SIDES * CLASSES) + group) * a_row + spans.index
    rights = ()
    for i in tl.static_range(COUNT):
        c = group + i * C.groups
        both = sums.d[i] - sums.y[i]
        right = sums.x[i] - sums.xy[i]
        if C.smooth:
            v = class_weight(weight, c, CLASSES)
            both -= v * (sums.d[COUNT] - sums.y[COUNT])
            right -= v * (sums.x[COUNT] - sums.xy[COUNT])
        # Outside of the nodes there is one at one side alone, and nobody asks what the other would get.
        left = tl.where(alone, both, both - right)
        right = tl.where(alone, both, right)
        tl.store(place + at, left, mask=within_classes(mine, c, C.chunk, CLASSES))
        at += a_row * C.groups
        rights = rights + (right,)
    others = place + CLASSES * a_row
    if C.overlap:
        tl.debug_barrier()
        others = place + C.overlap
        there = there & (lane + C.overlap < C.lanes) & (spans.index + C.overlap < a_row)
    for i in tl.static_range(COUNT - 1, -1, -1):
        at -= a_row * C.groups
        inside = within_classes(there, group + i * C.groups, C.chunk, CLASSES)
        right = rights[i]
        if C.overlap:
            right += tl.load(others + at, mask=inside, other=0.0)
        tl.store(others + at, right, mask=inside)


@triton.jit
def next_row(sums, whole, C: tl.constexpr):
    """The nodes below, which got Σ y·d, are those above the next row of cells. whole: they are already."""
    COUNT: tl.constexpr = C.chunk // C.groups + C.smooth
    new_d = ()
    new_x = ()
    for i in tl.static_range(COUNT):
        new_d = new_d + (tl.where(whole, sums.d[i], sums.y[i]),)
        new_x = new_x + (tl.where(whole, sums.x[i], sums.xy[i]),)
    none = zeros(COUNT, C)
    return Sums(new_d, new_x, none, none)


@triton.jit
def upsampled_gradient_kernel(task: Task, C: tl.constexpr):
    """The sums of every span; grid N × programs × chunks.

    With a = (1−ε)·v_y + (ε/C)·Σ_k v_k: d_c = w*·grad_output·[a·softmax_c − (1−ε)·v_y·[c = y] − (ε/C)·v_c] of a pixel.

    Reads   nodes once a span; losses (or weights), labels and log_totals once a chunk; scale; weight.
    Writes  sums; those of one side a second time, at once, when what the spans to their left give is added.
    Bytes   9 read a pixel, 4·C·(1 + 1 / (rows of cells a strip)) written a span; 8·C where both sides are kept apart.
    """
    LANES: tl.constexpr = C.lanes
    COUNT: tl.constexpr = C.chunk // C.groups
    CLASSES: tl.constexpr = C.classes
    SIDES: tl.constexpr = 1 if C.overlap else 2
    WORDS: tl.constexpr = C.lanes * ((3 + C.smooth) * C.span + 1)
    grid = task.grid
    first = tl.program_id(0) % task.chunks * C.chunk
    program = tl.program_id(0) // task.chunks
    image = (program // grid.programs).to(tl.int64)
    lane = program % grid.programs * (LANES - C.overlap) + tl.arange(0, LANES)
    tiles = spans_of(lane, grid, C)  # of pixels
    spans = spans_of(lane[None, :], grid, C)  # of classes
    plane = grid.rows.nodes * grid.columns.nodes
    nodes = task.nodes + image * CLASSES * plane
    segment = image if C.per_image else image * 0
    weighting = segment_weights(task.scale, segment)
    a_row = (grid.columns.nodes - C.first_cell) * C.spans
    place = task.sums + image * (grid.rows.nodes - C.first_cell + grid.strips) * (SIDES * CLASSES) * a_row
    exchanged = task.exchanged + tl.program_id(0).to(tl.int64) * (2 * WORDS)

    weight_sum = 0.0
    if C.smooth:
        weight_sum = sum_of_weights(task.weight, CLASSES)
    written = image * grid.rows.pixels * (grid.width * C.unit)
    none = zeros(COUNT + C.smooth, C)
    sums = Sums(none, none, none, none)
    rows_done = 0
    for number in range(grid.height):
        cells = row_of_cells(number, spans, grid, C)
        rows = row_of_cells(number, tiles, grid, C)
        values = load_cells(nodes, corners_of(cells, spans, grid), plane, first, COUNT, C.groups, CLASSES)
        # There the pixels of a row are taken one by one, each as the only one of its row.
        steep = tl.max(tl.max(values.steep, 1), 0) > STEEP
        pace = tl.where(steep, 0.0, spans.pace)
        for step in range(grid.rows.longest * tl.where(steep, C.span, 1)):
            turn = tl.where(steep, step % C.span, -1)
            row_number = tl.where(steep, step // C.span, step)
            # Two places take turns, so that no thread writes what another one still reads.
            here = exchanged + (rows_done % 2) * WORDS
            rows_done += 1
            row = row_of_pixels(row_number, rows, tiles, grid, C)
            prepare_pixels(task, row, turn, written, here, weighting, weight_sum, C)
            tl.debug_barrier()
            pixels = pixels_at(here, C)
            x = spans.place + tl.maximum(turn, 0) * spans.pace
            y = cells.place + row_number * cells.pace
            sums = add_labels(sums, pixels, y, x, pace, first, C)
            sums = add_softmax(sums, pixels, values, y, x, pace, C)
        whole = (cells.above == cells.below) | (~cells.there)
        store_sums(place, spans.strip * (grid.height + 1) + number, sums, task.weight, ~whole, spans, a_row, first, C)
        sums = next_row(sums, whole, C)
    # The nodes below the last row of cells of all are those above it.
    last = tl.minimum((spans.strip + 1) * grid.height, grid.rows.nodes - C.first_cell - 1) + spans.strip
    store_sums(place, last, sums, task.weight, spans.strip < grid.strips, spans, a_row, first, C)


class NodesTask(NamedTuple):
    """What `nodes_gradient_kernel` is given."""

    sums: Tensor
    """Of `upsampled_gradient_kernel`."""
    grad: Tensor
    """(N, C, h, w), any float type, strided"""
    strides: Strides
    """Of grad."""
    rows: tl.int32
    """h"""
    columns: tl.int32
    """w"""
    strips: tl.int32
    height: tl.int32
    tiles: tl.int32
    """A class of an image."""


class NodesConstants(NamedTuple):
    """What `nodes_gradient_kernel` is compiled for."""

    classes: int
    spans: int
    sides: int
    first_cell: int
    block: int


@triton.jit
def sum_of_row(sums, at, column, there, a_row, C: tl.constexpr):
    """What spans give to a node, of the row that begins at `at` in the sums of an image."""
    CLASSES: tl.constexpr = C.classes
    total = tl.zeros(column.shape, tl.float32)
    cell = column - C.first_cell
    for i in range(C.spans):
        total += tl.load(sums + (at + cell * C.spans + i), mask=there, other=0.0)
        if C.sides == 2:
            others = at + CLASSES * a_row
            total += tl.load(sums + (others + (cell - 1) * C.spans + i), mask=there & (cell > 0), other=0.0)
    return total


@triton.jit
def nodes_gradient_kernel(task: NodesTask, C: tl.constexpr):
    """∂value/∂logits; grid N × C × tiles of h·w.

    Reads   sums, each once, but for those that nobody asks for.
    Writes  grad, every element once, rounded once.
    """
    BLOCK: tl.constexpr = C.block
    CLASSES: tl.constexpr = C.classes
    image = (tl.program_id(0) // task.tiles // CLASSES).to(tl.int64)
    c = tl.program_id(0) // task.tiles % CLASSES
    index = tl.program_id(0) % task.tiles * BLOCK + tl.arange(0, BLOCK)
    column = index % task.columns
    row = index // task.columns
    there = row < task.rows
    a_row = (task.columns - C.first_cell) * C.spans
    slot = C.sides * CLASSES * a_row
    sums = task.sums + image * (task.rows - C.first_cell + task.strips) * slot
    cell = row - C.first_cell
    strip = cell // task.height
    at = (cell + strip) * slot + c * a_row
    total = sum_of_row(sums, at, column, there, a_row, C)
    # Where a strip begins, the one before it ends.
    total += sum_of_row(sums, at - slot, column, there & (strip > 0) & (cell == strip * task.height), a_row, C)
    place = task.grad + image * task.strides.image + c.to(tl.int64) * task.strides.classes
    place += row.to(tl.int64) * task.strides.step_1 + column.to(tl.int64) * task.strides.step_2
    tl.store(place, total.to(task.grad.dtype.element_ty), mask=there)


def sums_shape(shape: tuple[int, ...], way: Plan) -> tuple[int, ...]:
    """Of `Task.sums`, for logits of that shape (N, C, h, w)."""
    return shape[0], shape[2] - way.constants.first_cell + way.grid.strips, way.sides, shape[1], way.spans


class Given(NamedTuple):
    """The arguments of `sums_of_spans`, see `Task`."""

    nodes: Tensor
    losses: Tensor
    labels: Tensor
    log_totals: Tensor
    weights: Tensor | None
    weight: Tensor | None
    smoothing: float


def exchange_shape(images: int, way: Plan) -> tuple[int, ...]:
    """Of `Task.exchanged`."""
    c = way.constants
    return images * way.overlapping * -(-c.classes // c.chunk), 2, c.lanes * ((3 + c.smooth) * c.span + 1)


def sums_of_spans(given: Given, scale: Scale, sums: Tensor, exchanged: Tensor, way: Plan) -> None:
    """Fill sums. exchanged: room. weights: needed where way.constants.chunk is less than all classes. Launches: 1."""
    *tensors, weight, smoothing = given
    chunks = -(-way.constants.classes // way.constants.chunk)
    grid = way.grid._replace(programs=way.overlapping)
    task = Task(*tensors, scale, weight, sums, exchanged, grid, smoothing, chunks)
    constants = way.constants._replace(per_image=scale.segments > 1)
    launch(
        upsampled_gradient_kernel,
        exchanged.shape[0],
        (task,),
        (constants,),
        way.config.warps,
        registers=way.config.registers,
    )


def nodes_gradient(sums: Tensor, grad: Tensor, way: Plan, config: StreamConfig) -> None:
    """Fill grad (N, C, h, w) from sums. Launches: 1."""
    images, classes, rows, columns = grad.shape
    tiles = -(-rows * columns // config.block)
    strides = Strides(*grad.stride()[:2], 0, *grad.stride()[2:])
    task = NodesTask(sums, grad, strides, rows, columns, way.grid.strips, way.grid.height, tiles)
    constants = NodesConstants(classes, way.constants.spans, way.sides, way.constants.first_cell, config.block)
    launch(nodes_gradient_kernel, images * classes * tiles, (task,), (constants,), config.warps)
