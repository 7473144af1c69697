"""Stage one: softmax cross-entropy of every pixel, with the statistics the solver starts from."""

import triton
import triton.language as tl
from torch import Tensor

from .configs import pixel_config, programs, unit_of
from .numerics import LN2, LOG2E
from .workspace import BINS, WORDS, poison, publish, tally

# Sizes and options change from call to call: no kernel is compiled anew for their values.
DYNAMIC = (
    "programs_a_row",
    "pixels",
    "image_stride",
    "class_stride",
    "target_image_stride",
    "ignore_index",
)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the running maximum starts here: −inf − (−inf) would be NaN


@triton.jit
def within_classes(inside, c, COUNT: tl.constexpr, CLASSES: tl.constexpr):
    """The mask of class c, of a chunk of COUNT classes: nothing to test where the chunks fit exactly."""
    if CLASSES % COUNT:
        inside = inside & (tl.zeros(inside.shape, tl.int32) + c < CLASSES)
    return inside


@triton.jit
def load_classes(logits, offsets, first, class_stride, inside, COUNT: tl.constexpr, CLASSES: tl.constexpr):
    """A tuple of COUNT class vectors in float32, from class `first` on; classes past the last one read as −inf.

    A tuple and not a [COUNT, BLOCK] tile: no padding to a power of two, and a third of the instructions.
    """
    rows = ()
    for i in tl.static_range(COUNT):
        there = within_classes(inside, first + i, COUNT, CLASSES)
        # 64-bit from the class on: C·L may exceed 2^31.
        row = logits + tl.cast(first + i, tl.int64) * class_stride
        rows = rows + (tl.load(row + offsets, mask=there, other=float("-inf")).to(tl.float32),)
    return rows


@triton.jit
def add_to_softmax(peak, total, xs, COUNT: tl.constexpr):
    """max x and Σ exp(x − max) with COUNT more classes: the step of the online softmax."""
    before = peak
    for i in tl.static_range(COUNT):
        peak = tl.maximum(peak, xs[i])
    total = total * tl.exp2((before - peak) * LOG2E)
    for i in tl.static_range(COUNT):
        total += tl.exp2((xs[i] - peak) * LOG2E)
    return peak, total


@triton.jit
def class_weight(weight, c, HAS_WEIGHT: tl.constexpr, CLASSES: tl.constexpr):
    """v_c; 1 without weights, and 0 or 1 past the last class, where nobody uses it."""
    v = 1.0
    if HAS_WEIGHT:
        v = tl.load(weight + c, mask=c < CLASSES, other=0.0).to(tl.float32)
    return v


@triton.jit
def sum_of_weights(weight, HAS_WEIGHT: tl.constexpr, CLASSES: tl.constexpr):
    """Σ_k v_k."""
    total = 0.0
    if HAS_WEIGHT:
        for c in range(CLASSES):
            total += tl.load(weight + c).to(tl.float32)
    else:
        total += CLASSES
    return total


