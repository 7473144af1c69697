"""The softmax of the pixels of a tile, and what class weights and smoothing add to it."""

import triton
import triton.language as tl

from .logits import load_classes, load_row, within_classes
from .numerics import LN2, LOG2E, rounded

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the running maximum starts here: −inf − (−inf) would be NaN


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
def softmax_of_tile(tile, weight, x_label, SMOOTH: tl.constexpr, C: tl.constexpr):
    """max x, Σ exp(x − max), and with SMOOTH Σ_k v_k·(x_k − x_label), of every pixel, from one read of its logits."""
    if C.rows:
        peak, total, dot = softmax_of_rows(tile, weight, x_label, SMOOTH, C)
    else:
        peak, total, dot = softmax_of_pixels(tile, weight, x_label, SMOOTH, C)
    return peak, total, dot


@triton.jit
def softmax_of_pixels(tile, weight, x_label, SMOOTH: tl.constexpr, C: tl.constexpr):
    """`softmax_of_tile` class by class."""
    CLASSES: tl.constexpr = C.classes
    CHUNK: tl.constexpr = C.chunk
    peak = tl.full(tile.inside.shape, LOWEST, tl.float32)
    total = tl.zeros(tile.inside.shape, tl.float32)
    dot = tl.zeros(tile.inside.shape, tl.float32)
    for first in range(0, CLASSES, CHUNK):
        xs = load_classes(tile, first, CHUNK, CLASSES, "")
        peak, total = add_to_softmax(peak, total, xs, CHUNK)
        if SMOOTH:
            for i in tl.static_range(CHUNK):
                v = class_weight(weight, first + i, CLASSES)
                dot += tl.where(within_classes(tile.inside, first + i, CHUNK, CLASSES), v * (xs[i] - x_label), 0.0)
    return peak, total, dot


@triton.jit
def softmax_of_rows(tile, weight, x_label, SMOOTH: tl.constexpr, C: tl.constexpr):
    """`softmax_of_tile` where the classes of a pixel lie side by side.

    Each of the C.chunk lanes of a row keeps a softmax of its own; they are put together once.
    """
    CLASSES: tl.constexpr = C.classes
    CHUNK: tl.constexpr = C.chunk
    x_label = x_label[:, None]
    peak = tl.zeros([tile.inside.shape[0], CHUNK], tl.float32) + LOWEST
    total = peak * 0.0
    dot = peak * 0.0
    for first in range(0, CLASSES, CHUNK):
        x, classes, there = load_row(tile, first, CHUNK, CLASSES, "")
        before = peak
        peak = tl.maximum(peak, x)
        total = total * tl.exp2((before - peak) * LOG2E) + tl.exp2((x - peak) * LOG2E)
        if SMOOTH:
            dot += tl.where(there, class_weight(weight, classes, CLASSES) * (x - x_label), 0.0)
    highest = tl.max(peak, 1)
    total = tl.sum(rounded(total * tl.exp2((peak - highest[:, None]) * LOG2E)), 1)
    return highest, total, tl.sum(dot, 1)


@triton.jit
def minus_log_softmax(peak, total, x_label):
    """log Σ exp x − x_label, from a sum that is at least 1: never negative but for the rounding of log2."""
    return tl.maximum(tl.log2(total) * LN2 + (peak - x_label), 0.0, propagate_nan=tl.PropagateNan.ALL)
