"""Stage three: the gradient, w*·grad_output·∂ℓ/∂logits, straight into the gradient buffer."""

import triton
import triton.language as tl
from torch import Tensor

from .configs import pixel_config, unit_of
from .cross_entropy import LOWEST, add_to_softmax, class_weight, load_classes, sum_of_weights, within_classes
from .numerics import LOG2E
from .weights import relative_weight, segment_scale

FAR = tl.constexpr(64.0)
"""Above this loss, ℓ as a float32 is too coarse (2^-24·ℓ) to get the softmax from; it is computed afresh."""

DYNAMIC = (
    "tiles",
    "grad_output_stride",
    "segments",
    "pixels",
    "image_stride",
    "class_stride",
    "grad_image_stride",
    "grad_class_stride",
)


@triton.jit
def softmax_base(tile_logits, offsets, class_stride, inside, CLASSES: tl.constexpr, CHUNK: tl.constexpr):
    """peak and log Σ exp(x − peak) of every pixel, from another read of the logits."""
    peak = tl.full(inside.shape, LOWEST, tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    for first in range(0, CLASSES, CHUNK):
        xs = load_classes(tile_logits, offsets, first, class_stride, inside, CHUNK, CLASSES)
        peak, total = add_to_softmax(peak, total, xs, CHUNK)
    return peak, tl.log2(total)


@triton.jit(do_not_specialize=DYNAMIC)
def logits_gradient_kernel(
    logits,
    losses,
    labels,
    nll,
    weight,
    solution,
    grad_output,
    grad,
    tiles,
    grad_output_stride,
    segments,
    pixels,
    image_stride,
    class_stride,
    pixel_stride,
    grad_image_stride,
    grad_class_stride,
    grad_pixel_stride,
    smoothing,
    CLASSES: tl.constexpr,
    UNIT: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """∂value/∂logits of the pixels of an image; grid N × tiles, in reverse: what was read last is in the cache.

    With a = (1−ε)·v_y + (ε/C)·Σ_k v_k: w*·grad_output·[a·softmax_c − (1−ε)·v_y·[c = y] − (ε/C)·v_c].

    Reads   logits (N, C, L) once (a tile with a loss above FAR, where C > CHUNK, twice); losses, labels, and nll
            where C > CHUNK; the solution; grad_output float32, () or (S,); weight (C,).
    Writes  grad (N, C, L), in the type of the logits, every element once, rounded once, multiplied in float32.
    Bytes   C·sizeof(logit) + 5 read, C·sizeof(logit) written a pixel.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    segment = image if PER_IMAGE else image * 0
    pivot, drop, exponent, scale = segment_scale(solution, grad_output, grad_output_stride, segments, segment)
    pixels = pixels * UNIT
    class_stride = tl.cast(class_stride, tl.int64) * UNIT
    grad_class_stride = tl.cast(grad_class_stride, tl.int64) * UNIT

    start = program % tiles * BLOCK
    within = tl.arange(0, BLOCK)
    inside = start + within < pixels
    saved = image * pixels + start + within
    loss = tl.load(losses + saved, mask=inside, other=-1.0)
    label = tl.load(labels + saved, mask=inside, other=0).to(tl.int32)
    ignored = loss == -1.0
    scaled = relative_weight(loss, pivot, drop, exponent) * scale

    hit = scaled
    if HAS_WEIGHT:
        hit *= tl.load(weight + label, mask=inside, other=0.0).to(tl.float32)
    spread = hit
    if SMOOTH:
        hit *= 1 - smoothing
        scaled *= smoothing / CLASSES
        spread = hit + scaled * sum_of_weights(weight, HAS_WEIGHT, CLASSES)

    offsets = within * pixel_stride
    tile_logits = logits + image * image_stride * UNIT + tl.cast(start, tl.int64) * pixel_stride
    grad_offsets = within * grad_pixel_stride
    tile_grad = grad + image * grad_image_stride * UNIT + tl.cast(start, tl.int64) * grad_pixel_stride

    if CLASSES <= CHUNK:
        # All classes are at hand: the softmax is as precise as the logits, and nothing was saved for it.
        xs = load_classes(tile_logits, offsets, 0, class_stride, inside, CLASSES, CLASSES)
        peak = xs[0]
        for i in tl.static_range(1, CLASSES):
            peak = tl.maximum(peak, xs[i])
        exponentials = ()
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(CLASSES):
            exponentials = exponentials + (tl.exp2((xs[i] - peak) * LOG2E),)
            total += exponentials[i]
        spread = spread / total
        for i in tl.static_range(CLASSES):
            d = exponentials[i] * spread - tl.where(label == i, hit, 0.0)
            if SMOOTH:
                d -= scaled * class_weight(weight, i, HAS_WEIGHT, CLASSES)
            row = tile_grad + tl.cast(i, tl.int64) * grad_class_stride
            tl.store(row + grad_offsets, tl.where(ignored, 0.0, d).to(grad.dtype.element_ty), mask=inside)
    else:
        # log2 softmax_c = (x_c − base)·log2 e − rest
        base = tl.load(tile_logits + label.to(tl.int64) * class_stride + offsets, mask=inside, other=0.0)
        base = base.to(tl.float32)
        far = tl.load(nll + saved, mask=inside, other=0.0)
        rest = far * LOG2E
        if tl.max(tl.where(ignored, 0.0, far), 0) > FAR:
            base, rest = softmax_base(tile_logits, offsets, class_stride, inside, CLASSES, CHUNK)
        for first in range(0, CLASSES, CHUNK):
            xs = load_classes(tile_logits, offsets, first, class_stride, inside, CHUNK, CLASSES)
            for i in tl.static_range(CHUNK):
                c = first + i
                d = spread * tl.exp2((xs[i] - base) * LOG2E - rest) - tl.where(label == c, hit, 0.0)
                if SMOOTH:
                    d -= scaled * class_weight(weight, c, HAS_WEIGHT, CLASSES)
                row = tile_grad + tl.cast(c, tl.int64) * grad_class_stride
                there = within_classes(inside, c, CHUNK, CLASSES)
                tl.store(row + grad_offsets, tl.where(ignored, 0.0, d).to(grad.dtype.element_ty), mask=there)


def logits_gradient(
    logits: Tensor,
    losses: Tensor,
    labels: Tensor,
    nll: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    solution: Tensor,
    grad_output: Tensor,
    grad: Tensor,
) -> None:
    """Fill grad (N, C, L) from what `softmax_losses` and `select` left; nll is the losses if they are plain."""
    images, classes, pixels = logits.shape
    config = pixel_config(classes)
    unit = unit_of(logits, grad)
    segments = solution.shape[1]
    tiles = -(-pixels // config.block)
    logits_gradient_kernel[(images * tiles,)](
        logits,
        losses,
        labels,
        nll,
        weight,
        solution,
        grad_output,
        grad,
        tiles,
        grad_output.stride(0) if grad_output.ndim else 0,
        segments,
        pixels // unit,
        logits.stride(0) // unit,
        logits.stride(1) // unit,
        logits.stride(2),
        grad.stride(0) // unit,
        grad.stride(1) // unit,
        grad.stride(2),
        label_smoothing,
        CLASSES=classes,
        UNIT=unit,
        PER_IMAGE=segments > 1,
        HAS_WEIGHT=weight is not None,
        SMOOTH=label_smoothing > 0,
        CHUNK=config.chunk,
        BLOCK=config.block,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )
