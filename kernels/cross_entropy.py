"""Stage one: softmax cross-entropy of every pixel, with the statistics the solver starts from."""

import functools
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import LogitsConfig, Table, pixel_config, programs, row_config
from .launch import kernel, launch
from .layout import merged, padded, pixel_offsets, unit_of
from .numerics import LN2, LOG2E
from .workspace import BINS, WORDS, poison, publish, tally

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the running maximum starts here: −inf − (−inf) would be NaN


@triton.jit
def within_classes(inside, c, COUNT: tl.constexpr, CLASSES: tl.constexpr):
    """The mask of class c, of a chunk of COUNT classes: nothing to test where the chunks fit exactly."""
    if CLASSES % COUNT:
        inside = inside & (tl.zeros(inside.shape, tl.int32) + c < CLASSES)
    return inside


@triton.jit
def load_classes(
    logits, offsets, first, class_stride, inside, COUNT: tl.constexpr, CLASSES: tl.constexpr, EVICT: tl.constexpr
):
    """A tuple of COUNT class vectors in float32, from class `first` on; classes past the last one read as −inf.

    A tuple and not a [COUNT, BLOCK] tile: no padding to a power of two, and a third of the instructions.
    """
    rows = ()
    for i in tl.static_range(COUNT):
        there = within_classes(inside, first + i, COUNT, CLASSES)
        # 64-bit from the class on: C·L may exceed 2^31.
        row = logits + tl.cast(first + i, tl.int64) * class_stride
        x = tl.load(row + offsets, mask=there, other=float("-inf"), eviction_policy=EVICT)
        rows = rows + (x.to(tl.float32),)
    return rows


@triton.jit
def load_row(logits, offsets, first, inside, COUNT: tl.constexpr, CLASSES: tl.constexpr, EVICT: tl.constexpr):
    """(float32 tile, classes, mask): COUNT classes of every pixel from class `first` on, where they lie side by side.

    COUNT is a power of two; what lies past the last class reads as −inf.
    """
    classes = (first + tl.arange(0, COUNT))[None, :]
    there = inside[:, None] & (classes < CLASSES)
    x = tl.load(logits + offsets[:, None] + classes, mask=there, other=float("-inf"), eviction_policy=EVICT)
    return x.to(tl.float32), classes, there


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
def class_weight(weight, c, CLASSES: tl.constexpr):
    """v_c; 1 without weights, and 0 or 1 past the last class, where nobody uses it."""
    v = 1.0
    if weight is not None:
        v = tl.load(weight + c, mask=c < CLASSES, other=0.0).to(tl.float32)
    return v


@triton.jit
def sum_of_weights(weight, CLASSES: tl.constexpr):
    """Σ_k v_k."""
    total = 0.0
    if weight is not None:
        for c in range(CLASSES):
            total += tl.load(weight + c).to(tl.float32)
    else:
        total += CLASSES
    return total


