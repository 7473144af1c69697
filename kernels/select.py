"""Stage two by selection: the threshold search. Finds α* of each segment without sorting.

With f(t) = |{ℓ > t}| + Σ_{ℓ ≤ t} (ℓ/t)^q − m, which falls as t grows, α* is the largest root of f. Wanted is a pivot:
a float32 with f(pivot) ≥ 0 and no loss between it and α*; `solution.write_solution` does the rest.

1. The histogram of stage one brackets the pivot: lo < pivot ≤ hi.
2. `narrow_bracket`, once or twice for long segments only, counts the losses of the bracket in 256 finer bins, and the
   last program of a segment to finish writes the new bracket. Where few losses are left it does nothing.
3. `collect_and_solve` walks all losses once: those in the bracket go to a short list, the others into integer totals.
   The last program of a segment to finish tries K thresholds a round on the short list (on all losses if the list
   overflowed: many equal losses), until no loss is left in the bracket.

These are the phases of one kernel. In launches of one phase each nobody waits for another program; in one cooperative
launch of all phases the programs of a segment wait for each other after each pass.

The totals are integers and so are the sums over the list, whose order varies from run to run; the brackets follow from
counts: the same input gives the same bits for every order of programs, every tiling and every permutation of the pixels
of a segment.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .bracket import THRESHOLDS, fine_shift, finer_bracket, first_bracket, narrow, propose
from .configs import SelectConfig, fraction_bits, passes_for, programs
from .launch import TooLarge, kernel, launch, resident_programs
from .layout import unit_of
from .numerics import INF_BITS, bits_float, float_bits, from_fixed, normaliser, power, to_fixed
from .solution import Parameters, conjugate, load_parameter, segment_parameters, write_solution
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
    PASSED,
    ROUNDS,
    WORDS,
    raise_flag,
    take_ticket,
    wait_for,
)


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


@triton.jit
def narrow_bracket(
    losses,
    here,
    program,
    programs_a_segment,
    length,
    capacity,
    n,
    max_bits,
    m,
    q32,
    poisoned,
    fraction_bits,
    flag,
    PASS: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Narrow the bracket of a segment to about two of 256 bins, unless it holds `capacity` losses or fewer.

    The program that ends last writes LO, HI and INSIDE; the other words it uses are zero again. With WAIT the others
    wait for it, until PASSED is `flag`.
    """
    if PASS == 0:
        lo, hi, inside = first_bracket(here, n, max_bits, m, q32)
    else:
        lo = tl.load(here + LO, cache_modifier=".cg").to(tl.int32)
        hi = tl.load(here + HI, cache_modifier=".cg").to(tl.int32)
        inside = tl.load(here + INSIDE, cache_modifier=".cg")

    if (inside <= capacity) | poisoned:
        if PASS == 0:  # otherwise they are there; all programs write the same
            tl.store(here + LO, lo.to(tl.int64))
            tl.store(here + HI, hi.to(tl.int64))
            tl.store(here + INSIDE, inside)
    else:
        low = bits_float(lo)
        shift = fine_shift(lo, hi)
        below = tl.zeros([BLOCK], tl.int64)
        above = tl.zeros([BLOCK], tl.int32)
        histogram = tl.zeros([FINE_BINS], tl.int32)
        for tile in range(program, tl.cdiv(length, BLOCK), programs_a_segment):
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

        if take_ticket(here + FINISHED) == programs_a_segment - 1:
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
            if WAIT:
                raise_flag(here + PASSED)
        if WAIT:
            wait_for(here + PASSED, flag)


@triton.jit
def collect_and_solve(
    losses,
    short_list,
    workspace,
    solution,
    loss,
    counts,
    value,
    segment,
    program,
    programs_a_segment,
    length,
    capacity,
    n,
    max_bits,
    m,
    p,
    q,
    poisoned,
    fraction_bits,
    segments,
    NARROWED: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
    SOLVE_BLOCK: tl.constexpr,
):
    """List the losses in the bracket of a segment and add up the others; the program that ends last solves."""
    here = workspace + segment * WORDS
    short_list += segment * capacity
    q32 = q.to(tl.float32)
    norm = normaliser(bits_float(max_bits))
    if NARROWED:
        bracket_lo = tl.load(here + LO, cache_modifier=".cg").to(tl.int32)
        bracket_hi = tl.load(here + HI, cache_modifier=".cg").to(tl.int32)
    else:
        bracket_lo, bracket_hi, _listed = first_bracket(here, n, max_bits, m, q32)
    low = bits_float(bracket_lo)

    below = tl.zeros([BLOCK], tl.int64)
    above = tl.zeros([BLOCK], tl.int32)
    above_sum = tl.zeros([BLOCK], tl.int64)
    for tile in range(program, tl.cdiv(length, BLOCK), programs_a_segment):
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

    if take_ticket(here + FINISHED) == programs_a_segment - 1:
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
            t_above, powers = evaluate(source, size, bracket_lo, bracket_hi, t, q32, fraction_bits, SOLVE_BLOCK)
            at = bits_float(t)
            carried = tl.where(bracket_lo > 0, power(tl.minimum(low, at), at, q32), 0.0)
            t_powers = base * carried.to(tl.float64) + from_fixed(powers, fraction_bits)
            lo, lo_above, lo_powers, hi, hi_above, hi_powers = narrow(
                t, t_above + outside, t_powers, lo, lo_above, lo_powers, hi, hi_above, hi_powers, m
            )
            rounds += 1

        extra, ties = heaviest(source, size, bracket_lo, bracket_hi, lo, norm, fraction_bits, SOLVE_BLOCK)
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


@triton.jit
def solve_segment(
    losses,
    short_list,
    workspace,
    solution,
    loss,
    counts,
    value,
    segment,
    program,
    programs_a_segment,
    p,
    p_tensor,
    ratio,
    ratio_tensor,
    length,
    capacity,
    fraction_bits,
    segments,
    passed,
    PASSES: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    WAIT: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
    SOLVE_BLOCK: tl.constexpr,
):
    """Phases FIRST to END − 1 of one of the programs of a segment: PASSES narrow the bracket, the last one solves."""
    here = workspace + segment * WORDS
    losses += segment * length
    p, ratio = load_parameter(p, p_tensor), load_parameter(ratio, ratio_tensor)
    _exponent, q = conjugate(p)
    n, max_bits, m, poisoned = segment_parameters(here, p, ratio)
    for phase in tl.static_range(FIRST, END):
        if phase < PASSES:
            narrow_bracket(
                losses,
                here,
                program,
                programs_a_segment,
                length,
                capacity,
                n,
                max_bits,
                m,
                q.to(tl.float32),
                poisoned,
                fraction_bits,
                passed + phase + 1,
                phase,
                WAIT,
                BLOCK,
            )
        else:
            collect_and_solve(
                losses,
                short_list,
                workspace,
                solution,
                loss,
                counts,
                value,
                segment,
                program,
                programs_a_segment,
                length,
                capacity,
                n,
                max_bits,
                m,
                p,
                q,
                poisoned,
                fraction_bits,
                segments,
                PASSES > 0,
                REDUCTION,
                BLOCK,
                SOLVE_BLOCK,
            )


@kernel
def select_kernel(
    losses,
    short_list,
    workspace,
    solution,
    loss,
    counts,
    value,
    p_tensor,
    ratio_tensor,
    p: tl.int64,
    ratio: tl.int64,
    programs_a_segment: tl.int32,
    length: tl.int32,
    capacity: tl.int32,
    fraction_bits: tl.int32,
    segments: tl.int32,
    UNIT: tl.constexpr,
    PASSES: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    WAIT: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
    SOLVE_BLOCK: tl.constexpr,
):
    """Solve every segment, or one phase of it; grid S × programs, which stride over the tiles.

    Reads   losses (S, n) float32 once in each phase, or not at all where no pass is needed; in the last one then the
            short list (S, capacity), or the losses again, once a round by one program; workspace: the statistics of
            stage one.
    Writes  solution (6, S) float32: α*, τ, pivot, drop, step, q − 1; loss (S,) float32; counts (2, S) int64: valid,
            saturated; value () float32: the reduced loss. lmp_triton.types.Pooling says what they mean.
    Bytes   4 read a pixel and phase, and 4 read and written for each loss in the bracket.
    Rounds  at most 31 (see `bracket.propose`); 3 or 4 as a rule, Newton's steps being quadratic.
    Waits   with WAIT, in a launch of more than one phase, for the other programs of the segment after each pass: then
            all programs must be on the device at once, which a cooperative launch guarantees.
    """
    solve_segment(
        losses,
        short_list,
        workspace,
        solution,
        loss,
        counts,
        value,
        (tl.program_id(0) // programs_a_segment).to(tl.int64),
        tl.program_id(0) % programs_a_segment,
        programs_a_segment,
        p,
        p_tensor,
        ratio,
        ratio_tensor,
        length * UNIT,
        capacity,
        fraction_bits,
        segments,
        0,
        PASSES,
        FIRST,
        END,
        WAIT,
        REDUCTION,
        BLOCK,
        SOLVE_BLOCK,
    )


def select(
    losses: Tensor,
    short_list: Tensor,
    workspace: Tensor,
    solution: Tensor,
    loss: Tensor,
    counts: Tensor,
    value: Tensor,
    parameters: Parameters,
    reduction: str,
    config: SelectConfig,
    cooperative: bool = False,
) -> None:
    """Fill solution (6, S), loss (S,), counts (2, S) and value () from losses (S, n) and the workspace of stage one.

    With reduction "none" value is not written. Launches: 1, and one more for each of config.passes that n exceeds; with
    `cooperative` always 1, if all programs fit on the device at once.

    Raises:
        TooLarge: with `cooperative`, if they don't; nothing was launched.
    """
    segments, length = losses.shape
    unit = unit_of(length)
    passes = passes_for(length, config)
    tensors = (
        losses,
        short_list,
        workspace,
        solution,
        loss,
        counts,
        value,
        parameters.p_tensor,
        parameters.ratio_tensor,
    )

    numbers = (length // unit, short_list.shape[1], fraction_bits(length), segments)

    def constants(first: int, end: int) -> dict[str, Any]:
        return {
            "UNIT": unit,
            "PASSES": passes,
            "FIRST": first,
            "END": end,
            "WAIT": cooperative,
            "REDUCTION": reduction,
            "BLOCK": config.block,
            "SOLVE_BLOCK": config.solve_block,
        }

    programs_a_segment = programs(length, segments, config, losses.device)
    phases = [(phase, phase + 1) for phase in range(passes + 1)]
    if cooperative:
        phases = [(0, passes + 1)]
        given = (parameters.p, parameters.ratio, 1, *numbers)
        room = resident_programs(select_kernel, tensors, given, constants(*phases[0]), config.warps)
        # One after another, as in the interpreter, programs can't wait for each other: one a segment.
        programs_a_segment = 1 if room is None else min(programs_a_segment, room // segments)
        if programs_a_segment < 1:
            raise TooLarge(f"{segments} segments, but only {room} programs are on the device at once")
    given = (parameters.p, parameters.ratio, programs_a_segment, *numbers)
    for phase in phases:
        launch(
            select_kernel,
            segments * programs_a_segment,
            tensors,
            given,
            constants(*phase),
            config.warps,
            cooperative,
        )
