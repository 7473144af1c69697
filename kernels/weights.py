"""Stage three for losses: the optimal weights w*, times whatever comes down the graph."""

import triton
import triton.language as tl
from torch import Tensor

from .configs import StreamConfig, fraction_bits, programs
from .launch import kernel, launch
from .layout import unit_of
from .numerics import log2_ratio, to_fixed


@triton.jit
def relative_weight(loss, pivot, drop, exponent):
    """w*/τ of a loss (Theorem 1): 1 above the pivot, 2^((q−1)·log2(ℓ/pivot) − drop) up to it, 0 if ignored."""
    below = tl.exp2(exponent * log2_ratio(tl.minimum(loss, pivot), pivot) - drop)
    below = tl.where(loss >= 0, below, 0.0)
    below = tl.where(pivot > 0, below, 0.0)  # apart: the interpreter cannot & a block with a float comparison
    return tl.where(loss > pivot, 1.0, below)


@triton.jit
def segment_scale(solution, grad_output, grad_output_stride, segments, segment):
    """pivot, drop, q − 1 and τ·∂value/∂loss_s·grad_output_s of a segment; rows as `select_kernel` writes them."""
    pivot = tl.load(solution + 2 * segments + segment)
    drop = tl.load(solution + 3 * segments + segment)
    scale = tl.load(solution + 4 * segments + segment) * tl.load(grad_output + segment * grad_output_stride)
    return pivot, drop, tl.load(solution + 5 * segments + segment), scale


@kernel
def pixel_weights_kernel(
    losses,
    solution,
    grad_output,
    weights,
    totals,
    programs_a_row: tl.int32,
    grad_output_stride: tl.int64,
    segments: tl.int32,
    length: tl.int32,
    fraction_bits: tl.int32,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w*·grad_output of every pixel, and Σ w*/τ of every segment; grid S × programs, which stride over the tiles.

    Reads   losses (S, n) float32; the solution; grad_output float32, () or (S,).
    Writes  weights (S, n), any float type, rounded once, or None; totals (S,) int64, fixed point, zeroed by the
            caller, one atomic a program, or None.
    Bytes   4 read, sizeof(weight) written a pixel.

    length is in units of UNIT elements, see `layout.unit_of`.
    """
    length = length * UNIT
    segment = (tl.program_id(0) // programs_a_row).to(tl.int64)
    pivot, drop, exponent, scale = segment_scale(solution, grad_output, grad_output_stride, segments, segment)
    total = tl.zeros([BLOCK], tl.int64)
    for tile in range(tl.program_id(0) % programs_a_row, tl.cdiv(length, BLOCK), programs_a_row):
        index = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < length
        loss = tl.load(losses + segment * length + index, mask=inside, other=-1.0)
        weight = relative_weight(loss, pivot, drop, exponent)
        if weights is not None:
            scaled = tl.where(loss == -1.0, 0.0, weight * scale)
            tl.store(weights + segment * length + index, scaled.to(weights.dtype.element_ty), mask=inside)
        if totals is not None:
            total += to_fixed(weight, fraction_bits)
    if totals is not None:
        tl.atomic_add(totals + segment, tl.sum(total, 0), sem="relaxed")


def pixel_weights(
    losses: Tensor,
    solution: Tensor,
    grad_output: Tensor,
    weights: Tensor | None,
    totals: Tensor | None,
    config: StreamConfig,
) -> None:
    """Fill weights (S, n) and totals (S,), whichever is given, from losses (S, n) and the solution of `select`."""
    segments, length = losses.shape
    unit = unit_of(length)
    programs_a_row = programs(length, segments, config, losses.device)
    launch(
        pixel_weights_kernel,
        segments * programs_a_row,
        (losses, solution, grad_output, weights, totals),
        (
            programs_a_row,
            grad_output.stride(0) if grad_output.ndim else 0,
            segments,
            length // unit,
            fraction_bits(length),
        ),
        {"UNIT": unit, "BLOCK": config.block},
        config.warps,
    )
