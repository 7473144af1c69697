"""Stage three for losses: the optimal weights w*, times whatever comes down the graph."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import StreamConfig, fraction_bits, programs_a_row
from .launcher import launch, wait_for_launch_before
from .layout import unit_of
from .numerics import log2_ratio, to_fixed
from .solution import DROP, EXPONENT, PIVOT, STEP


class Scale(NamedTuple):
    """What the weights of a segment follow from."""

    solution: Tensor
    """(6, S) float32, of stage two"""
    grad_output: Tensor
    """() or (S,) float32"""
    grad_output_stride: tl.int64
    segments: tl.int32
    """S"""


class Task(NamedTuple):
    """What the kernel reads and writes, see there."""

    losses: Tensor
    scale: Scale
    weights: Tensor | None
    totals: Tensor | None
    length: tl.int32
    """n, in units (see `layout.unit_of`)."""
    fraction_bits: tl.int32
    programs: tl.int32
    """That share a segment."""


class Constants(NamedTuple):
    """What the kernel is compiled for."""

    unit: int
    block: int


class SegmentWeights(NamedTuple):
    """What the weights of the pixels of a segment follow from, see `lmp_triton.types.Pooling`."""

    pivot: Any
    drop: Any
    exponent: Any
    step: Any
    """τ·∂value/∂loss_s·grad_output_s"""


@triton.jit
def segment_weights(scale, segment):
    """Of one segment."""
    here = scale.solution + segment
    step = tl.load(here + STEP * scale.segments) * tl.load(scale.grad_output + segment * scale.grad_output_stride)
    return SegmentWeights(
        tl.load(here + PIVOT * scale.segments),
        tl.load(here + DROP * scale.segments),
        tl.load(here + EXPONENT * scale.segments),
        step,
    )


@triton.jit
def relative_weight(loss, weights):
    """w*/τ of a loss (Theorem 1): 1 above the pivot, 2^((q−1)·log2(ℓ/pivot) − drop) up to it, 0 if ignored."""
    pivot = weights.pivot
    below = tl.exp2(weights.exponent * log2_ratio(tl.minimum(loss, pivot), pivot) - weights.drop)
    below = tl.where(loss >= 0, below, 0.0)
    below = tl.where(pivot > 0, below, 0.0)  # apart: the interpreter cannot & a block with a float comparison
    return tl.where(loss > pivot, 1.0, below)


@triton.jit
def pixel_weights_kernel(task: Task, C: tl.constexpr):
    """w*·grad_output of every pixel, and Σ w*/τ of every segment; grid S × programs, which stride over the tiles.

    Reads   losses (S, n) float32, scale.
    Writes  weights (S, n), any float type, rounded once, or None; totals (S,) int64, fixed point, zeroed by the
            caller, one atomic a program, or None.
    Bytes   4 read, sizeof(weight) written a pixel.
    """
    wait_for_launch_before()
    BLOCK: tl.constexpr = C.block
    length = task.length * C.unit
    program = tl.program_id(0)
    segment = (program // task.programs).to(tl.int64)
    losses = task.losses + segment * length
    weights = segment_weights(task.scale, segment)
    total = tl.zeros([BLOCK], tl.int64)
    for tile in range(program % task.programs, tl.cdiv(length, BLOCK), task.programs):
        index = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < length
        loss = tl.load(losses + index, mask=inside, other=-1.0)
        weight = relative_weight(loss, weights)
        if task.weights is not None:
            scaled = tl.where(loss == -1.0, 0.0, weight * weights.step)
            place = task.weights + segment * length + index
            tl.store(place, scaled.to(task.weights.dtype.element_ty), mask=inside)
        if task.totals is not None:
            total += to_fixed(weight, task.fraction_bits)
    if task.totals is not None:
        tl.atomic_add(task.totals + segment, tl.sum(total, 0), sem="relaxed")


def scale_of(solution: Tensor, grad_output: Tensor) -> Scale:
    """grad_output: one number, or one for each segment."""
    return Scale(solution, grad_output, grad_output.stride(0) if grad_output.ndim else 0, solution.shape[1])


def pixel_weights(
    losses: Tensor, scale: Scale, weights: Tensor | None, totals: Tensor | None, config: StreamConfig
) -> None:
    """Fill weights (S, n) and totals (S,), whichever is given, from losses (S, n). Launches: 1."""
    segments, length = losses.shape
    unit = unit_of(length)
    programs = programs_a_row(length, segments, config, losses.device)
    task = Task(losses, scale, weights, totals, length // unit, fraction_bits(length), programs)
    launch(pixel_weights_kernel, segments * programs, (task,), (Constants(unit, config.block),), config.warps)
