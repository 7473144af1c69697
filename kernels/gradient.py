"""Stage three: the gradient, w*·grad_output·∂ℓ/∂logits, straight into the gradient buffer."""

import triton
import triton.language as tl
from torch import Tensor

from .configs import Table
from .cross_entropy import (
    class_weight,
    load_classes,
    load_row,
    softmax_of_pixels,
    softmax_of_rows,
    sum_of_weights,
    walk,
    within_classes,
)
from .launch import kernel, launch
from .layout import pixel_offsets
from .numerics import LOG2E
from .weights import relative_weight, segment_scale

FAR = tl.constexpr(64.0)
"""Above this loss, ℓ as a float32 is too coarse (2^-24·ℓ) to get the softmax from; it is computed afresh."""
LAST = tl.constexpr("evict_first")
"""Eviction policy of what nobody reads again before the cache has turned over: the logits, and the gradient."""


@kernel
def logits_gradient_kernel(
    logits,
    losses,
    labels,
    nll,
    weight,
    solution,
    grad_output,
    grad,
    tiles: tl.int32,
    grad_output_stride: tl.int64,
    segments: tl.int32,
    pixels: tl.int32,
    image_stride: tl.int64,
    class_stride: tl.int64,
    size_1: tl.int32,
    size_2: tl.int32,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    grad_image_stride: tl.int64,
    grad_class_stride: tl.int64,
    grad_stride_0: tl.int64,
    grad_stride_1: tl.int64,
    grad_stride_2: tl.int64,
    smoothing: tl.float32,
    CLASSES: tl.constexpr,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    ADJACENT: tl.constexpr,
    OTHER_ADJACENT: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    SMOOTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """∂value/∂logits of the pixels of an image; grid N × tiles, in reverse: what was read last is in the cache.

    With a = (1−ε)·v_y + (ε/C)·Σ_k v_k: w*·grad_output·[a·softmax_c − (1−ε)·v_y·[c = y] − (ε/C)·v_c].

    Reads   logits (N, C, *spatial) once; losses, labels, and, where C > CHUNK or with ROWS, nll (there a tile with a
            loss above FAR reads its logits twice); the solution; grad_output float32, () or (S,); weight (C,) or None.
    Writes  grad (N, C, *spatial), in the type of the logits, every element once, rounded once, multiplied in float32.
    Bytes   C·sizeof(logit) + 5 read, C·sizeof(logit) written a pixel.

    ROWS, ADJACENT and UNIT as in `softmax_losses_kernel`. WIDTH: 0, or without ROWS for classes that lie side by side
    in grad the next power of two.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    segment = image if PER_IMAGE else image * 0
    pivot, drop, exponent, scale = segment_scale(solution, grad_output, grad_output_stride, segments, segment)
    PIXEL_UNIT: tl.constexpr = 1 if ROWS else UNIT
    pixels = pixels * PIXEL_UNIT
    size_2 = size_2 * PIXEL_UNIT
    class_stride = 1 if ROWS else class_stride * UNIT
    grad_class_stride = 1 if ROWS else grad_class_stride * UNIT

    start = program % tiles * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < pixels
    saved = image * pixels + start + within
    loss = tl.load(losses + saved, mask=inside, other=-1.0)
    label = tl.load(labels + saved, mask=inside, other=0).to(tl.int32)
    ignored = loss == -1.0
    scaled = relative_weight(loss, pivot, drop, exponent) * scale

    hit = scaled
    if weight is not None:
        hit *= tl.load(weight + label, mask=inside, other=0.0).to(tl.float32)
    spread = hit
    if SMOOTH:
        hit *= 1 - smoothing
        scaled *= smoothing / CLASSES
        spread = hit + scaled * sum_of_weights(weight, CLASSES)

    base, offsets = pixel_offsets(
        start, within, size_1, size_2, stride_0 * UNIT, stride_1 * UNIT, stride_2 * UNIT, ADJACENT, LEVELS
    )
    tile_logits = logits + image * image_stride * UNIT + base
    base, grad_offsets = pixel_offsets(
        start,
        within,
        size_1,
        size_2,
        grad_stride_0 * UNIT,
        grad_stride_1 * UNIT,
        grad_stride_2 * UNIT,
        OTHER_ADJACENT,
        LEVELS,
    )
    tile_grad = grad + image * grad_image_stride * UNIT + base

    if CLASSES <= CHUNK and not ROWS:
        # All classes are at hand: the softmax is as precise as the logits, and nothing was saved for it.
        xs = load_classes(tile_logits, offsets, 0, class_stride, inside, CLASSES, CLASSES, LAST)
        peak = xs[0]
        for i in tl.static_range(1, CLASSES):
            peak = tl.maximum(peak, xs[i])
        exponentials = ()
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(CLASSES):
            exponentials = exponentials + (tl.exp2((xs[i] - peak) * LOG2E),)
            total += exponentials[i]
        spread = spread / total
        ds = ()
        for i in tl.static_range(CLASSES):
            d = exponentials[i] * spread - tl.where(label == i, hit, 0.0)
            if SMOOTH:
                d -= scaled * class_weight(weight, i, CLASSES)
            if WIDTH:
                ds = ds + (tl.where(ignored, 0.0, d),)
            else:
                store_class(tile_grad + i * grad_class_stride, grad_offsets, d, ignored, inside)
        if WIDTH:
            classes = tl.arange(0, WIDTH)[None, :]
            tl.store(
                tile_grad + grad_offsets[:, None] + classes,
                side_by_side(ds, CLASSES, WIDTH).to(grad.dtype.element_ty),
                mask=inside[:, None] & (classes < CLASSES),
                eviction_policy=LAST,
            )
    else:
        # log2 softmax_c = (x_c − anchor)·log2 e − rest
        anchor = tl.load(tile_logits + label.to(tl.int64) * class_stride + offsets, mask=inside, other=0.0)
        anchor = anchor.to(tl.float32)
        far = tl.load(nll + saved, mask=inside, other=0.0)
        rest = far * LOG2E
        if tl.max(tl.where(ignored, 0.0, far), 0) > FAR:
            if ROWS:
                anchor, total, _dot = softmax_of_rows(
                    tile_logits, weight, offsets, anchor, inside, CLASSES, False, CHUNK
                )
            else:
                anchor, total, _dot = softmax_of_pixels(
                    tile_logits, weight, offsets, anchor, class_stride, inside, CLASSES, False, CHUNK
                )
            rest = tl.log2(total)
        for first in range(0, CLASSES, CHUNK):
            if ROWS:
                x, classes, there = load_row(tile_logits, offsets, first, inside, CHUNK, CLASSES, LAST)
                d = spread[:, None] * tl.exp2((x - anchor[:, None]) * LOG2E - rest[:, None])
                d -= tl.where(label[:, None] == classes, hit[:, None], 0.0)
                if SMOOTH:
                    d -= scaled[:, None] * class_weight(weight, classes, CLASSES)
                d = tl.where(ignored[:, None], 0.0, d).to(grad.dtype.element_ty)
                tl.store(tile_grad + grad_offsets[:, None] + classes, d, mask=there, eviction_policy=LAST)
            else:
                xs = load_classes(tile_logits, offsets, first, class_stride, inside, CHUNK, CLASSES, LAST)
                for i in tl.static_range(CHUNK):
                    c = first + i
                    d = spread * tl.exp2((xs[i] - anchor) * LOG2E - rest) - tl.where(label == c, hit, 0.0)
                    if SMOOTH:
                        d -= scaled * class_weight(weight, c, CLASSES)
                    row = tile_grad + tl.cast(c, tl.int64) * grad_class_stride
                    store_class(row, grad_offsets, d, ignored, within_classes(inside, c, CHUNK, CLASSES))


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
def store_class(grad, offsets, d, ignored, inside):
    """One class of a tile of pixels, rounded once; 0 where ignored (there d may be NaN)."""
    tl.store(grad + offsets, tl.where(ignored, 0.0, d).to(grad.dtype.element_ty), mask=inside, eviction_policy=LAST)


def logits_gradient(
    logits: Tensor,
    losses: Tensor,
    labels: Tensor,
    nll: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    solution: Tensor,
    grad_output: Tensor,
    grad: Tensor,
    table: Table,
) -> None:
    """Fill grad (N, C, *spatial) from what `softmax_losses` and `select` left; nll is the losses if they are plain.

    Where the classes of a pixel lie side by side in the logits, they do in grad.
    """
    images, pixels = losses.shape
    segments = solution.shape[1]
    way = walk(logits, grad, table)
    width = 1 << (logits.shape[1] - 1).bit_length() if way.adjacent_classes and not way.config.rows else 0
    tiles = -(-pixels // way.config.block)
    launch(
        logits_gradient_kernel,
        images * tiles,
        (logits, losses, labels, nll, weight, solution, grad_output, grad),
        (
            tiles,
            grad_output.stride(0) if grad_output.ndim else 0,
            segments,
            *way.numbers,
            label_smoothing,
        ),
        way.constants | {"PER_IMAGE": segments > 1, "SMOOTH": label_smoothing > 0, "WIDTH": width},
        way.config.warps,
    )
