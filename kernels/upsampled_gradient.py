"""Stage three for logits that are upsampled on the way: ∂value/∂logits of the small logits, in two launches.

Each node gets what the pixels of the four cells around it give it, by the transpose of the interpolation. No pixel is
added to a sum by two programs, and no sum depends on which program comes first: a program walks down a strip of cells
and adds up in registers what its spans give the nodes to their left and right, row of nodes by row of nodes; then
the sums to both sides of a node, and of two strips that meet in it, are added in one order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import StreamConfig
from .launch import launch
from .layout import Strides
from .logits import within_classes
from .softmax import class_weight, sum_of_weights
from .upsampling import Grid, Plan, along_row, apart, load_cells, row_of_cells, row_of_pixels, spans_of, zeros
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
    """(N, h + strips, 2, C, spans a row) float32: what is given to the nodes of a row, by spans to their right (0) and
    to their left (1): row j, the first h of them, by the strip that cells j are in; row h + s by strip s to the last
    row of nodes it reaches."""
    grid: Grid
    smoothing: tl.float32
    chunks: tl.int32
    """Of C.chunk classes, each one a program of its own."""


class Sums(NamedTuple):
    """Over pixels of a span, with x and y as places between nodes; a tuple of classes each."""

    d: Any
    x: Any
    """Σ x·d, as the others."""
    y: Any
    xy: Any


class Pixels(NamedTuple):
    """What a row of pixels gives to every class, a tuple of C.span vectors each."""

    log_total: Any
    label: Any
    hit: Any
    spread: Any
    share: Any


@triton.jit
def pixels_at(task, image, place, there, weighting, C: tl.constexpr):
    """The pixels at places in an image that begins at `image`."""
    SPAN: tl.constexpr = C.span
    loss = tl.load(task.losses + image + place, mask=there, other=-1.0)
    label = tl.load(task.labels + image + place, mask=there, other=0).to(tl.int32)
    # Of pixels that are none, no exponential may overflow; of ignored ones at a bad node none will.
    log_total = tl.load(task.log_totals + image + place, mask=there, other=float("inf"))
    if task.weights is not None:
        share = tl.load(task.weights + image + place, mask=there, other=0.0)
    else:
        share = tl.where(loss == -1.0, 0.0, relative_weight(loss, weighting) * weighting.step)
    hit = share
    if task.weight is not None:
        hit *= tl.load(task.weight + label, mask=there, other=0.0).to(tl.float32)
    spread = hit
    if C.smooth:
        hit *= 1 - task.smoothing
        share *= task.smoothing / C.classes
        spread = hit + share * sum_of_weights(task.weight, C.classes)
    hits = apart(hit, SPAN)
    spreads = hits
    shares = hits
    if C.smooth:
        spreads = apart(spread, SPAN)
        shares = apart(share, SPAN)
    return Pixels(apart(log_total, SPAN), apart(label, SPAN), hits, spreads, shares)


@triton.jit
def add_row(sums, pixels, values, spans, y, weight, first, C: tl.constexpr):
    """The sums with a row of pixels added."""
    SPAN: tl.constexpr = C.span
    CHUNK: tl.constexpr = C.chunk
    new_d = ()
    new_x = ()
    new_y = ()
    new_xy = ()
    for i in tl.static_range(CHUNK):
        left, across = along_row(values, y, i)
        total = tl.zeros(left.shape, tl.float32)
        total_x = total
        for k in tl.static_range(SPAN):
            x = spans.places[k]
            d = tl.exp2((left + x * across) - pixels.log_total[k]) * pixels.spread[k]
            d -= tl.where(pixels.label[k] == first + i, pixels.hit[k], 0.0)
            if C.smooth:
                d -= pixels.share[k] * class_weight(weight, first + i, C.classes)
            total += d
            total_x += x * d
        new_d = new_d + (sums.d[i] + total,)
        new_x = new_x + (sums.x[i] + total_x,)
        new_y = new_y + (sums.y[i] + y * total,)
        new_xy = new_xy + (sums.xy[i] + y * total_x,)
    return Sums(new_d, new_x, new_y, new_xy)


@triton.jit
def store_sums(place, row, sums, there, spans, a_row, first, C: tl.constexpr):
    """Σ (1 − y)·d of spans, for row `row` of sums that begin at `place`: what the left node gets and the right one."""
    CHUNK: tl.constexpr = C.chunk
    CLASSES: tl.constexpr = C.classes
    alone = spans.left == spans.right
    # From class to class by a step: addresses that depend on no row a compiler keeps for all classes, or spills.
    at = (row * (2 * CLASSES) + first) * a_row + spans.index
    others = place + CLASSES * a_row
    for i in tl.static_range(CHUNK):
        both = sums.d[i] - sums.y[i]
        right = sums.x[i] - sums.xy[i]
        # Outside of the nodes there is one at one side alone, and nobody asks what the other would get.
        left = tl.where(alone, both, both - right)
        right = tl.where(alone, both, right)
        inside = within_classes(there, first + i, CHUNK, CLASSES)
        tl.store(place + at, left, mask=inside)
        tl.store(others + at, right, mask=inside)
        at += a_row


@triton.jit
def next_row(sums, whole, C: tl.constexpr):
    """The nodes below, which got Σ y·d, are those above the next row of cells. whole: they are already."""
    CHUNK: tl.constexpr = C.chunk
    new_d = ()
    new_x = ()
    for i in tl.static_range(CHUNK):
        new_d = new_d + (tl.where(whole, sums.d[i], sums.y[i]),)
        new_x = new_x + (tl.where(whole, sums.x[i], sums.xy[i]),)
    none = zeros(CHUNK, C.lanes)
    return Sums(new_d, new_x, none, none)


@triton.jit
def upsampled_gradient_kernel(task: Task, C: tl.constexpr):
    """The sums of every span; grid N × programs × chunks.

    With a = (1−ε)·v_y + (ε/C)·Σ_k v_k: d_c = w*·grad_output·[a·softmax_c − (1−ε)·v_y·[c = y] − (ε/C)·v_c] of a pixel.

    Reads   nodes once a span; losses (or weights), labels and log_totals once a chunk; scale; weight.
    Writes  sums, each once.
    Bytes   9 read a pixel, 8·C·(1 + 1 / (rows of cells a strip)) written a span.
    """
    CHUNK: tl.constexpr = C.chunk
    CLASSES: tl.constexpr = C.classes
    grid = task.grid
    first = tl.program_id(0) % task.chunks * CHUNK
    program = tl.program_id(0) // task.chunks
    image = (program // grid.programs).to(tl.int64)
    spans = spans_of(program % grid.programs, grid, C)
    nodes = task.nodes + image * CLASSES * (grid.rows.nodes * grid.columns.nodes)
    width = grid.width * C.unit
    segment = image if C.per_image else image * 0
    weighting = segment_weights(task.scale, segment)
    a_row = (grid.columns.nodes - C.first_cell) * C.spans
    place = task.sums + image * (grid.rows.nodes + grid.strips) * (2 * CLASSES) * a_row

    written = image * grid.rows.pixels * width
    none = zeros(CHUNK, C.lanes)
    sums = Sums(none, none, none, none)
    for number in range(grid.height):
        cells = row_of_cells(number, spans, grid, C)
        values = load_cells(nodes, cells, spans, grid, first, CHUNK, CLASSES)
        for row_number in range(grid.rows.longest):
            row = row_of_pixels(row_number, cells, spans, grid, C)
            pixels = pixels_at(task, written, (row.y * width)[:, None] + row.x, row.there, weighting, C)
            sums = add_row(sums, pixels, values, spans, row.place, task.weight, first, C)
        whole = (cells.above == cells.below) | (~cells.there)
        store_sums(place, cells.above, sums, ~whole, spans, a_row, first, C)
        sums = next_row(sums, whole, C)
    store_sums(place, grid.rows.nodes + spans.strip, sums, spans.strip < grid.strips, spans, a_row, first, C)


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
    """An image."""


class NodesConstants(NamedTuple):
    """What `nodes_gradient_kernel` is compiled for."""

    classes: int
    spans: int
    first_cell: int
    block: int


@triton.jit
def sum_of_row(place, column, there, a_row, C: tl.constexpr):
    """What the spans to both sides give to a node, of the row whose sums begin at `place`."""
    CLASSES: tl.constexpr = C.classes
    total = tl.zeros(column.shape, tl.float32)
    cell = column - C.first_cell
    for i in range(C.spans):
        total += tl.load(place + (cell * C.spans + i), mask=there, other=0.0)
        before = there & (cell > 0)
        others = place + tl.cast(CLASSES, tl.int64) * a_row
        total += tl.load(others + ((cell - 1) * C.spans + i), mask=before, other=0.0)
    return total


@triton.jit
def nodes_gradient_kernel(task: NodesTask, C: tl.constexpr):
    """∂value/∂logits; grid N × tiles of C·h·w.

    Reads   sums, each once, but for those that nobody asks for.
    Writes  grad, every element once, rounded once.
    """
    BLOCK: tl.constexpr = C.block
    CLASSES: tl.constexpr = C.classes
    image = (tl.program_id(0) // task.tiles).to(tl.int64)
    index = tl.program_id(0) % task.tiles * BLOCK + tl.arange(0, BLOCK)
    column = index % task.columns
    rest = index // task.columns
    row = rest % task.rows
    c = (rest // task.rows).to(tl.int64)
    there = c < CLASSES
    a_row = (task.columns - C.first_cell) * C.spans
    of_class = task.sums + image * (task.rows + task.strips) * (2 * CLASSES) * a_row + c * a_row
    slot = tl.cast(2 * CLASSES, tl.int64) * a_row

    last = row == task.rows - 1
    total = sum_of_row(of_class + row * slot, column, there & ~last, a_row, C)
    # A strip ends in this row, or the last one does.
    before = row - C.first_cell
    ends = there & (before > 0) & (before % task.height == 0) & (before // task.height < task.strips)
    total += sum_of_row(of_class + (task.rows + before // task.height - 1) * slot, column, ends, a_row, C)
    total += sum_of_row(of_class + (task.rows + task.strips - 1) * slot, column, there & last, a_row, C)
    place = task.grad + image * task.strides.image + c * task.strides.classes
    place += row.to(tl.int64) * task.strides.step_1 + column.to(tl.int64) * task.strides.step_2
    tl.store(place, total.to(task.grad.dtype.element_ty), mask=there)


def sums_shape(grad: Tensor, way: Plan) -> tuple[int, ...]:
    """Of `Task.sums`, for a gradient (N, C, h, w)."""
    return grad.shape[0], grad.shape[2] + way.grid.strips, 2, grad.shape[1], way.spans


class Given(NamedTuple):
    """The arguments of `upsampled_gradient`, see `Task`."""

    nodes: Tensor
    losses: Tensor
    labels: Tensor
    log_totals: Tensor
    weights: Tensor | None
    weight: Tensor | None
    smoothing: float


def upsampled_gradient(given: Given, scale: Scale, sums: Tensor, way: Plan) -> None:
    """Fill sums. weights: needed where way.constants.chunk is less than all classes. Launches: 1."""
    *tensors, weight, smoothing = given
    chunks = -(-way.constants.classes // way.constants.chunk)
    task = Task(*tensors, scale, weight, sums, way.grid, smoothing, chunks)
    constants = way.constants._replace(per_image=scale.segments > 1)
    launch(
        upsampled_gradient_kernel,
        given.nodes.shape[0] * way.grid.programs * chunks,
        (task,),
        (constants,),
        way.config.warps,
    )


def nodes_gradient(sums: Tensor, grad: Tensor, way: Plan, config: StreamConfig) -> None:
    """Fill grad (N, C, h, w) from sums. Launches: 1."""
    images, classes, rows, columns = grad.shape
    tiles = -(-classes * rows * columns // config.block)
    strides = Strides(*grad.stride()[:2], 0, *grad.stride()[2:])
    task = NodesTask(sums, grad, strides, rows, columns, way.grid.strips, way.grid.height, tiles)
    constants = NodesConstants(classes, way.constants.spans, way.constants.first_cell, config.block)
    launch(nodes_gradient_kernel, images * tiles, (task,), (constants,), config.warps)
