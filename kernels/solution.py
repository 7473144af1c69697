"""What every solver starts from and ends with: the parameters of a segment, its solution, the reduced loss."""

import struct
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import types
from .numerics import INF_BITS, Q_CAP, bits_float
from .workspace import MAXIMUM, VALID, WORDS, take_ticket

UNIFORM_PIVOT = tl.constexpr(types.UNIFORM_PIVOT)


class Parameters(NamedTuple):
    """p and ratio as the solvers take them: the 64 bits of a float, or a float64 0-dim tensor on the device."""

    p: int
    ratio: int
    p_tensor: Tensor | None
    ratio_tensor: Tensor | None


def parameters(p: float | Tensor, ratio: float | Tensor) -> Parameters:
    """Of what a user gave."""
    bits = [0 if isinstance(x, Tensor) else struct.unpack("<q", struct.pack("<d", x))[0] for x in (p, ratio)]
    tensors = [x.double() if isinstance(x, Tensor) else None for x in (p, ratio)]
    return Parameters(*bits, *tensors)


@triton.jit
def conjugate(p):
    """q − 1 and q of p, capped: p = ∞ makes 1/(p−1) zero and q one, p = 1 makes both infinite."""
    exponent = tl.minimum(1.0 / (p - 1.0), Q_CAP)
    return exponent, tl.minimum(1.0 + exponent, Q_CAP)


@triton.jit
def segment_parameters(segment_workspace, p, ratio):
    """n, the largest loss as a bit pattern, m in float64, and whether the segment's loss is NaN."""
    n = tl.load(segment_workspace + VALID, cache_modifier=".cg")
    max_bits = tl.load(segment_workspace + MAXIMUM, cache_modifier=".cg").to(tl.int32)
    m = tl.maximum(tl.minimum(ratio * n.to(tl.float64), n.to(tl.float64)), 1.0)
    poisoned = (max_bits >= INF_BITS) | (p < 1) | (p != p) | (ratio <= 0) | (ratio > 1) | (ratio != ratio)
    return n, max_bits, m, poisoned


@triton.jit
def load_parameter(bits, tensor):
    """p or ratio as a float64: from a 0-dim tensor of that type if there is one, or the 64 bits of a Python float.

    (A Python float would arrive as a float32, and p = 1.000001 as one whose q is 1 048 577.)
    """
    if tensor is not None:
        value = tl.load(tensor)
    else:
        value = bits.to(tl.int64).to(tl.float64, bitcast=True)
    return value


@triton.jit
def write_solution(
    workspace,
    solution,
    loss,
    counts,
    value,
    segment,
    segments,
    pivot_bits,
    above,
    powers,
    heavy,
    ties,
    n,
    m,
    p,
    poisoned,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a segment's entries of solution, loss and counts; the program that writes the last segment reduces.

    above = |{ℓ > pivot}|, powers = R = Σ_{ℓ ≤ pivot} (ℓ/pivot)^q, heavy = Σ_{ℓ > pivot} ℓ, ties = |{ℓ = pivot}|. Then,
    with c = m − above: α* = pivot·(R/c)^(1/q), and w*/τ = (ℓ/pivot)^(q−1)·(R/c)^(−(q−1)/q) up to the pivot.
    """
    exponent, q = conjugate(p)
    c = m - above.to(tl.float64)
    excess = tl.where(pivot_bits > 0, tl.maximum(powers / tl.where(c > 0, c, 1.0), 1.0), 1.0)
    pivot = bits_float(pivot_bits)
    log2_excess = tl.log2(excess)
    alpha = pivot.to(tl.float64) * tl.exp2(log2_excess / q)
    drop = log2_excess * (exponent / q)
    some = tl.where(n > 0, n, 1).to(tl.float64)
    tau = tl.exp2(-(tl.log2(some) / q + tl.log2(m) / p))
    tau = tl.where(n > 0, tau, 0.0)
    pooled = tau * (heavy + tl.where(pivot_bits > 0, c * alpha, 0.0))
    saturated = above + tl.where((drop == 0) & (pivot_bits > 0), ties, 0)
    uniform = (n > 0) & ((m >= n.to(tl.float64)) | (q == 1))  # the mean, zero losses included
    pivot = tl.where(uniform, UNIFORM_PIVOT, pivot)
    drop = tl.where(uniform, 0.0, drop)
    saturated = tl.where(uniform, n, saturated)
    alpha = tl.where(poisoned, float("nan"), alpha)
    tau = tl.where(poisoned, float("nan"), tau)
    pooled = tl.where(poisoned, float("nan"), pooled)

    tl.store(solution + segment, alpha.to(tl.float32))
    tl.store(solution + segments + segment, tau.to(tl.float32))
    tl.store(solution + 2 * segments + segment, pivot)
    tl.store(solution + 3 * segments + segment, drop.to(tl.float32))
    tl.store(solution + 4 * segments + segment, tau.to(tl.float32))
    tl.store(solution + 5 * segments + segment, exponent.to(tl.float32))
    tl.store(loss + segment, pooled.to(tl.float32))
    tl.store(counts + segment, n)
    tl.store(counts + segments + segment, saturated)

    if REDUCTION != "none":  # noqa: SIM102 (a constant: the ticket must not be drawn otherwise)
        if take_ticket(workspace + segments.to(tl.int64) * WORDS) == segments - 1:
            reduce_segments(solution, loss, counts, value, segments, REDUCTION, BLOCK)


@triton.jit
def reduce_segments(solution, loss, counts, value, segments, REDUCTION: tl.constexpr, BLOCK: tl.constexpr):
    """The reduced loss, and for "mean" the steps: τ divided by the number of segments that have a valid pixel."""
    total = tl.zeros([BLOCK], tl.float64)
    filled = tl.zeros([BLOCK], tl.float64)
    for start in range(0, segments, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < segments
        total += tl.load(loss + index, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        there = tl.load(counts + index, mask=inside, other=0, cache_modifier=".cg") > 0
        filled += there.to(tl.float64)
    reduced = tl.sum(total, 0)
    if REDUCTION == "mean":
        scale = 1.0 / tl.maximum(tl.sum(filled, 0), 1.0)
        reduced = reduced * scale
        for start in range(0, segments, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < segments
            tau = tl.load(solution + segments + index, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
            tl.store(solution + 4 * segments + index, (tau * scale).to(tl.float32), mask=inside)
    tl.store(value, reduced.to(tl.float32))
