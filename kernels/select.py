"""Stage two by selection: the threshold search. Finds α* of each segment without sorting.

With f(t) = |{ℓ > t}| + Σ_{ℓ ≤ t} (ℓ/t)^q − m, which falls as t grows, α* is the largest root of f. Wanted is a pivot:
a float32 with f(pivot) ≥ 0 and no loss between it and α*; `solution.write_solution` does the rest.

1. The histogram of stage one brackets the pivot: lo < pivot ≤ hi.
2. `narrow_bracket_kernel`, launched for long segments only, counts the losses of the bracket in 256 finer bins, and
   the last program of a segment to finish writes the new bracket. Where few losses are left it does nothing.
3. `select_kernel` walks all losses once: those in the bracket go to a short list, the others into integer totals. The
   last program of a segment to finish tries K thresholds a round on the short list (on all losses if the list
   overflowed: many equal losses), until no loss is left in the bracket.

Nobody waits for another program. The totals are integers and so are the sums over the list, whose order varies from
run to run; the brackets follow from counts: the same input gives the same bits for every order of programs, every
tiling and every permutation of the pixels of a segment.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .bracket import THRESHOLDS, fine_shift, finer_bracket, first_bracket, narrow, propose
from .configs import fraction_bits, programs, unit_of
from .numerics import INF_BITS, bits_float, float_bits, from_fixed, normaliser, power, to_fixed
from .solution import conjugate, load_p_and_ratio, segment_parameters, write_solution
from .workspace import (
    ABOVE_COUNT,
    ABOVE_SUM,
    BELOW_POWERS,
    FINE,
    FINE_BINS,
    FINISHED,
    HI,
    INSIDE,
    LISTED,
    LO,
    ROUNDS,
    WORDS,
    take_ticket,
)

DYNAMIC = ["p", "ratio", "programs_a_row", "length", "capacity", "fraction_bits", "segments"]


@triton.jit
def evaluate(source, length, lo, hi, thresholds, q, fraction_bits, BLOCK: tl.constexpr):
    """For each of the thresholds (bit patterns): how many losses of the bracket lie above, Σ (ℓ/t)^q of the others."""
    above = tl.zeros([THRESHOLDS, BLOCK], tl.int32)
    powers = tl.zeros([THRESHOLDS, BLOCK], tl.int64)
    t = bits_float(thresholds)[:, None]
    for start in range(0, length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        # .cg: other programs wrote the list, and the first-level cache is not coherent.
        x = tl.load(source + index, mask=index < length, other=-1.0, cache_modifier=".cg")
        bits = float_bits(x)
        in_bracket = (bits > lo) & (bits <= hi)
        above += (in_bracket[None, :] & (bits[None, :] > thresholds[:, None])).to(tl.int32)
        under = in_bracket[None, :] & (bits[None, :] <= thresholds[:, None])
        share = to_fixed(power(tl.minimum(x[None, :], t), t, q), fraction_bits)
        powers += tl.where(under, share, 0)
    return tl.sum(above.to(tl.int64), 1), tl.sum(powers, 1)


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


@triton.jit(do_not_specialize=DYNAMIC)
def narrow_bracket_kernel(
    losses,
    workspace,
    p,
    ratio,
    programs_a_row,
    length,
    capacity,
    fraction_bits,
    P_IS_TENSOR: tl.constexpr,
    RATIO_IS_TENSOR: tl.constexpr,
    FIRST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Narrow the bracket of every segment to about two of 256 bins; grid S × programs, which stride over the tiles.

    Reads   losses (S, n) float32 once, unless the bracket holds no more than `capacity` of them; workspace: the
            statistics of stage one (FIRST), or the bracket of the pass before.
    Writes  workspace: LO, HI, INSIDE; the other words it uses are zero again.
    Bytes   4 read a pixel, or none.
    """
    length = length * UNIT
    segment = (tl.program_id(0) // programs_a_row).to(tl.int64)
    losses += segment * length
    here = workspace + segment * WORDS
    p, ratio = load_p_and_ratio(p, ratio, P_IS_TENSOR, RATIO_IS_TENSOR)
    _exponent, q = conjugate(p)
    q32 = q.to(tl.float32)
    n, max_bits, m, poisoned = segment_parameters(here, p, ratio)
    if FIRST:
        lo, hi, inside = first_bracket(here, n, max_bits, m, q32)
    else:
        lo = tl.load(here + LO).to(tl.int32)
        hi = tl.load(here + HI).to(tl.int32)
        inside = tl.load(here + INSIDE)

    if (inside <= capacity) | poisoned:
        if FIRST:  # otherwise they are there
            tl.store(here + LO, lo.to(tl.int64))
            tl.store(here + HI, hi.to(tl.int64))
            tl.store(here + INSIDE, inside)
    else:
        low = bits_float(lo)
        shift = fine_shift(lo, hi)
        below = tl.zeros([BLOCK], tl.int64)
        above = tl.zeros([BLOCK], tl.int32)
        histogram = tl.zeros([FINE_BINS], tl.int32)
        for tile in range(tl.program_id(0) % programs_a_row, tl.cdiv(length, BLOCK), programs_a_row):
            index = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(losses + index, mask=index < length, other=-1.0)
            bits = float_bits(x)
            is_below = (bits > 0) & (bits <= lo)
            below += tl.where(is_below, to_fixed(power(tl.minimum(x, low), low, q32), fraction_bits), 0)
            above += (bits > hi).to(tl.int32)
            in_bracket = (bits > lo) & (bits <= hi)
            histogram += tl.histogram(tl.where(in_bracket, (bits - lo - 1) >> shift, 0), FINE_BINS, mask=in_bracket)
        bins = tl.arange(0, FINE_BINS)
        tl.atomic_add(here + BELOW_POWERS, tl.sum(below, 0), sem="relaxed")
        tl.atomic_add(here + ABOVE_COUNT, tl.sum(above, 0).to(tl.int64), sem="relaxed")
        tl.atomic_add(here + FINE + bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")

        if take_ticket(here + FINISHED) == programs_a_row - 1:
            base = from_fixed(tl.load(here + BELOW_POWERS, cache_modifier=".cg"), fraction_bits)
            outside = tl.load(here + ABOVE_COUNT, cache_modifier=".cg")
            counts = tl.load(here + FINE + bins, cache_modifier=".cg")
            lo, hi, inside = finer_bracket(counts, base.to(tl.float32), outside, lo, hi, m, q32)
            tl.store(here + LO, lo.to(tl.int64))
            tl.store(here + HI, hi.to(tl.int64))
            tl.store(here + INSIDE, inside)
            tl.debug_barrier()  # everybody has read the counts
            tl.store(here + FINE + bins, tl.zeros([FINE_BINS], tl.int64))
            tl.store(here + BELOW_POWERS, tl.cast(0, tl.int64))
            tl.store(here + ABOVE_COUNT, tl.cast(0, tl.int64))
            tl.store(here + FINISHED, tl.cast(0, tl.int64))


@triton.jit(do_not_specialize=DYNAMIC)
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
    NARROWED: tl.constexpr,
    REDUCTION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Solve every segment; grid S × programs, which stride over the tiles.

    Reads   losses (S, n) float32 once, then the short list (S, capacity), or the losses again, once a round by one
            program; workspace: the statistics of stage one, or the bracket of a pass before (NARROWED).
    Writes  solution (6, S) float32: α*, τ, pivot, drop, step, q − 1; loss (S,) float32; counts (2, S) int64: valid,
            saturated; value () float32: the reduced loss. lmp_triton.types.Pooling says what they mean.
    Bytes   4 read a pixel, and 4 read and written for each loss in the bracket.
    Rounds  at most 31 (see `bracket.propose`); 3 or 4 as a rule, Newton's steps being quadratic.
    """
    length = length * UNIT
    segment = (tl.program_id(0) // programs_a_row).to(tl.int64)
    losses += segment * length
    short_list += segment * capacity
    here = workspace + segment * WORDS
    p, ratio = load_p_and_ratio(p, ratio, P_IS_TENSOR, RATIO_IS_TENSOR)
    _exponent, q = conjugate(p)
    q32 = q.to(tl.float32)
    n, max_bits, m, poisoned = segment_parameters(here, p, ratio)
    norm = normaliser(bits_float(max_bits))
    if NARROWED:
        bracket_lo = tl.load(here + LO).to(tl.int32)
        bracket_hi = tl.load(here + HI).to(tl.int32)
    else:
        bracket_lo, bracket_hi, _listed = first_bracket(here, n, max_bits, m, q32)
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

    if take_ticket(here + FINISHED) == programs_a_row - 1:
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
        rounds = 0
        while (hi - lo > 1) & (lo_above > hi_above) & (poisoned == 0):
            t = propose(lo, lo_above, lo_powers, hi, hi_above, hi_powers, m, q)
            t_above, powers = evaluate(source, size, bracket_lo, bracket_hi, t, q32, fraction_bits, BLOCK)
            at = bits_float(t)
            carried = tl.where(bracket_lo > 0, power(tl.minimum(low, at), at, q32), 0.0)
            t_powers = base * carried.to(tl.float64) + from_fixed(powers, fraction_bits)
            lo, lo_above, lo_powers, hi, hi_above, hi_powers = narrow(
                t, t_above + outside, t_powers, lo, lo_above, lo_powers, hi, hi_above, hi_powers, m
            )
            rounds += 1

        extra, ties = heaviest(source, size, bracket_lo, bracket_hi, lo, norm, fraction_bits, BLOCK)
        heavy_sum = from_fixed(heavy + extra, fraction_bits - 2) / norm.to(tl.float64)
        tl.store(here + ROUNDS, rounds)
        write_solution(
            workspace,
            solution,
            loss,
            counts,
            value,
            segment,
            segments,
            lo,
            lo_above,
            lo_powers,
            heavy_sum,
            ties,
            n,
            m,
            p,
            poisoned,
            REDUCTION,
            BLOCK,
        )


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

    With reduction "none" value is not written. Launches: 1, and one more for each of SELECT.passes that n exceeds.

    p and ratio: a float64 0-dim tensor on the device of the losses, or the bits of a float64 as an integer.
    """
    segments, length = losses.shape
    unit = unit_of(losses)
    capacity = short_list.shape[1]
    programs_a_row = programs(length, segments, configs.SELECT, losses.device)
    grid = (segments * programs_a_row,)
    passes = sum(length > longest for longest in configs.SELECT.passes)
    for i in range(passes):
        narrow_bracket_kernel[grid](
            losses,
            workspace,
            p,
            ratio,
            programs_a_row,
            length // unit,
            capacity,
            fraction_bits(length),
            P_IS_TENSOR=isinstance(p, Tensor),
            RATIO_IS_TENSOR=isinstance(ratio, Tensor),
            FIRST=i == 0,
            UNIT=unit,
            BLOCK=configs.SELECT.block,
            num_warps=configs.SELECT.warps,
            enable_fp_fusion=True,
        )
    select_kernel[grid](
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
        capacity,
        fraction_bits(length),
        segments,
        P_IS_TENSOR=isinstance(p, Tensor),
        RATIO_IS_TENSOR=isinstance(ratio, Tensor),
        NARROWED=passes > 0,
        REDUCTION=reduction,
        UNIT=unit,
        BLOCK=configs.SELECT.block,
        num_warps=configs.SELECT.warps,
        enable_fp_fusion=True,
    )
