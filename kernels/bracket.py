"""The bracket (lo, hi] of the pivot, shared by both solvers: from counts in bins, then K thresholds at a time.

f(t) = |{ℓ > t}| + Σ_{ℓ ≤ t} (ℓ/t)^q − m falls as t grows. f(lo) ≥ 0 or lo = 0, and f(hi) < 0 or no loss ≥ hi.
Both ends are bit patterns: losses are never negative, and such floats are ordered as their bit patterns are.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import INF_BITS, bits_float, float_bits, log2_ratio
from .workspace import (
    BIN_SHIFT,
    BINS,
    FINE_BINS,
    FINE_BITS,
    FIRST_BIN,
    FIRST_OCTAVE,
    HISTOGRAM,
    OCTAVE_BINS,
    OCTAVE_SHIFT,
)

THRESHOLDS = tl.constexpr(4)
MARGIN = tl.constexpr(1e-4)  # relative, far above the rounding of the bounds taken from bins
NUDGE = tl.constexpr(4)  # units in the last place to either side of a Newton step, where f has a certain sign


@triton.jit
def decay(x, t, q):
    """−log2 of (x/t)^q for 0 ≤ x ≤ t: what a sum of powers relative to x loses on the way to t.

    Exact where x is near t: a scan adds up hundreds of these, and an approximation would err each time alike.
    """
    return tl.where(x > 0, -q * log2_ratio(x, t), 1e6)


@triton.jit
def add_powers(e1, a1, e2, a2):
    """Sums of powers along ascending losses: (e, A) with A relative to the last loss, e the decay across the piece.

    No term ever exceeds its sum, so nothing overflows; what underflows does not count. (Prefix sums of (ℓ/max)^q
    underflow at p near 1.)
    """
    return e1 + e2, a2 + a1 * tl.exp2(-e2)


@triton.jit
def add_bounds(e1, a1, b1, e2, a2, b2):
    """`add_powers` of two sums at once."""
    factor = tl.exp2(-e2)
    return e1 + e2, a2 + a1 * factor, b2 + b1 * factor


class Bins(NamedTuple):
    """Ascending bins that cover a bracket, a vector each: a bin holds before < ℓ ≤ upper, all bit patterns."""

    counts: Any
    """int32: a segment has fewer than 2^31 pixels."""
    before: Any
    """The upper edge of the bin before, lo for the first."""
    upper: Any


class End(NamedTuple):
    """A threshold t, an end of the bracket, and what is known there."""

    bits: Any
    above: Any
    """|{ℓ > t}|, int64"""
    powers: Any
    """Σ_{ℓ ≤ t} (ℓ/t)^q, float64; 0 at the right end: not known."""


@triton.jit
def bracket_of_bins(bins, base, outside, lo, hi, m, q):
    """A bracket inside (lo, hi], from the counts of bins that cover it; and how many it holds.

    base: Σ (ℓ/lo)^q of the losses up to lo; outside: how many lie above hi.
    A bin's share of the sum at t lies between its count times (before/t)^q and (upper/t)^q.
    """
    before, upper = bits_float(bins.before), bits_float(bins.upper)
    loss = decay(tl.minimum(before, upper), upper, q)
    left = tl.exp2(-loss)
    carried = tl.where(bins.before == lo, base, 0.0)  # the first bin alone
    count = bins.counts.to(tl.float32)
    _decay, least, most = tl.associative_scan((loss, left * (carried + count), left * carried + count), 0, add_bounds)
    above = outside.to(tl.int32) + tl.cumsum(bins.counts, 0, reverse=True) - bins.counts
    wanted = (m - above.to(tl.float64)).to(tl.float32)
    lo = tl.maximum(lo, tl.max(tl.where(least * (1 - MARGIN) >= wanted, bins.upper, 0), 0))
    hi = tl.minimum(hi, tl.min(tl.where(most * (1 + MARGIN) < wanted, bins.upper, INF_BITS), 0))
    hi = tl.maximum(hi, lo + 1)
    return lo, hi, tl.sum(tl.where((bins.upper > lo) & (bins.upper <= hi), bins.counts, 0), 0).to(tl.int64)


@triton.jit
def bin_start(place):
    """The least bit pattern of a bin of stage one, above 0."""
    return tl.where(place < OCTAVE_BINS, FIRST_OCTAVE + (place << OCTAVE_SHIFT), FIRST_BIN + (place << BIN_SHIFT))


@triton.jit
def first_bracket(segment):
    """The bracket by the histogram of stage one, and how many losses it holds at most (zeros may count)."""
    place = tl.arange(0, BINS)
    counts = tl.load(segment.here + HISTOGRAM + place).to(tl.int32)  # 0 for bin 0
    counts += tl.where(place == 0, segment.n.to(tl.int32) - tl.sum(counts, 0), 0)
    max_bits = tl.minimum(segment.max_bits, INF_BITS - 1)
    before = tl.where(place == 0, 0, bin_start(place) - 1)
    upper = tl.where(place == BINS - 1, INF_BITS - 1, bin_start(place + 1) - 1)
    bins = Bins(counts, tl.minimum(before, max_bits), tl.minimum(upper, max_bits))
    # Past the maximum there is nothing left to separate, whatever the sign of f.
    return bracket_of_bins(bins, 0.0, tl.cast(0, tl.int64), 0, max_bits + 1, segment.m, segment.q32)


@triton.jit
def fine_shift(lo, hi):
    """So that (bits − lo − 1) >> shift numbers the FINE_BINS bins of (lo, hi]: a power of two of bit patterns each."""
    exponent = (float_bits((hi - lo - 1).to(tl.float32)) >> 23) - 127
    return tl.maximum(exponent - (FINE_BITS - 1), 0)


@triton.jit
def finer_bracket(counts, base, outside, lo, hi, m, q):
    """The bracket by the counts of FINE_BINS bins of (lo, hi], and how many losses it holds."""
    place = tl.arange(0, FINE_BINS)
    shift = fine_shift(lo, hi)
    before = lo + tl.minimum(place << shift, hi - lo)  # added first, it might not fit 32 bits
    upper = lo + tl.minimum((place + 1) << shift, hi - lo)
    bins = Bins(counts, before, upper)
    return bracket_of_bins(bins, base, outside, lo, hi, m, q)


@triton.jit
def root_of_piece(end, m, q):
    """t·(R(t)/c)^(1/q), an upper bound of α* (Newton's step in α^q), as a bit pattern; INF_BITS where c ≤ 0."""
    c = (m - end.above.to(tl.float64)).to(tl.float32)
    powers = end.powers.to(tl.float32)
    some = (c > 0) & (end.bits > 0) & (powers > 0)
    step = tl.exp2(tl.log2(tl.where(some, powers, 1.0) / tl.where(some, c, 1.0)) / q)
    return tl.where(some, tl.minimum(float_bits(bits_float(end.bits) * tl.minimum(step, 1e30)), INF_BITS), INF_BITS)


@triton.jit
def propose(lo, hi, m, q):
    """The next THRESHOLDS, strictly between the ends lo and hi: about Newton's step, the chord and the middle.

    Where neither end has a Newton step, as at p = 1, four thresholds cut the bracket into five.
    The bracket of bit patterns is halved at least, so there are never more than 31 rounds. Nothing hangs on how well
    they are chosen but the number of rounds, so q is a float32 and so is all that is computed here: float64 would be
    most of a round.
    """
    k = tl.arange(0, THRESHOLDS)
    # α* lies below both Newton steps. The chord of s·f(s^(1/q)), which is concave, bounds it from below: it is 0 at
    # s = lo^q·(1 + (1 − u)·f(lo)/(u·f(lo) − f(hi))), u = (lo/hi)^q.
    newton = tl.minimum(root_of_piece(lo, m, q), root_of_piece(hi, m, q))
    fifth = (hi.bits - lo.bits) // 5
    middle = lo.bits + (hi.bits - lo.bits) // 2
    chord = lo.bits + fifth
    if (hi.powers > 0) & (lo.bits > 0):
        start = bits_float(lo.bits)
        u = tl.exp2(q * log2_ratio(start, bits_float(hi.bits)))
        f_lo = tl.maximum(lo.above.to(tl.float64) + lo.powers - m, 0.0).to(tl.float32)
        f_hi = (m - hi.above.to(tl.float64) - hi.powers).to(tl.float32)
        chord = float_bits(start * tl.exp2(tl.log2(1 + (1 - u) * f_lo / (u * f_lo + f_hi)) / q)) - NUDGE
    if newton == INF_BITS:
        t = lo.bits + (k + 1) * fifth + (k + 1) // 2
    else:
        t = tl.where(k == 0, newton + NUDGE, tl.where(k == 1, newton - NUDGE, tl.where(k == 2, chord, middle)))
    return tl.minimum(tl.maximum(t, lo.bits + 1), hi.bits - 1)


@triton.jit
def narrow(lo, hi, t, above, powers, m):
    """The ends moved to the best of the thresholds t, with what was found there."""
    is_lo = (above.to(tl.float64) + powers >= m) | (t == 0)
    lo_bits = tl.maximum(lo.bits, tl.max(tl.where(is_lo, t, -1), 0))
    hi_bits = tl.minimum(hi.bits, tl.min(tl.where(is_lo, INF_BITS, t), 0))
    lo_above, lo_powers, hi_above, hi_powers = lo.above, lo.powers, hi.above, hi.powers
    if lo_bits > lo.bits:
        lo_above = tl.max(tl.where(t == lo_bits, above, 0), 0)
        lo_powers = tl.max(tl.where(t == lo_bits, powers, 0.0), 0)
    if hi_bits < hi.bits:
        hi_above = tl.max(tl.where(t == hi_bits, above, 0), 0)
        hi_powers = tl.max(tl.where(t == hi_bits, powers, 0.0), 0)
    return End(lo_bits, lo_above, lo_powers), End(hi_bits, hi_above, hi_powers)