@triton.jit
def softmax_of_pixels(
    logits,
    weight,
    offsets,
    x_label,
    class_stride,
    inside,
    CLASSES: tl.constexpr,
    SMOOTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """max x, Σ exp(x − max), and with SMOOTH Σ_k v_k·(x_k − x_label), of every pixel, from one read of its logits."""
    peak = tl.full(inside.shape, LOWEST, tl.float32)
    total = tl.zeros(inside.shape, tl.float32)
    dot = tl.zeros(inside.shape, tl.float32)
    for first in range(0, CLASSES, CHUNK):
        xs = load_classes(logits, offsets, first, class_stride, inside, CHUNK, CLASSES, "")
        peak, total = add_to_softmax(peak, total, xs, CHUNK)
        if SMOOTH:
            for i in tl.static_range(CHUNK):
                v = class_weight(weight, first + i, CLASSES)
                dot += tl.where(within_classes(inside, first + i, CHUNK, CLASSES), v * (xs[i] - x_label), 0.0)
    return peak, total, dot


@triton.jit
def softmax_of_rows(
    logits, weight, offsets, x_label, inside, CLASSES: tl.constexpr, SMOOTH: tl.constexpr, CHUNK: tl.constexpr
):
    """`softmax_of_pixels` where the classes of a pixel lie side by side.

    Each of the CHUNK lanes of a row keeps a softmax of its own; they are put together once.
    """
    x_label = x_label[:, None]
    peak = tl.zeros([inside.shape[0], CHUNK], tl.float32) + LOWEST
    total = peak * 0.0
    dot = peak * 0.0
    for first in range(0, CLASSES, CHUNK):
        x, classes, there = load_row(logits, offsets, first, inside, CHUNK, CLASSES, "")
        before = peak
        peak = tl.maximum(peak, x)
        total = total * tl.exp2((before - peak) * LOG2E) + tl.exp2((x - peak) * LOG2E)
        if SMOOTH:
            dot += tl.where(there, class_weight(weight, classes, CLASSES) * (x - x_label), 0.0)
    highest = tl.max(peak, 1)
    total = tl.sum(total * tl.exp2((peak - highest[:, None]) * LOG2E), 1)
    return highest, total, tl.sum(dot, 1)


@triton.jit
def write_losses(
    logits,
    target,
    weight,
    losses,
    labels,
    nll,
    workspace,
    program,
    programs_an_image,
    pixels,
    image_stride,
    class_stride,
    size_1,
    size_2,
    stride_0,
    stride_1,
    stride_2,
    target_image_stride,
    target_stride_0,
    target_stride_1,
    target_stride_2,
    ignore_index,
    smoothing,
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
):
    """The work of one program of `softmax_losses_kernel`, which says what it reads and writes."""
    image = (program // programs_an_image).to(tl.int64)
    PIXEL_UNIT: tl.constexpr = 1 if ROWS else UNIT
    pixels = pixels * PIXEL_UNIT
    size_2 = size_2 * PIXEL_UNIT
    class_stride = 1 if ROWS else class_stride * UNIT
    logits += image * image_stride * UNIT
    target += image * target_image_stride * PIXEL_UNIT

    maximum = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    histogram = tl.zeros([BINS], tl.int32)
    weight_sum = 0.0
    if SMOOTH:
        weight_sum = sum_of_weights(weight, CLASSES)

    for tile in range(program % programs_an_image, tl.cdiv(pixels, BLOCK), programs_an_image):
        start = tile * BLOCK
        within = tl.arange(0, BLOCK)
        inside = start + within < pixels
        base, offsets = pixel_offsets(
            start, within, size_1, size_2, stride_0 * UNIT, stride_1 * UNIT, stride_2 * UNIT, ADJACENT, LEVELS
        )
        tile_logits = logits + base
        base, target_offsets = pixel_offsets(
            start,
            within,
            size_1,
            size_2,
            target_stride_0 * PIXEL_UNIT,
            target_stride_1 * PIXEL_UNIT,
            target_stride_2 * PIXEL_UNIT,
            OTHER_ADJACENT,
            LEVELS,
        )
        label = tl.load(target + base + target_offsets, mask=inside, other=0).to(tl.int64)
        valid = inside & (label != ignore_index)
        good = (label >= 0) & (label < CLASSES)
        label = tl.where(good, label, 0)
        # One more load a pixel, of a line that is needed anyway, for a comparison less a class.
        x_label = tl.load(tile_logits + label * class_stride + offsets, mask=inside, other=0.0).to(tl.float32)

        if ROWS:
            peak, total, dot = softmax_of_rows(tile_logits, weight, offsets, x_label, inside, CLASSES, SMOOTH, CHUNK)
        else:
            peak, total, dot = softmax_of_pixels(
                tile_logits, weight, offsets, x_label, class_stride, inside, CLASSES, SMOOTH, CHUNK
            )
        # log Σ exp x − x_label, from a sum that is at least 1: never negative but for the rounding of log2.
        minus_log_softmax = tl.log2(total) * LN2 + (peak - x_label)
        minus_log_softmax = tl.maximum(minus_log_softmax, 0.0, propagate_nan=tl.PropagateNan.ALL)
        loss = minus_log_softmax
        if weight is not None:
            loss *= tl.load(weight + label, mask=inside, other=0.0).to(tl.float32)
        if SMOOTH:
            # Never negative, but for the rounding of this difference.
            spread = tl.maximum(weight_sum * minus_log_softmax - dot, 0.0, propagate_nan=tl.PropagateNan.ALL)
            loss = (1 - smoothing) * loss + (smoothing / CLASSES) * spread
        loss = poison(loss, good)

        out = image * pixels + start + within
        tl.store(losses + out, tl.where(valid, loss, -1.0), mask=inside)
        tl.store(labels + out, label.to(labels.dtype.element_ty), mask=inside)
        if nll is not None:
            tl.store(nll + out, minus_log_softmax, mask=inside)
        maximum, count, histogram = tally(loss, valid, maximum, count, histogram)

    segment = image if PER_IMAGE else image * 0
    publish(workspace + segment * WORDS, maximum, count, histogram)


@kernel
def softmax_losses_kernel(
    logits,
    target,
    weight,
    losses,
    labels,
    nll,
    workspace,
    programs_an_image: tl.int32,
    pixels: tl.int32,
    image_stride: tl.int64,
    class_stride: tl.int64,
    size_1: tl.int32,
    size_2: tl.int32,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    target_image_stride: tl.int64,
    target_stride_0: tl.int64,
    target_stride_1: tl.int64,
    target_stride_2: tl.int64,
    ignore_index: tl.int64,
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
):
    """Losses, labels and statistics of the pixels of an image; grid N × programs, which stride over the tiles.

    Reads   logits (N, C, *spatial) once, strided, in any float type; target (N, *spatial) once, any integer type;
            weight (C,) or None.
    Writes  losses (N, L) float32: ℓ, −1 where ignored, NaN where the label or a logit is bad; labels (N, L), a label
            inside [0, C); nll (N, L) float32 or None, −log softmax of the label;
            workspace: maximum, count and histogram of the segment, BINS + 2 atomics a program.
    Bytes   C·sizeof(logit) + sizeof(target) read, 5 written a pixel (C ≤ 256; 6 above; 4 more with nll).

    ROWS: the classes of a pixel lie side by side, as in channels_last logits, and are loaded so. ADJACENT: the pixels
    of the logits do, OTHER_ADJACENT: those of the target.
    Sizes and strides, but for size_1, are in units of UNIT elements (with ROWS those of the logits alone), see
    `layout.unit_of`.
    """
    write_losses(
        logits,
        target,
        weight,
        losses,
        labels,
        nll,
        workspace,
        tl.program_id(0),
        programs_an_image,
        pixels,
        image_stride,
        class_stride,
        size_1,
        size_2,
        stride_0,
        stride_1,
        stride_2,
        target_image_stride,
        target_stride_0,
        target_stride_1,
        target_stride_2,
        ignore_index,
        smoothing,
        CLASSES,
        UNIT,
        LEVELS,
        ADJACENT,
        OTHER_ADJACENT,
        ROWS,
        CHUNK,
        BLOCK,
        PER_IMAGE,
        SMOOTH,
    )


def classes_adjacent(logits: Tensor) -> bool:
    """Whether the classes of a pixel lie side by side and its neighbours don't: channels_last, (N, C)."""
    return logits.stride(1) == 1 and _classes_adjacent(logits.shape, logits.stride())


def _classes_adjacent(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return strides[1] == 1 and shape[1] > 1 and merged(shape[2:], (strides[2:],)).strides[0][-1] != 1


class Walk(NamedTuple):
    """How a kernel goes over logits and a tensor of the same pixels: target, or gradient."""

    config: LogitsConfig
    adjacent_classes: bool
    """As `classes_adjacent` says of the logits."""
    numbers: tuple[int, ...]
    """pixels; of the logits image_stride, class_stride, size_1, size_2, stride_0, stride_1, stride_2; then the strides
    of the other tensor."""
    constants: dict[str, Any]


def walk(logits: Tensor, other: Tensor, table: Table) -> Walk:
    """For logits (N, C, *spatial) and the target (N, *spatial), or a gradient with strides like those of the logits."""
    return _walk(logits.shape, logits.stride(), other.stride(), logits.element_size(), table)


@functools.lru_cache(maxsize=1024)
def _walk(
    shape: tuple[int, ...], strides: tuple[int, ...], other_strides: tuple[int, ...], itemsize: int, table: Table
) -> Walk:
    classes, spatial = shape[1], shape[2:]
    pixels = math.prod(spatial)
    sizes, (steps, other_steps) = merged(spatial, (strides[2:], other_strides[-len(spatial) :]))
    adjacent, other_adjacent = steps[-1] == 1, other_steps[-1] == 1
    of_logits = (strides[0], *steps[: len(steps) - adjacent])
    of_other = (other_strides[0], *other_steps[: len(steps) - other_adjacent])
    is_grad = len(other_strides) == len(strides)
    adjacent_classes = _classes_adjacent(shape, strides)
    rows = adjacent_classes and classes > table.rows.above
    if rows:
        unit, pixel_unit = unit_of(*of_logits, *(of_other if is_grad else ())), 1
        config = row_config(table, classes, unit, itemsize)
    else:
        of_classes = (strides[1], other_strides[1]) if is_grad else (strides[1],)
        unit = pixel_unit = unit_of(pixels, sizes[-1], *of_classes, *of_logits, *of_other)
        config = pixel_config(table, classes, adjacent_classes)
    other_unit = unit if is_grad else pixel_unit
    numbers = (
        pixels // pixel_unit,
        strides[0] // unit,
        strides[1] // unit,
        sizes[-2] if len(sizes) > 1 else 1,
        sizes[-1] // pixel_unit,
        *(step // unit for step in padded(steps)),
        other_strides[0] // other_unit,
        *((other_strides[1] // other_unit,) if is_grad else ()),
        *(step // other_unit for step in padded(other_steps)),
    )
    constants = {
        "CLASSES": classes,
        "UNIT": unit,
        "LEVELS": len(sizes),
        "ADJACENT": adjacent,
        "OTHER_ADJACENT": other_adjacent,
        "ROWS": rows,
        "CHUNK": config.chunk,
        "BLOCK": config.block,
    }
    return Walk(config, adjacent_classes, numbers, constants)


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
    table: Table,
) -> None:
    """Fill losses, labels, nll and workspace (zeroed by the caller) from logits (N, C, *spatial) and its target."""
    images, pixels = losses.shape
    way = walk(logits, target, table)
    programs_an_image = programs(pixels, images, way.config, logits.device)
    launch(
        softmax_losses_kernel,
        images * programs_an_image,
        (logits, target, weight, losses, labels, nll, workspace),
        (programs_an_image, *way.numbers, ignore_index, label_smoothing),
        way.constants | {"PER_IMAGE": workspace.numel() > WORDS.value + 1, "SMOOTH": label_smoothing > 0},
        way.config.warps,
    )