@triton.jit(do_not_specialize=DYNAMIC)
def softmax_losses_kernel(
    logits,
    target,
    weight,
    losses,
    labels,
    nll,
    workspace,
    programs_a_row,
    pixels,
    image_stride,
    class_stride,
    pixel_stride,
    target_image_stride,
    target_pixel_stride,
    ignore_index,
    smoothing,
    CLASSES: tl.constexpr,
    UNIT: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SMOOTH: tl.constexpr,
    SAVE_NLL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses, labels and statistics of the pixels of an image; grid N × programs, which stride over the tiles.

    Reads   logits (N, C, L) once, strided, in any float type; target (N, L) once, any integer type; weight (C,).
    Writes  losses (N, L) float32: ℓ, −1 where ignored, NaN where the label or a logit is bad; labels (N, L), a label
            inside [0, C); nll (N, L) float32, −log softmax of the label, only with SAVE_NLL;
            workspace: maximum, count and histogram of the segment, BINS + 2 atomics a program.
    Bytes   C·sizeof(logit) + sizeof(target) read, 5 written a pixel (C ≤ 256; 6 above; 4 more with SAVE_NLL).

    pixels, image_stride and class_stride are in units of UNIT elements, see `configs.unit_of`.
    """
    image = (tl.program_id(0) // programs_a_row).to(tl.int64)
    pixels = pixels * UNIT
    class_stride = tl.cast(class_stride, tl.int64) * UNIT
    logits += image * image_stride * UNIT
    target += image * target_image_stride
    row = image * pixels

    maximum = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    histogram = tl.zeros([BINS], tl.int32)
    weight_sum = 0.0
    if SMOOTH:
        weight_sum = sum_of_weights(weight, HAS_WEIGHT, CLASSES)

    for tile in range(tl.program_id(0) % programs_a_row, tl.cdiv(pixels, BLOCK), programs_a_row):
        start = tile * BLOCK
        within = tl.arange(0, BLOCK)
        inside = start + within < pixels
        offsets = within * pixel_stride
        tile_logits = logits + tl.cast(start, tl.int64) * pixel_stride

        label = tl.load(
            target + tl.cast(start, tl.int64) * target_pixel_stride + within * target_pixel_stride, mask=inside, other=0
        ).to(tl.int64)
        valid = inside & (label != ignore_index)
        good = (label >= 0) & (label < CLASSES)
        label = tl.where(good, label, 0)
        x_label = tl.load(tile_logits + label * class_stride + offsets, mask=inside, other=0.0).to(tl.float32)

        peak = tl.full([BLOCK], LOWEST, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        dot = tl.zeros([BLOCK], tl.float32)  # Σ_k v_k·(x_k − x_label)
        for first in range(0, CLASSES, CHUNK):
            xs = load_classes(tile_logits, offsets, first, class_stride, inside, CHUNK, CLASSES)
            peak, total = add_to_softmax(peak, total, xs, CHUNK)
            if SMOOTH:
                for i in tl.static_range(CHUNK):
                    v = class_weight(weight, first + i, HAS_WEIGHT, CLASSES)
                    dot += tl.where(within_classes(inside, first + i, CHUNK, CLASSES), v * (xs[i] - x_label), 0.0)

        # log Σ exp x − x_label, from a sum that is at least 1: never negative but for the rounding of log2.
        minus_log_softmax = tl.log2(total) * LN2 + (peak - x_label)
        minus_log_softmax = tl.maximum(minus_log_softmax, 0.0, propagate_nan=tl.PropagateNan.ALL)
        loss = minus_log_softmax
        if HAS_WEIGHT:
            loss *= tl.load(weight + label, mask=inside, other=0.0).to(tl.float32)
        if SMOOTH:
            # Never negative, but for the rounding of this difference.
            spread = tl.maximum(weight_sum * minus_log_softmax - dot, 0.0, propagate_nan=tl.PropagateNan.ALL)
            loss = (1 - smoothing) * loss + (smoothing / CLASSES) * spread
        loss = poison(loss, good)

        out = row + start + within
        tl.store(losses + out, tl.where(valid, loss, -1.0), mask=inside)
        tl.store(labels + out, label.to(labels.dtype.element_ty), mask=inside)
        if SAVE_NLL:
            tl.store(nll + out, minus_log_softmax, mask=inside)
        maximum, count, histogram = tally(loss, valid, maximum, count, histogram)

    segment = image if PER_IMAGE else image * 0
    publish(workspace + segment * WORDS, maximum, count, histogram)


def softmax_losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    losses: Tensor,
    labels: Tensor,
    nll: Tensor | None,
    workspace: Tensor,
) -> None:
    """Fill losses, labels, nll and workspace (zeroed by the caller) from logits (N, C, L) and target (N, L)."""
    images, classes, pixels = logits.shape
    config = pixel_config(classes)
    unit = unit_of(logits)
    programs_a_row = programs(pixels, images, config, logits.device)
    softmax_losses_kernel[(images * programs_a_row,)](
        logits,
        target,
        weight,
        losses,
        labels,
        nll,
        workspace,
        programs_a_row,
        pixels // unit,
        logits.stride(0) // unit,
        logits.stride(1) // unit,
        logits.stride(2),
        target.stride(0),
        target.stride(1),
        ignore_index,
        label_smoothing,
        CLASSES=classes,
        UNIT=unit,
        PER_IMAGE=workspace.numel() > WORDS.value + 1,
        HAS_WEIGHT=weight is not None,
        SMOOTH=label_smoothing > 0,
        SAVE_NLL=nll is not None,
        CHUNK=config.chunk,
        BLOCK=config.block,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )
