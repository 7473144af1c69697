"""Stage two: the threshold search. Finds α* of each segment without sorting.

With f(t) = |{ℓ > t}| + Σ_{ℓ ≤ t} (ℓ/t)^q − m, which falls as t grows, α* is the largest root of f. Wanted is a pivot:
a float32 with f(pivot) ≥ 0 and no loss between it and α*. With c = m − |{ℓ > pivot}| and R = Σ_{ℓ ≤ pivot} (ℓ/pivot)^q

    α* = pivot·(R/c)^(1/q),   L = τ·(Σ_{ℓ > pivot} ℓ + c·α*),   w* = τ·(ℓ/pivot)^(q−1)·(R/c)^(−(q−1)/q) up to the pivot.

1. Every program derives the same bracket (lo, hi] of the pivot from the histogram of stage one.
2. It walks its share of the losses: those in the bracket go to a short list, the others into integer totals.
3. The last program of a segment to finish narrows the bracket, K thresholds a round, over the short list
   (over all losses if the list overflowed), until no loss is left in it.

Nobody waits for another program. The totals are integers and so are the sums over the list, whose order varies from
run to run; the bracket follows from counts: the same input gives the same bits for every order of programs, every
tiling and every permutation of the pixels of a segment.
"""

import triton
import triton.language as tl
from torch import Tensor

from .configs import SELECT, fraction_bits, programs, unit_of
from .numerics import (
    INF_BITS,
    Q_CAP,
    bits_float,
    float_bits,
    from_fixed,
    load_scalar,
    normaliser,
    power,
    to_fixed,
)
from .workspace import (
    ABOVE_COUNT,
    ABOVE_SUM,
    BELOW_POWERS,
    BIN_SHIFT,
    BINS,
    FINISHED,
    FIRST_BIN,
    HISTOGRAM,
    LISTED,
    MAXIMUM,
    VALID,
    WORDS,
)

THRESHOLDS = tl.constexpr(4)
UNIFORM_PIVOT = tl.constexpr(-0.5)  # below every loss, above the −1 of ignored pixels: all valid pixels get τ
MARGIN = tl.constexpr(1e-4)  # relative, far above the rounding of the bounds taken from the histogram
NUDGE = tl.constexpr(4)  # units in the last place to either side of a Newton step, where f has a certain sign


