"""Stage two by sorting: Algorithm 1 of the paper, on sorted runs.

Each program sorts a run of losses in registers, by a bitonic network, and scans it once in each direction:

    A_i = Σ_{j ≤ i} (ℓ_j/ℓ_i)^q    up the run, in the form that can't underflow (`bracket.add_powers`)
    B_i = Σ_{j ≥ i} ℓ_j            down the run, in units of the segment's maximum

A segment of one run is then solved: η(ℓ_i) > 0 ⇔ m − |{ℓ > ℓ_i}| > A_i, and the largest loss where it does not hold
yet is the pivot. A longer one is left as runs; the last program of the segment to finish searches them. At a threshold
t a binary search in a run finds how many of its losses lie above, and A of the last one below gives the run's share of
Σ (ℓ/t)^q. Counts and shares (fixed point) are added over the runs, K thresholds a round, and the search ends as soon
as no loss is left in the bracket. Nothing is sorted globally, and nobody waits for another program.

The same input gives the same bits for every order of programs. Which losses share a run depends on the order of the
pixels and on the length of a run; A and B are float32, so there α* may move by an ulp or two where q is near 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from .bracket import THRESHOLDS, add_powers, decay, first_bracket, narrow, propose
from .configs import SortConfig, fraction_bits
from .launch import kernel, launch
from .layout import unit_of
from .numerics import bits_float, float_bits, from_fixed, normaliser, power, to_fixed
from .solution import Parameters, conjugate, load_parameter, segment_parameters, write_solution
from .workspace import FINISHED, ROUNDS, WORDS, take_ticket


@triton.jit
def positions(sorted_runs, first, thresholds, RUN: tl.constexpr, STEPS: tl.constexpr):
    """How many losses of each run are ≤ each threshold (bit pattern); first: where the runs begin.

    .cg: other programs wrote the runs, and the first-level cache is not coherent.
    """
    position = (first * 0).to(tl.int32) + thresholds * 0
    for i in tl.static_range(STEPS):
        candidate = position + (RUN >> i)
        fits = candidate <= RUN
        last = tl.load(sorted_runs + first + candidate - 1, mask=fits, other=0, cache_modifier=".cg")
        position = tl.where(fits & (last <= thresholds), candidate, position)
    return position


@triton.jit
def evaluate_runs(
    sorted_runs, powers, runs, thresholds, q, fraction_bits, RUN: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr
):
    """|{ℓ > t}| and, in fixed point, Σ_{ℓ ≤ t} (ℓ/t)^q over all runs, for each of the thresholds t (bit patterns)."""
    above = tl.zeros([THRESHOLDS, LANES], tl.int64)
    totals = tl.zeros([THRESHOLDS, LANES], tl.int64)
    t = bits_float(thresholds)[:, None]
    for start in range(0, runs, LANES):
        lane = start + tl.arange(0, LANES)
        there = (lane < runs)[None, :]
        first = (tl.where(lane < runs, lane, 0).to(tl.int64) * RUN)[None, :]
        position = positions(sorted_runs, first, thresholds[:, None], RUN, STEPS)
        above += tl.where(there, RUN - position, 0).to(tl.int64)
        some = there & (position > 0)
        last = bits_float(tl.load(sorted_runs + first + position - 1, mask=some, other=0, cache_modifier=".cg"))
        share = tl.load(powers + first + position - 1, mask=some, other=0.0, cache_modifier=".cg")
        share = tl.where(share > 0, share * power(tl.minimum(tl.maximum(last, 0.0), t), t, q), 0.0)
        totals += to_fixed(share, fraction_bits)
    return tl.sum(above, 1), tl.sum(totals, 1)


@triton.jit
def heaviest_of_runs(
    sorted_runs, sums, runs, pivot_bits, fraction_bits, RUN: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr
):
    """Σ ℓ (normalised, fixed point) of the losses above the pivot, and how many equal it."""
    total = tl.zeros([LANES], tl.int64)
    ties = tl.zeros([LANES], tl.int64)
    for start in range(0, runs, LANES):
        lane = start + tl.arange(0, LANES)
        there = lane < runs
        first = tl.where(there, lane, 0).to(tl.int64) * RUN
        threshold = tl.zeros([LANES], tl.int32) + pivot_bits
        position = positions(sorted_runs, first, threshold, RUN, STEPS)
        ties += tl.where(there, position - positions(sorted_runs, first, threshold - 1, RUN, STEPS), 0).to(tl.int64)
        some = there & (position < RUN)
        total += to_fixed(tl.load(sums + first + position, mask=some, other=0.0, cache_modifier=".cg"), fraction_bits)
    return tl.sum(total, 0), tl.sum(ties, 0)


@kernel
def sort_kernel(
    losses,
    sorted_runs,
    powers,
    sums,
    workspace,
    solution,
    loss,
    counts,
    value,
    p_tensor,
    ratio_tensor,
    p: tl.int64,
    ratio: tl.int64,
    runs: tl.int32,
    length: tl.int32,
    fraction_bits: tl.int32,
    segments: tl.int32,
    REDUCTION: tl.constexpr,
    ONE_RUN: tl.constexpr,
    UNIT: tl.constexpr,
    RUN: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Solve every segment; grid S × runs, one program a run.

    Reads   losses (S, n) float32 once; workspace: the statistics of stage one; then, by one program a segment, about
            log2(RUN) sorted losses of every run a threshold.
    Writes  sorted_runs (S, runs, RUN) int32: ascending bit patterns, ignored pixels first; powers and sums, of the same
            shape, float32: A and B (not with ONE_RUN); solution, loss, counts, value: as `select_kernel`.
    Bytes   4 read, 4 written and read again a pixel, 8 more written without ONE_RUN.
    Rounds  none with ONE_RUN, otherwise at most 32: one to see what the bracket is, then as `select_kernel`.

    STEPS is log2(RUN) + 1, the steps of a binary search.
    """
    length = length * UNIT
    segment = (tl.program_id(0) // runs).to(tl.int64)
    run = tl.program_id(0) % runs
    here = workspace + segment * WORDS
    p, ratio = load_parameter(p, p_tensor), load_parameter(ratio, ratio_tensor)
    _exponent, q = conjugate(p)
    q32 = q.to(tl.float32)
    n, max_bits, m, poisoned = segment_parameters(here, p, ratio)
    norm = normaliser(bits_float(max_bits))

    place = tl.arange(0, RUN)
    index = run * RUN + place
    x = tl.load(losses + segment * length + index, mask=index < length, other=-1.0)
    # As integers: −1 is negative, and a NaN (the segment is poisoned then) can't upset the order.
    bits = tl.sort(float_bits(x))
    ours = tl.program_id(0).to(tl.int64) * RUN + place
    tl.store(sorted_runs + ours, bits)
    tl.debug_barrier()  # the neighbour's loss may be in another thread
    before = bits_float(tl.maximum(tl.load(sorted_runs + ours - 1, mask=place > 0, other=0), 0))
    ell = bits_float(tl.maximum(bits, 0))
    _decay, power_sum = tl.associative_scan(
        (decay(tl.minimum(before, ell), ell, q32), (bits > 0).to(tl.float32)), 0, add_powers
    )

    if ONE_RUN:
        # η ≤ 0, that is f ≥ 0: up to the pivot, and from there on never again.
        is_lo = (bits > 0) & ((RUN - 1 - place).to(tl.float64) + power_sum.to(tl.float64) >= m)
        lo = tl.max(tl.where(is_lo, bits, 0), 0)
        over = bits > lo
        at_pivot = (bits == lo) & (bits > 0)
        heavy = tl.sum(tl.where(over, to_fixed(ell * norm, fraction_bits - 2), 0), 0)
        write_solution(
            workspace,
            solution,
            loss,
            counts,
            value,
            segment,
            segments,
            lo,
            tl.sum(over.to(tl.int64), 0),
            tl.max(tl.where(at_pivot, power_sum, 0.0), 0).to(tl.float64),
            from_fixed(heavy, fraction_bits - 2) / norm.to(tl.float64),
            tl.sum(at_pivot.to(tl.int64), 0),
            n,
            m,
            p,
            poisoned,
            REDUCTION,
            RUN,
        )
    else:
        tl.store(powers + ours, power_sum)
        # Added as integers: no rounding but the last.
        sum_above = tl.cumsum(to_fixed(ell * norm, fraction_bits - 2), 0, reverse=True)
        tl.store(sums + ours, from_fixed(sum_above, fraction_bits - 2).to(tl.float32))
        if take_ticket(here + FINISHED) == runs - 1:
            first = segment * runs * RUN
            bracket_lo, bracket_hi, _listed = first_bracket(here, n, max_bits, m, q32)
            k = tl.arange(0, THRESHOLDS)
            # The first thresholds find out what holds at the ends of the bracket, and at 0.
            t = bracket_lo + (bracket_hi - bracket_lo) // 2
            t = tl.where(k == 0, 0, tl.where(k == 1, bracket_lo, tl.where(k == 2, bracket_hi, t)))
            t = tl.minimum(t, max_bits)
            lo = -1
            lo_above = n
            lo_powers = m * 0.0
            hi = max_bits + 1
            hi_above = n * 0
            hi_powers = m * 0.0
            rounds = 0
            while (hi - lo > 1) & (lo_above > hi_above) & (poisoned == 0):
                if rounds > 0:
                    t = propose(lo, lo_above, lo_powers, hi, hi_above, hi_powers, m, q)
                t_above, t_powers = evaluate_runs(
                    sorted_runs + first, powers + first, runs, t, q32, fraction_bits, RUN, STEPS, LANES
                )
                lo, lo_above, lo_powers, hi, hi_above, hi_powers = narrow(
                    t,
                    t_above,
                    from_fixed(t_powers, fraction_bits),
                    lo,
                    lo_above,
                    lo_powers,
                    hi,
                    hi_above,
                    hi_powers,
                    m,
                )
                rounds += 1
            lo = tl.maximum(lo, 0)
            heavy, ties = heaviest_of_runs(
                sorted_runs + first, sums + first, runs, lo, fraction_bits - 2, RUN, STEPS, LANES
            )
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
                from_fixed(heavy, fraction_bits - 2) / norm.to(tl.float64),
                ties,
                n,
                m,
                p,
                poisoned,
                REDUCTION,
                RUN,
            )


