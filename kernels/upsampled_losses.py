"""Stage one for logits that are upsampled on the way: what `cross_entropy` does, without the large logits."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import NodesConfig
from .launcher import launch
from .layout import Strides
from .logits import within_classes
from .numerics import LN2, LOG2E
from .softmax import class_weight, sum_of_weights
from .upsampling import (
    BAD_NODE,
    LOWEST_NODE,
    NO_PIXEL,
    STEEP,
    Corners,
    Grid,
    Plan,
    along_row,
    corners_of,
    load_cells,
    row_of_cells,
    row_of_pixels,
    spans_of,
    sums_of_groups,
    zeros,
)
from .workspace import WORDS, no_statistics, poison, publish, tally

SHALLOW = tl.constexpr(-100.0)
"""Where a cell is nowhere deeper, no exponential overflows that is taken relative to its depth."""
INFINITE_LOSS = tl.constexpr(1e20)
"""From here on the label is a class that is as good as −inf at a node of the pixel."""


class NodesTask(NamedTuple):
    """What `relative_nodes_kernel` is given."""

    logits: Tensor
    """(N, C, h, w), any float type, strided"""
    weight: Tensor | None
    """(C,)"""
    nodes: Tensor
    """(N, C, h·w) float32"""
    dots: Tensor | None
    """(N, h·w) float32, with smoothing: Σ_c v_c·node_c"""
    strides: Strides
    """Of the logits."""
    size: tl.int32
    """h·w"""
    width: tl.int32
    """w"""
    tiles: tl.int32
    """An image."""


class NodesConstants(NamedTuple):
    """What `relative_nodes_kernel` is compiled for."""

    classes: int
    chunk: int
    block: int


@triton.jit
def load_nodes(logits, class_stride, inside, first, COUNT: tl.constexpr, CLASSES: tl.constexpr):
    """A tuple of COUNT classes in float32, from class `first` on; logits: where class 0 is."""
    xs = ()
    for i in tl.static_range(COUNT):
        there = within_classes(inside, first + i, COUNT, CLASSES)
        x = tl.load(logits + tl.cast(first + i, tl.int64) * class_stride, mask=there, other=float("-inf"))
        xs = xs + (x.to(tl.float32),)
    return xs


@triton.jit
def relative_nodes_kernel(task: NodesTask, C: tl.constexpr):
    """log2 e · (logits less the largest class of their node), at least LOWEST_NODE; grid N × tiles.

    Reads   logits twice, the second time from a cache; weight.
    Writes  nodes: BAD_NODE where a class is NaN or +inf, or all are −inf; dots.
    """
    BLOCK: tl.constexpr = C.block
    CHUNK: tl.constexpr = C.chunk
    CLASSES: tl.constexpr = C.classes
    image = (tl.program_id(0) // task.tiles).to(tl.int64)
    index = tl.program_id(0) % task.tiles * BLOCK + tl.arange(0, BLOCK)
    inside = index < task.size
    row = (index // task.width).to(tl.int64)
    logits = task.logits + image * task.strides.image
    logits += row * task.strides.step_1 + (index % task.width) * task.strides.step_2
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, CLASSES, CHUNK):
        xs = load_nodes(logits, task.strides.classes, inside, first, CHUNK, CLASSES)
        for i in tl.static_range(CHUNK):
            peak = tl.maximum(peak, xs[i], propagate_nan=tl.PropagateNan.ALL)
    bad = (peak != peak) | (tl.abs(peak) == float("inf"))
    dot = tl.zeros([BLOCK], tl.float32)
    for first in range(0, CLASSES, CHUNK):
        xs = load_nodes(logits, task.strides.classes, inside, first, CHUNK, CLASSES)
        for i in tl.static_range(CHUNK):
            node = tl.where(bad, BAD_NODE, tl.maximum((xs[i] - peak) * LOG2E, LOWEST_NODE))
            there = within_classes(inside, first + i, CHUNK, CLASSES)
            place = task.nodes + (image * CLASSES + first + i) * task.size + index
            tl.store(place, node, mask=there)
            if task.dots is not None:
                dot += tl.where(there, class_weight(task.weight, first + i, CLASSES) * node, 0.0)
    if task.dots is not None:
        tl.store(task.dots + image * task.size + index, dot, mask=inside)


class Task(NamedTuple):
    """What `upsampled_losses_kernel` is given; L = H·W pixels an image."""

    nodes: Tensor
    """(N, C, h·w) float32, as dots: of `relative_nodes_kernel`"""
    dots: Tensor | None
    target: Tensor
    """(N, H, W), any integer type, strided"""
    weight: Tensor | None
    """(C,)"""
    losses: Tensor
    """(N, L) float32: ℓ, −1 where ignored, NaN where the label or a logit is bad"""
    labels: Tensor
    """(N, L), any integer type: a label inside [0, C)"""
    log_totals: Tensor
    """(N, L) float32: log2 Σ_c 2^x_c of the interpolated nodes; NO_PIXEL at a bad one"""
    workspace: Tensor
    """Zeroed by the caller."""
    grid: Grid
    target_strides: Strides
    """In units, but for the image and the rows where pixels don't lie side by side."""
    ignore_index: tl.int64
    smoothing: tl.float32


