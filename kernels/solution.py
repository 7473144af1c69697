"""What every solver starts from and ends with: the parameters of a segment, its solution, the reduced loss."""

import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .. import types
from .numerics import INF_BITS, Q_CAP, bits_float, exp2_wide, log2_wide
from .workspace import MAXIMUM, VALID, WORDS, take_ticket

ALPHA, TAU, PIVOT, DROP, STEP, EXPONENT = map(tl.constexpr, range(len(types.SOLUTION_ROWS)))
N, SATURATED = map(tl.constexpr, range(len(types.COUNT_ROWS)))
UNIFORM_PIVOT = tl.constexpr(types.UNIFORM_PIVOT)
AT_ONCE = tl.constexpr(32)
"""Segments that are reduced at once: a warp's lanes, so that no warp waits for another."""


class Parameters(NamedTuple):
    """p and ratio as the solvers take them: the 64 bits of a float, or a float64 0-dim tensor on the device.

    (A Python float would arrive as a float32, and p = 1.000001 as one whose q is 1 048 577.)
    """

    ratio: tl.int64
    inverse_p: tl.int64
    """1/p, q − 1 and q, see `conjugate`; 0 with a tensor."""
    exponent: tl.int64
    q: tl.int64
    p_tensor: Tensor | None
    ratio_tensor: Tensor | None


class Outputs(NamedTuple):
    """What every solver writes; `lmp_triton.types.Pooling` says what it means."""

    solution: Tensor
    """(6, S) float32"""
    loss: Tensor
    """(S,) float32"""
    counts: Tensor
    """(2, S) int64"""
    value: Tensor
    """() float32; with reduction "none" nothing is written there."""
    segments: tl.int32
    """S"""


class Segment(NamedTuple):
    """What all programs of a segment know when they start."""

    index: Any
    here: Any
    """Where its words of the workspace begin."""
    n: Any
    max_bits: Any
    """The largest loss as a bit pattern."""
    m: Any
    """float64, as 1/p, q − 1 and q"""
    inverse_p: Any
    exponent: Any
    q: Any
    q32: Any
    """q as a float32."""
    poisoned: Any
    """Whether its loss is NaN."""
    fraction_bits: Any
    """Of the fixed-point numbers that its sums are made of."""


def parameters(p: float | Tensor, ratio: float | Tensor) -> Parameters:
    """Of what a user gave."""
    inverse_p = exponent = q = 0.0
    if not isinstance(p, Tensor):
        inverse_p = 1 / p
        exponent = min(1 / (p - 1), Q_CAP.value) if p > 1 else Q_CAP.value
        q = min(1 + exponent, Q_CAP.value)
    numbers = [0.0 if isinstance(ratio, Tensor) else ratio, inverse_p, exponent, q]
    bits = [struct.unpack("<q", struct.pack("<d", x))[0] for x in numbers]
    return Parameters(*bits, *(x.double() if isinstance(x, Tensor) else None for x in (p, ratio)))


def power_for(parameters: Parameters, approximation: str) -> str:
    """POWER of `numerics.power`: exact, or the approximation where a p known to the host leaves room for it.

    With q = 21, p = 1.05, weights are wrong by 4e-6·τ at most; the contract has 1e-5·τ. Below q = 1.1 nobody needs it.
    """
    (q,) = struct.unpack("<d", struct.pack("<q", parameters.q))
    return approximation if 1.1 <= q <= 21.001 else "exact"


@triton.jit
def conjugate(p):
    """q − 1 and q of p, capped: p = ∞ makes 1/(p−1) zero and q one, p = 1 makes both infinite."""
    exponent = tl.minimum(1.0 / (p - 1.0), Q_CAP)
    return exponent, tl.minimum(1.0 + exponent, Q_CAP)


@triton.jit
def load_parameter(bits, tensor):
    """A number as a float64: from the tensor if there is one."""
    if tensor is not None:
        value = tl.load(tensor)
    else:
        value = bits.to(tl.int64).to(tl.float64, bitcast=True)
    return value


@triton.jit
def load_segment(workspace, index, parameters, fraction_bits):
    """From the statistics of stage one."""
    ratio = load_parameter(parameters.ratio, parameters.ratio_tensor)
    poisoned = (ratio <= 0) | (ratio > 1) | (ratio != ratio)
    if parameters.p_tensor is not None:
        p = tl.load(parameters.p_tensor)
        poisoned |= (p < 1) | (p != p)
        inverse_p = 1.0 / p
        exponent, q = conjugate(p)
    else:
        inverse_p = load_parameter(parameters.inverse_p, None)
        exponent, q = load_parameter(parameters.exponent, None), load_parameter(parameters.q, None)
    here = workspace + index * WORDS
    n = tl.load(here + VALID, cache_modifier=".cg")
    max_bits = tl.load(here + MAXIMUM, cache_modifier=".cg").to(tl.int32)
    m = tl.maximum(tl.minimum(ratio * n.to(tl.float64), n.to(tl.float64)), 1.0)
    poisoned |= max_bits >= INF_BITS
    return Segment(index, here, n, max_bits, m, inverse_p, exponent, q, q.to(tl.float32), poisoned, fraction_bits)