def sort(
    losses: Tensor,
    scratch: Tensor,
    workspace: Tensor,
    solution: Tensor,
    loss: Tensor,
    counts: Tensor,
    value: Tensor,
    parameters: Parameters,
    reduction: str,
    config: SortConfig,
) -> None:
    """As `select.select`, with scratch (1 or 3, S·runs·RUN) int32: 1 where n ≤ RUN. Launches: 1."""
    segments, length = losses.shape
    unit = unit_of(length)
    runs = -(-length // config.run)
    sorted_runs, powers, sums = (*scratch, None, None)[:3]
    launch(
        sort_kernel,
        segments * runs,
        (
            losses,
            sorted_runs,
            powers if powers is None else powers.view(losses.dtype),
            sums if sums is None else sums.view(losses.dtype),
            workspace,
            solution,
            loss,
            counts,
            value,
            parameters.p_tensor,
            parameters.ratio_tensor,
        ),
        (
            parameters.p,
            parameters.ratio,
            runs,
            length // unit,
            fraction_bits(length),
            segments,
        ),
        {
            "REDUCTION": reduction,
            "ONE_RUN": runs == 1,
            "UNIT": unit,
            "RUN": config.run,
            "STEPS": config.run.bit_length(),
            "LANES": config.lanes,
        },
        config.warps,
    )