@triton.jit
def interpolated(nodes, of_class, row, cells, spans, grid):
    """The value of one class a pixel, (C.lanes, C.span); of_class: where it begins."""
    width = grid.columns.nodes
    upper = of_class + (cells.above * width)[:, None]
    lower = of_class + (cells.below * width)[:, None]
    left = spans.left[:, None]
    right = spans.right[:, None]
    y = row.place[:, None]
    a = tl.load(nodes + (upper + left))
    b = tl.load(nodes + (upper + right))
    c = tl.load(nodes + (lower + left))
    d = tl.load(nodes + (lower + right))
    return (a + y * (c - a)) + row.x_place * ((b - a) + y * ((d - c) - (b - a)))


@triton.jit
def log_totals(nodes, values, depth, row, corners, spans, plane, C: tl.constexpr):
    """log2 Σ_c 2^x_c of the pixels of a row, (C.lanes, C.span): of shallow cells, and not steep ones.

    depth: of all classes, (C.lanes,). values: the first C.chunk classes of the cells; if there are more, all are loaded
    again.
    """
    SPAN: tl.constexpr = C.span
    CHUNK: tl.constexpr = C.chunk
    COUNT: tl.constexpr = C.chunk // C.groups
    CLASSES: tl.constexpr = C.classes
    totals = zeros(SPAN, C)
    place, pace = spans.place[None, :], spans.pace[None, :]
    y = row.place[None, :]
    for first in range(0, CLASSES, CHUNK):
        part = values
        if CHUNK < CLASSES:
            part = load_cells(nodes, corners, plane, first, COUNT, C.groups, CLASSES)
        for i in tl.static_range(COUNT):
            left, across = along_row(part, y, i)
            x = tl.exp2((left - depth[None, :]) + place * across)
            ratio = tl.exp2(pace * across)
            more = ()
            for k in tl.static_range(SPAN):
                if k > 0:
                    x *= ratio
                more = more + (totals[k] + x,)
            totals = more
    return tl.log2(sums_of_groups(totals, C)) + depth[:, None]


@triton.jit
def value_of_class(nodes, c, row, corners, plane, C: tl.constexpr):
    """Of the pixels of a row, (C.lanes, C.span)."""
    LANES: tl.constexpr = C.lanes
    left, across = along_row(load_cells(nodes, corners, plane, c, 1, 1, C.classes), row.place[None, :], 0)
    return tl.reshape(left, [LANES, 1]) + row.x_place * tl.reshape(across, [LANES, 1])


@triton.jit
def deep_log_totals(nodes, row, corners, plane, C: tl.constexpr):
    """`log_totals` of any cells, also where nodes are so sure of different classes that between them all exponentials
    vanish, by way of the largest class of each pixel; +inf at a bad node. Class by class, twice: it is rare."""
    CLASSES: tl.constexpr = C.classes
    highest = row.x_place * 0.0 + LOWEST_NODE
    for c in range(CLASSES):
        highest = tl.maximum(highest, value_of_class(nodes, c, row, corners, plane, C))
    total = row.x_place * 0.0
    for c in range(CLASSES):
        total += tl.exp2(value_of_class(nodes, c, row, corners, plane, C) - highest)
    return tl.where(highest > INFINITE_LOSS, float("inf"), tl.log2(total) + highest)


