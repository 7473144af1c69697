"""Stage three: the gradient, w*·grad_output·∂ℓ/∂logits, straight into the gradient buffer."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import Table
from .launcher import launch, wait_for_launch_before
from .layout import Sizes, Strides
from .logits import Tile, image_sizes, load_classes, load_label, load_row, tile_of, walk, within_classes
from .numerics import LOG2E, Q_CAP
from .softmax import class_weight, minus_log_softmax, softmax_of_tile, sum_of_weights
from .weighting import Scale, relative_weight, segment_weights

FAR = tl.constexpr(64.0)
"""Above this loss, ℓ as a float32 is too coarse (2^-24·ℓ) to get the softmax from; it is computed afresh."""
LAST = tl.constexpr("evict_first")
"""Eviction policy of what nobody reads again before the cache has turned over: the logits, and the gradient."""


class Task(NamedTuple):
    """What the kernel reads and writes, see there."""

    logits: Tensor
    losses: Tensor
    labels: Tensor
    nll: Tensor
    weight: Tensor | None
    scale: Scale
    grad: Tensor
    sizes: Sizes
    strides: Strides
    grad_strides: Strides
    smoothing: tl.float32
    tiles: tl.int32
    """Of an image."""


class Form(NamedTuple):
    """What the kernel is compiled for, besides `logits.Constants`."""

    at_once: bool
    """All classes of a pixel are in registers; otherwise they come in chunks, or in rows."""
    reads_losses: bool
    """Otherwise they follow from the logits, which are at hand."""
    width: int
    """0, or, for classes that lie side by side in grad though they are not read so, the next power of two."""


class Pixels(NamedTuple):
    """Of a tile: d/dx_c = softmax_c·spread − [c = label]·hit − v_c·smooth, or 0 where idle."""

    inside: Any
    idle: Any
    label: Any
    spread: Any
    hit: Any
    smooth: Any


@triton.jit
def logits_gradient_kernel(task: Task, C: tl.constexpr, FORM: tl.constexpr):
    """∂value/∂logits of the pixels of an image; grid N × tiles, in reverse: what was read last is in the cache.

    With a = (1−ε)·v_y + (ε/C)·Σ_k v_k: w*·grad_output·[a·softmax_c − (1−ε)·v_y·[c = y] − (ε/C)·v_c].

    Reads   labels; losses, unless they follow from the logits at hand (the same instructions, so the same bits; they
            are read for p = 1 alone then); logits (N, C, *spatial) once, or, with FORM.width 0, not at all if no pixel
            of a tile has a weight; where they come in chunks, nll (there a tile with a loss above FAR reads its logits
            twice); scale; weight (C,) or None.
    Writes  grad (N, C, *spatial), in the type of the logits, every element once, rounded once, multiplied in float32.
    Bytes   C·sizeof(logit) + 1 read, with losses 4 more, C·sizeof(logit) written a pixel.
    """
    wait_for_launch_before()
    BLOCK: tl.constexpr = C.block
    CLASSES: tl.constexpr = C.classes
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image = (program // task.tiles).to(tl.int64)
    weights = segment_weights(task.scale, image if C.per_image else image * 0)
    sizes = image_sizes(task.sizes, C)
    start = program % task.tiles * BLOCK
    tile = tile_of(task.logits, image, start, sizes, task.strides, C.adjacent, C)
    to = tile_of(task.grad, image, start, sizes, task.grad_strides, C.other_adjacent, C)
    inside = tile.inside
    saved = image * sizes.pixels + start + tl.arange(0, BLOCK)
    label = tl.load(task.labels + saved, mask=inside, other=CLASSES).to(tl.int32)
    idle = label == CLASSES
    label = tl.where(idle, 0, label)
    if FORM.reads_losses:
        loss = tl.load(task.losses + saved, mask=inside, other=-1.0)
        step = relative_weight(loss, weights) * weights.step
        idle = idle | (step == 0)
    else:
        step = 0.0
        exponent = tl.where(weights.step == weights.step, weights.exponent, 0.0)  # of a poisoned segment all is NaN
        all_or_none = tl.zeros([BLOCK], tl.float32) + exponent >= Q_CAP  # p = 1
        loss = tl.load(task.losses + saved, mask=inside & all_or_none, other=float("inf"))
        idle = idle | (loss < weights.pivot)
    if FORM.width == 0:  # there it would spill (Triton 3.9)
        busy = tl.min(idle.to(tl.int32), 0) == 0
        tile = Tile(tile.logits, tile.offsets, tile.class_stride, inside & busy)

    if FORM.at_once:
        # The softmax is as precise as the logits, and nothing was saved for it.
        xs = load_classes(tile, 0, CLASSES, CLASSES, LAST)
        peak = xs[0]
        for i in tl.static_range(1, CLASSES):
            peak = tl.maximum(peak, xs[i])
        exponentials = ()
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(CLASSES):
            exponentials = exponentials + (tl.exp2((xs[i] - peak) * LOG2E),)
            total += exponentials[i]
        if not FORM.reads_losses:
            loss = minus_log_softmax(peak, total, load_label(tile, label.to(tl.int64)))
            if task.weight is not None:
                loss *= tl.load(task.weight + label, mask=inside, other=0.0).to(tl.float32)
            step = relative_weight(loss, weights) * weights.step
        pixels = factors(task, inside, idle, label, step, C)
        store_at_once(to, pixels, exponentials, pixels.spread / total, task.weight, C, FORM.width)
    else:
        pixels = factors(task, inside, idle, label, step, C)
        store_in_chunks(to, pixels, tile, tl.load(task.nll + saved, mask=inside, other=0.0), task.weight, C)


@triton.jit
def factors(task, inside, idle, label, step, C: tl.constexpr):
    """step: w*·grad_output."""
    hit = step
    if task.weight is not None:
        hit *= tl.load(task.weight + label, mask=inside, other=0.0).to(tl.float32)
    spread = hit
    if C.smooth:
        hit *= 1 - task.smoothing
        step *= task.smoothing / C.classes
        spread = hit + step * sum_of_weights(task.weight, C.classes)
    return Pixels(inside, idle, label, spread, hit, step)


@triton.jit
def store_at_once(to, pixels, exponentials, spread, weight, C: tl.constexpr, WIDTH: tl.constexpr):
    """exponentials: of all classes; spread: pixels.spread divided by their sum."""
    CLASSES: tl.constexpr = C.classes
    ds = ()
    for i in tl.static_range(CLASSES):
        d = exponentials[i] * spread - tl.where(pixels.label == i, pixels.hit, 0.0)
        if C.smooth:
            d -= pixels.smooth * class_weight(weight, i, CLASSES)
        if WIDTH:
            ds = ds + (tl.where(pixels.idle, 0.0, d),)
        else:
            store_class(to, i, d, pixels.idle, pixels.inside)
    if WIDTH:
        classes = tl.arange(0, WIDTH)[None, :]
        tl.store(
            to.logits + to.offsets[:, None] + classes,
            side_by_side(ds, CLASSES, WIDTH).to(to.logits.dtype.element_ty),
            mask=pixels.inside[:, None] & (classes < CLASSES),
            eviction_policy=LAST,
        )


@triton.jit
def store_in_chunks(to, pixels, tile, nll, weight, C: tl.constexpr):
    """tile: the logits, read here chunk by chunk."""
    CLASSES: tl.constexpr = C.classes
    CHUNK: tl.constexpr = C.chunk
    label = pixels.label
    # log2 softmax_c = (x_c − anchor)·log2 e − rest
    anchor = load_label(tile, label.to(tl.int64))
    rest = nll * LOG2E
    if tl.max(tl.where(pixels.idle, 0.0, nll), 0) > FAR:
        anchor, total, _dot = softmax_of_tile(tile, weight, anchor, False, C)
        rest = tl.log2(total)
    for first in range(0, CLASSES, CHUNK):
        if C.rows:
            x, classes, _there = load_row(tile, first, CHUNK, CLASSES, LAST)
            d = pixels.spread[:, None] * tl.exp2((x - anchor[:, None]) * LOG2E - rest[:, None])
            d -= tl.where(label[:, None] == classes, pixels.hit[:, None], 0.0)
            if C.smooth:
                d -= pixels.smooth[:, None] * class_weight(weight, classes, CLASSES)
            d = tl.where(pixels.idle[:, None], 0.0, d).to(to.logits.dtype.element_ty)
            mask = pixels.inside[:, None] & (classes < CLASSES)
            tl.store(to.logits + to.offsets[:, None] + classes, d, mask=mask, eviction_policy=LAST)
        else:
            xs = load_classes(tile, first, CHUNK, CLASSES, LAST)
            for i in tl.static_range(CHUNK):
                c = first + i
                d = pixels.spread * tl.exp2((xs[i] - anchor) * LOG2E - rest) - tl.where(label == c, pixels.hit, 0.0)
                if C.smooth:
                    d -= pixels.smooth * class_weight(weight, c, CLASSES)
                store_class(to, c, d, pixels.idle, within_classes(pixels.inside, c, CHUNK, CLASSES))


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
def store_class(to, c, d, idle, inside):
    """Class c of a tile of pixels, rounded once; 0 where idle (there d may be NaN)."""
    row = to.logits + tl.cast(c, tl.int64) * to.class_stride
    d = tl.where(idle, 0.0, d).to(to.logits.dtype.element_ty)
    tl.store(row + to.offsets, d, mask=inside, eviction_policy=LAST)


def logits_gradient(
    logits: Tensor,
    losses: Tensor,
    labels: Tensor,
    nll: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    scale: Scale,
    grad: Tensor,
    table: Table,
) -> None:
    """Fill grad (N, C, *spatial) from what stages one and two left; nll is the losses if they are plain. Launches: 1.

    Where the classes of a pixel lie side by side in the logits, they do in grad.
    """
    images, pixels = losses.shape
    way = walk(logits, grad, table, scale.segments > 1, label_smoothing > 0)
    width = 1 << (logits.shape[1] - 1).bit_length() if way.adjacent_classes and not way.config.rows else 0
    tiles = -(-pixels // way.config.block)
    buffers = (logits, losses, labels, nll, weight, scale, grad)
    task = Task(*buffers, way.sizes, way.strides, way.other_strides, label_smoothing, tiles)
    at_once = way.config.chunk >= logits.shape[1] and not way.config.rows
    form = Form(at_once, not at_once or label_smoothing > 0, width)
    launch(logits_gradient_kernel, images * tiles, (task,), (way.constants, form), way.config.warps)