@triton.jit
def bracket_from_histogram(segment_workspace, n, max_bits, m, q):
    """Bit patterns lo, hi with f(lo) ≥ 0 or lo = 0, and f(hi) < 0 or no loss ≥ hi, from the counts of the bins alone.

    A bin's share of R(t) lies between its count times (lower edge/t)^q and (upper edge/t)^q.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(segment_workspace + HISTOGRAM + bins)  # 0 for bin 0
    counts += tl.where(bins == 0, n - tl.sum(counts, 0), 0)
    # A bin holds lower ≤ ℓ ≤ upper.
    lower = tl.where(bins == 0, 0, (bins + FIRST_BIN) << BIN_SHIFT)
    upper = tl.where(bins == BINS - 1, INF_BITS - 1, ((bins + FIRST_BIN + 1) << BIN_SHIFT) - 1)
    lower = tl.minimum(lower, max_bits)
    upper = tl.minimum(upper, max_bits)
    low = bits_float(lower)
    high = bits_float(upper)
    count = counts.to(tl.float32)

    # Rows: the bin whose upper edge is the threshold t. Columns: the bins that add to R(t).
    at_or_below = bins[:, None] >= bins[None, :]
    t = high[:, None]
    share = tl.where(at_or_below & (low[None, :] > 0), power(tl.minimum(low[None, :], t), t, q), 0.0)
    least = tl.sum(share * count[None, :], 1) * (1 - MARGIN)
    share = tl.where(at_or_below, power(tl.minimum(high[None, :], t), t, q), 0.0)
    most = tl.sum(share * count[None, :], 1) * (1 + MARGIN)
    above = tl.sum(tl.where(at_or_below, 0, counts[None, :]), 1).to(tl.float64)

    lo = tl.max(tl.where(above + least.to(tl.float64) >= m, upper, 0), 0)
    # Past the maximum there is nothing left to separate, whatever the sign of f.
    hi = tl.min(tl.where(above + most.to(tl.float64) < m, upper, max_bits + 1), 0)
    return lo, tl.maximum(hi, lo + 1)


@triton.jit
def root_of_piece(t, above, power_sum, m, q):
    """t·(R(t)/c)^(1/q), an upper bound of α* (Newton's step in α^q), as a bit pattern; INF_BITS where c ≤ 0."""
    c = m - above.to(tl.float64)
    step = tl.exp2(tl.log2(tl.maximum(power_sum, 1e-300) / tl.where(c > 0, c, 1.0)) / q)
    bits = float_bits((bits_float(t).to(tl.float64) * tl.minimum(step, 1e30)).to(tl.float32))
    return tl.where((c > 0) & (t > 0) & (power_sum > 0), tl.minimum(bits, INF_BITS), INF_BITS)


@triton.jit
def evaluate(source, length, lo, hi, thresholds, q, fraction_bits, BLOCK: tl.constexpr):
    """For each of the thresholds (bit patterns): how many losses of the bracket lie above, Σ (ℓ/t)^q of the others."""
    above = tl.zeros([THRESHOLDS], tl.int64)
    powers = tl.zeros([THRESHOLDS], tl.int64)
    t = bits_float(thresholds)[:, None]
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        # .cg: other programs wrote the list, and the first-level cache is not coherent.
        x = tl.load(source + index, mask=index < length, other=-1.0, cache_modifier=".cg")
        bits = float_bits(x)
        in_bracket = (bits > lo) & (bits <= hi)
        over = in_bracket[None, :] & (bits[None, :] > thresholds[:, None])
        under = in_bracket[None, :] & (bits[None, :] <= thresholds[:, None])
        share = to_fixed(power(tl.minimum(x[None, :], t), t, q), fraction_bits)
        above += tl.sum(over.to(tl.int64), 1)
        powers += tl.sum(tl.where(under, share, 0), 1)
    return above, powers


@triton.jit
def heaviest(source, length, lo, hi, pivot, norm, fraction_bits, BLOCK: tl.constexpr):
    """Σ ℓ (normalised, fixed point) over the losses of the bracket above the pivot, and how many equal the pivot."""
    total = tl.zeros([BLOCK], tl.int64)
    ties = tl.zeros([BLOCK], tl.int64)
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(source + index, mask=index < length, other=-1.0, cache_modifier=".cg")
        bits = float_bits(x)
        over = (bits > lo) & (bits <= hi) & (bits > pivot)
        total += tl.where(over, to_fixed(x * norm, fraction_bits - 2), 0)
        ties += ((bits == pivot) & (bits > lo)).to(tl.int64)
    return tl.sum(total, 0), tl.sum(ties, 0)


@triton.jit(do_not_specialize=["p", "ratio", "programs_a_row", "length", "capacity", "fraction_bits", "segments"])
def select_kernel(
    losses,
    short_list,
    workspace,
    solution,
    loss,
    counts,
    value,
    p,
    ratio,
    programs_a_row,
    length,
    capacity,
    fraction_bits,
    segments,
    P_IS_TENSOR: tl.constexpr,
    RATIO_IS_TENSOR: tl.constexpr,
    REDUCTION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Solve every segment; grid S × programs, which stride over the tiles.

    Reads   losses (S, n) float32 once, then the short list (S, capacity), or the losses again, once a round by one
            program; workspace: the statistics of stage one.
    Writes  solution (6, S) float32: α*, τ, pivot, drop, step, q − 1; loss (S,) float32; counts (2, S) int64: valid,
            saturated; value () float32: the reduced loss. lmp_triton.types.Pooling says what they mean.
    Bytes   4 read a pixel, and 4 read and written for each loss in the bracket.
    Rounds  at most 31: the bracket of bit patterns is halved at least; 3 or 4 as a rule, Newton being quadratic.
    """
    length = length * UNIT
    segment = (tl.program_id(0) // programs_a_row).to(tl.int64)
    losses += segment * length
    short_list += segment * capacity
    here = workspace + segment * WORDS
    p = load_scalar(p, P_IS_TENSOR)
    ratio = load_scalar(ratio, RATIO_IS_TENSOR)
    # p = ∞ makes 1/(p−1) zero and q one; p = 1 makes both infinite, then capped.
    exponent = tl.minimum(1.0 / (p - 1.0), Q_CAP)
    q = tl.minimum(1.0 + exponent, Q_CAP)
    q32 = q.to(tl.float32)
    n = tl.load(here + VALID)
    max_bits = tl.load(here + MAXIMUM).to(tl.int32)
    m = tl.maximum(tl.minimum(ratio * n.to(tl.float64), n.to(tl.float64)), 1.0)
    poisoned = (max_bits >= INF_BITS) | (p < 1) | (p != p) | (ratio <= 0) | (ratio > 1) | (ratio != ratio)
    norm = normaliser(bits_float(max_bits))

    bracket_lo, bracket_hi = bracket_from_histogram(here, n, tl.minimum(max_bits, INF_BITS - 1), m, q32)
    low = bits_float(bracket_lo)

    below = tl.zeros([BLOCK], tl.int64)
    above = tl.zeros([BLOCK], tl.int32)
    above_sum = tl.zeros([BLOCK], tl.int64)
    for tile in range(tl.program_id(0) % programs_a_row, tl.cdiv(length, BLOCK), programs_a_row):
        index = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(losses + index, mask=index < length, other=-1.0)
        bits = float_bits(x)
        is_below = (bits > 0) & (bits <= bracket_lo)
        is_above = bits > bracket_hi
        is_listed = (bits > bracket_lo) & (bits <= bracket_hi)
        below += tl.where(is_below, to_fixed(power(tl.minimum(x, low), low, q32), fraction_bits), 0)
        above += is_above.to(tl.int32)
        above_sum += tl.where(is_above & (bits < INF_BITS), to_fixed(x * norm, fraction_bits - 2), 0)
        rank = tl.cumsum(is_listed.to(tl.int32), 0)
        found = tl.max(rank, 0)
        if found > 0:
            slot = tl.atomic_add(here + LISTED, found.to(tl.int64), sem="relaxed") + rank - 1
            tl.store(short_list + slot, x, mask=is_listed & (slot < capacity))
    tl.atomic_add(here + BELOW_POWERS, tl.sum(below, 0), sem="relaxed")
    tl.atomic_add(here + ABOVE_COUNT, tl.sum(above, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(here + ABOVE_SUM, tl.sum(above_sum, 0), sem="relaxed")

    # The ticket. Triton 3.6 puts no barrier of its own before a scalar release, nor after the acquire.
    tl.debug_barrier()
    ticket = tl.atomic_add(here + FINISHED, 1, sem="acq_rel")
    tl.debug_barrier()
    if ticket == programs_a_row - 1:
        listed = tl.atomic_add(here + LISTED, 0, sem="relaxed")
        outside = tl.atomic_add(here + ABOVE_COUNT, 0, sem="relaxed")
        base = from_fixed(tl.atomic_add(here + BELOW_POWERS, 0, sem="relaxed"), fraction_bits)
        heavy = tl.atomic_add(here + ABOVE_SUM, 0, sem="relaxed")
        fits = listed <= capacity
        source = tl.where(fits, short_list, losses)
        size = tl.where(fits, listed, length.to(tl.int64)).to(tl.int32)

        lo = bracket_lo
        lo_above = outside + listed
        lo_powers = base
        hi = bracket_hi
        hi_above = outside
        hi_powers = base * 0.0  # not known before hi was a threshold; 0 is never its value then
        k = tl.arange(0, THRESHOLDS)
        while (hi - lo > 1) & (lo_above > hi_above) & (poisoned == 0):
            # α* lies below both Newton steps. The chord of s·f(s^(1/q)), which is concave, bounds it from below.
            newton = tl.minimum(
                root_of_piece(lo, lo_above, lo_powers, m, q), root_of_piece(hi, hi_above, hi_powers, m, q)
            )
            middle = lo + (hi - lo) // 2
            chord = lo + (hi - lo) // 4
            if (hi_powers > 0) & (lo > 0):
                u = tl.exp2(q * (tl.log2(bits_float(lo).to(tl.float64)) - tl.log2(bits_float(hi).to(tl.float64))))
                f_lo = tl.maximum(lo_above.to(tl.float64) + lo_powers - m, 0.0) * u
                f_hi = m - hi_above.to(tl.float64) - hi_powers
                u += (1 - u) * f_lo / (f_lo + f_hi)
                edge = bits_float(hi).to(tl.float64) * tl.exp2(tl.log2(tl.maximum(u, 1e-300)) / q)
                chord = float_bits(edge.to(tl.float32)) - NUDGE
            t = tl.where(k == 0, newton + NUDGE, tl.where(k == 1, newton - NUDGE, tl.where(k == 2, chord, middle)))
            t = tl.minimum(tl.maximum(t, lo + 1), hi - 1)

            over, powers = evaluate(source, size, bracket_lo, bracket_hi, t, q32, fraction_bits, BLOCK)
            over += outside
            at = bits_float(t)
            carried = tl.where(bracket_lo > 0, power(tl.minimum(low, at), at, q32), 0.0)
            sums = base * carried.to(tl.float64) + from_fixed(powers, fraction_bits)
            is_lo = over.to(tl.float64) + sums >= m
            new_lo = tl.maximum(lo, tl.max(tl.where(is_lo, t, 0), 0))
            new_hi = tl.minimum(hi, tl.min(tl.where(is_lo, INF_BITS, t), 0))
            if new_lo > lo:
                lo_above = tl.max(tl.where(t == new_lo, over, 0), 0)
                lo_powers = tl.max(tl.where(t == new_lo, sums, 0.0), 0)
            if new_hi < hi:
                hi_above = tl.max(tl.where(t == new_hi, over, 0), 0)
                hi_powers = tl.max(tl.where(t == new_hi, sums, 0.0), 0)
            lo = new_lo
            hi = new_hi

        extra, ties = heaviest(source, size, bracket_lo, bracket_hi, lo, norm, fraction_bits, BLOCK)
        heavy_sum = from_fixed(heavy + extra, fraction_bits - 2) / norm.to(tl.float64)
        c = m - lo_above.to(tl.float64)
        excess = tl.where(lo > 0, tl.maximum(lo_powers / tl.where(c > 0, c, 1.0), 1.0), 1.0)
        pivot = bits_float(lo)
        log2_excess = tl.log2(excess)
        alpha = pivot.to(tl.float64) * tl.exp2(log2_excess / q)
        drop = log2_excess * (exponent / q)
        some = tl.where(n > 0, n, 1).to(tl.float64)
        tau = tl.exp2(-(tl.log2(some) / q + tl.log2(m) / p))
        tau = tl.where(n > 0, tau, 0.0)
        pooled = tau * (heavy_sum + tl.where(lo > 0, c * alpha, 0.0))
        saturated = lo_above + tl.where((drop == 0) & (lo > 0), ties, 0)
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

        if REDUCTION != "none":
            tl.debug_barrier()
            ticket = tl.atomic_add(workspace + segments.to(tl.int64) * WORDS, 1, sem="acq_rel")
            tl.debug_barrier()
            if ticket == segments - 1:
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


def select(
    losses: Tensor,
    short_list: Tensor,
    workspace: Tensor,
    solution: Tensor,
    loss: Tensor,
    counts: Tensor,
    value: Tensor,
    p: int | Tensor,
    ratio: int | Tensor,
    reduction: str,
) -> None:
    """Fill solution (6, S), loss (S,), counts (2, S) and value () from losses (S, n) and the workspace of stage one.

    With reduction "none" value is not written.

    p and ratio: a float64 0-dim tensor on the device of the losses, or the bits of a float64 as an integer.
    """
    segments, length = losses.shape
    unit = unit_of(losses)
    programs_a_row = programs(length, segments, SELECT, losses.device)
    select_kernel[(segments * programs_a_row,)](
        losses,
        short_list,
        workspace,
        solution,
        loss,
        counts,
        value,
        p,
        ratio,
        programs_a_row,
        length // unit,
        short_list.shape[1],
        fraction_bits(length),
        segments,
        P_IS_TENSOR=isinstance(p, Tensor),
        RATIO_IS_TENSOR=isinstance(ratio, Tensor),
        REDUCTION=reduction,
        UNIT=unit,
        BLOCK=SELECT.block,
        num_warps=SELECT.warps,
        enable_fp_fusion=True,
    )