@triton.jit
def write_solution(workspace, outputs, segment, pivot, heavy, ties, REDUCTION: tl.constexpr):
    """Write a segment's entries of solution, loss and counts; the program that writes the last segment reduces.

    pivot: an `End` of the bracket, above = |{ℓ > pivot}| and powers = R = Σ_{ℓ ≤ pivot} (ℓ/pivot)^q; heavy =
    Σ_{ℓ > pivot} ℓ, ties = |{ℓ = pivot}|. Then, with c = m − above: α* = pivot·(R/c)^(1/q), and
    w*/τ = (ℓ/pivot)^(q−1)·(R/c)^(−(q−1)/q) up to the pivot.
    """
    n, m = segment.n, segment.m
    c = m - pivot.above.to(tl.float64)
    # One logarithm of all numbers and one power of both results: this runs once, and its code is fetched for that.
    k = tl.arange(0, 4)
    log2_of = tl.where(k < 2, tl.where(k == 0, pivot.powers, c), tl.where(k == 2, m, n.to(tl.float64)))
    log2_of = log2_wide(tl.where(log2_of > 0, log2_of, 1.0))
    log2_excess = tl.maximum(tl.sum(tl.where(k == 0, log2_of, tl.where(k == 1, -log2_of, 0.0)), 0), 0.0)
    log2_excess = tl.where((pivot.bits > 0) & (pivot.powers > 0), log2_excess, 0.0)
    log2_m = tl.sum(tl.where(k == 2, log2_of, 0.0), 0)
    log2_n = tl.sum(tl.where(k == 3, log2_of, 0.0), 0)
    inverse_p = segment.inverse_p
    inverse_q = 1.0 - inverse_p
    k = tl.arange(0, 2)
    root = exp2_wide(tl.where(k == 0, log2_excess * inverse_q, -(log2_n * inverse_q + log2_m * inverse_p)))
    alpha = bits_float(pivot.bits).to(tl.float64) * tl.sum(tl.where(k == 0, root, 0.0), 0)
    tau = tl.where(n > 0, tl.sum(tl.where(k == 1, root, 0.0), 0), 0.0)
    drop = log2_excess * inverse_p
    pooled = tau * (heavy + tl.where(pivot.bits > 0, c * alpha, 0.0))
    saturated = pivot.above + tl.where((drop == 0) & (pivot.bits > 0), ties, 0)
    uniform = (n > 0) & ((m >= n.to(tl.float64)) | (segment.q == 1))  # the mean, zero losses included
    drop = tl.where(uniform, 0.0, drop)
    saturated = tl.where(uniform, n, saturated)
    alpha = tl.where(segment.poisoned, float("nan"), alpha)
    tau = tl.where(segment.poisoned, float("nan"), tau)
    pooled = tl.where(segment.poisoned, float("nan"), pooled)

    segments = outputs.segments
    solution = outputs.solution + segment.index
    tl.store(solution + ALPHA * segments, alpha.to(tl.float32))
    tl.store(solution + TAU * segments, tau.to(tl.float32))
    tl.store(solution + PIVOT * segments, tl.where(uniform, UNIFORM_PIVOT, bits_float(pivot.bits)))
    tl.store(solution + DROP * segments, drop.to(tl.float32))
    tl.store(solution + STEP * segments, tau.to(tl.float32))
    tl.store(solution + EXPONENT * segments, segment.exponent.to(tl.float32))
    tl.store(outputs.loss + segment.index, pooled.to(tl.float32))
    counts = outputs.counts + segment.index
    tl.store(counts + N * segments, n)
    tl.store(counts + SATURATED * segments, saturated)

    if REDUCTION != "none":  # noqa: SIM102 (a constant: the ticket must not be drawn otherwise)
        if take_ticket(workspace + segments.to(tl.int64) * WORDS) == segments - 1:
            reduce_segments(outputs, REDUCTION)


@triton.jit
def reduce_segments(outputs, REDUCTION: tl.constexpr):
    """The reduced loss, and for "mean" the steps: τ divided by the number of segments that have a valid pixel."""
    segments = outputs.segments
    total = tl.zeros([AT_ONCE], tl.float64)
    filled = tl.zeros([AT_ONCE], tl.int32)
    for start in range(0, segments, AT_ONCE):
        index = start + tl.arange(0, AT_ONCE)
        inside = index < segments
        total += tl.load(outputs.loss + index, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        there = tl.load(outputs.counts + N * segments + index, mask=inside, other=0, cache_modifier=".cg") > 0
        filled += there.to(tl.int32)
    reduced = tl.sum(total, 0)
    if REDUCTION == "mean":
        scale = 1.0 / tl.maximum(tl.sum(filled, 0), 1).to(tl.float32)
        reduced = reduced * scale.to(tl.float64)
        taus = outputs.solution + TAU * segments
        steps = outputs.solution + STEP * segments
        for start in range(0, segments, AT_ONCE):
            index = start + tl.arange(0, AT_ONCE)
            inside = index < segments
            tau = tl.load(taus + index, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(steps + index, tau * scale, mask=inside)
    tl.store(outputs.value, reduced.to(tl.float32))