@triton.jit
def upsampled_losses_kernel(task: Task, C: tl.constexpr):
    """Losses, labels and statistics of the pixels of an image; grid N × programs.

    Reads   nodes: the C.chunk classes of a cell once a span, once a row of pixels where there are more; target once.
    Writes  losses, labels, log_totals; workspace: maximum, count and histogram of the segment.
    Bytes   sizeof(target) read, 9 written a pixel (C ≤ 256), and what the nodes are, 4·C / (pixels a node).
    """
    LANES: tl.constexpr = C.lanes
    SPAN: tl.constexpr = C.span
    CHUNK: tl.constexpr = C.chunk
    COUNT: tl.constexpr = C.chunk // C.groups
    CLASSES: tl.constexpr = C.classes
    TARGET_UNIT: tl.constexpr = C.unit if C.adjacent else 1
    grid = task.grid
    image = (tl.program_id(0) // grid.programs).to(tl.int64)
    spans = spans_of(tl.program_id(0) % grid.programs * LANES + tl.arange(0, LANES), grid, C)
    plane = grid.rows.nodes * grid.columns.nodes
    nodes = task.nodes + image * CLASSES * plane
    width = grid.width * C.unit
    written = image * grid.rows.pixels * width
    target = task.target + image * task.target_strides.image * TARGET_UNIT
    statistics = no_statistics(LANES * SPAN)
    weight_sum = 0.0
    if C.smooth:
        weight_sum = sum_of_weights(task.weight, CLASSES)

    for number in range(grid.height):
        cells = row_of_cells(number, spans, grid, C)
        corners = corners_of(cells, spans, grid)
        corners = Corners(corners.upper[None, :], corners.lower[None, :], corners.right[None, :])
        values = load_cells(nodes, corners, plane, 0, COUNT, C.groups, CLASSES)
        depth, steep = values.depth, values.steep
        for first in range(CHUNK, CLASSES, CHUNK):
            others = load_cells(nodes, corners, plane, first, COUNT, C.groups, CLASSES)
            depth = tl.maximum(depth, others.depth)
            steep = tl.maximum(steep, others.steep)
        depth = tl.max(depth, 0)
        deep = (tl.min(depth, 0) < SHALLOW) | (tl.max(tl.max(steep, 0), 0) > STEEP)
        for row_number in range(grid.rows.longest):
            row = row_of_pixels(row_number, cells, spans, grid, C)
            columns = row.x
            if not C.adjacent:
                columns = row.x * task.target_strides.step_2
            place = (row.y.to(tl.int64) * (task.target_strides.step_1 * TARGET_UNIT))[:, None] + columns
            label = tl.load(target + place, mask=row.there, other=0).to(tl.int64)
            valid = row.there & (label != task.ignore_index)
            good = (label >= 0) & (label < CLASSES)
            label = tl.where(good, label, 0).to(tl.int32)
            x_label = interpolated(nodes, label * plane, row, cells, spans, grid)
            if C.smooth:
                dot = interpolated(task.dots + image * plane, label * 0, row, cells, spans, grid)
            if deep:
                log_total = deep_log_totals(nodes, row, corners, plane, C)
            else:
                log_total = log_totals(nodes, values, depth, row, corners, spans, plane, C)

            loss = tl.maximum((log_total - x_label) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
            if task.weight is not None:
                loss *= tl.load(task.weight + label, mask=row.there, other=0.0).to(tl.float32)
            if C.smooth:
                spread = tl.maximum((weight_sum * log_total - dot) * LN2, 0.0, propagate_nan=tl.PropagateNan.ALL)
                loss = (1 - task.smoothing) * loss + (task.smoothing / CLASSES) * spread
            loss = poison(loss, good & (loss < INFINITE_LOSS))
            loss = tl.where(valid, loss, -1.0)

            place = (row.y * width)[:, None] + row.x
            tl.store(task.losses + written + place, loss, mask=row.there)
            tl.store(task.labels + written + place, label.to(task.labels.dtype.element_ty), mask=row.there)
            tl.store(task.log_totals + written + place, tl.minimum(log_total, NO_PIXEL), mask=row.there)
            loss = tl.reshape(loss, [LANES * SPAN], can_reorder=True)
            statistics = tally(statistics, loss, loss != -1.0)

    segment = image if C.per_image else image * 0
    publish(task.workspace + segment * WORDS, statistics)


def relative_nodes(
    logits: Tensor, weight: Tensor | None, nodes: Tensor, dots: Tensor | None, config: NodesConfig
) -> None:
    """Fill nodes (N, C, h·w), and dots (N, h·w) if given, from logits (N, C, h, w). Launches: 1."""
    images, classes, size = nodes.shape
    tiles = -(-size // config.block)
    strides = Strides(*logits.stride()[:2], 0, *logits.stride()[2:])
    task = NodesTask(logits, weight, nodes, dots, strides, size, logits.shape[3], tiles)
    constants = NodesConstants(classes, min(classes, config.chunk), config.block)
    launch(relative_nodes_kernel, images * tiles, (task,), (constants,), config.warps)


class Inputs(NamedTuple):
    """What a user gave."""

    target: Tensor
    weight: Tensor | None
    ignore_index: int
    smoothing: float


class Buffers(NamedTuple):
    """What becomes of it, see `Task`."""

    nodes: Tensor
    dots: Tensor | None
    losses: Tensor
    labels: Tensor
    log_totals: Tensor
    workspace: Tensor


def softmax_losses(inputs: Inputs, buffers: Buffers, way: Plan) -> None:
    """Fill losses, labels, log_totals and workspace from nodes, dots and the inputs. Launches: 1."""
    nodes, dots, *written = buffers
    task = Task(
        nodes,
        dots,
        inputs.target,
        inputs.weight,
        *written,
        way.grid,
        way.target_strides,
        inputs.ignore_index,
        inputs.smoothing,
    )
    programs = nodes.shape[0] * way.grid.programs
    constants = way.constants._replace(per_image=buffers.workspace.numel() > WORDS.value + 1)
    launch(upsampled_losses_kernel, programs, (task,), (constants,), way.config.warps, registers=way.config.registers)
