"""Stage two by selection: the threshold search. Finds α* of each segment without sorting all of its losses.

With f(t) = |{ℓ > t}| + Σ_{ℓ ≤ t} (ℓ/t)^q − m, which falls as t grows, α* is the largest root of f. Wanted is a pivot:
a float32 with f(pivot) ≥ 0 and no loss between it and α*; `solution.write_solution` does the rest.

1. The histogram of stage one brackets the pivot: lo < pivot ≤ hi.
2. `narrow_bracket`, once or twice for long segments only, counts the losses of the bracket in 256 finer bins, and the
   last program of a segment to finish writes the new bracket. Where few losses are left it does nothing.
3. `collect_and_solve` walks all losses once: those in the bracket go to a short list, the others into integer totals.
   The last program of a segment to finish sorts the short list, and one scan finds the pivot. A list too long for that
   it searches: K thresholds a round (on all losses if the list overflowed: many equal losses), until no loss is left
   in the bracket. What holds at the pivot it adds up anew, which makes both ways alike.

These are the phases of one kernel. In launches of one phase each nobody waits for another program; in one cooperative
launch of all phases the programs of a segment wait for each other after each pass.

The totals are integers and so are the sums over the list, whose order varies from run to run; the brackets follow from
counts: the same input gives the same bits for every order of programs, every tiling and every permutation of the pixels
of a segment.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .bracket import THRESHOLDS, End, add_powers, decay, fine_shift, finer_bracket, first_bracket, narrow, propose
from .configs import SelectConfig, fraction_bits, neighbours, passes_for, programs_a_row
from .launcher import TooLarge, launch, resident_programs, wait_for_launch_before
from .layout import unit_of
from .numerics import bits_float, float_bits, from_fixed, from_normalised, normaliser, power, to_fixed
from .solution import Outputs, Parameters, load_segment, power_for, write_solution
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
    raise_flag,
    take_ticket,
    wait_for,
)


class Task(NamedTuple):
    """What the kernel reads and writes, see there."""

    losses: Tensor
    short_list: Tensor
    workspace: Tensor
    outputs: Outputs
    parameters: Parameters
    length: tl.int32
    """n, in units (see `layout.unit_of`)."""
    capacity: tl.int32
    fraction_bits: tl.int32
    programs: tl.int32
    """That share a segment."""


class Constants(NamedTuple):
    """What the kernel is compiled for."""

    unit: int
    passes: int
    """How many narrow the bracket."""
    first: int
    end: int
    """Phases first to end − 1 are run: those below `passes` narrow the bracket, phase `passes` solves."""
    wait: bool
    reduction: str
    power: str
    """POWER of `numerics.power`."""
    block: int
    neighbours: int
    """So many losses of a tile that lie side by side are a thread's."""
    solve_block: int
    sorted: int
    """A list of up to so many losses is sorted, a longer one is searched in rounds."""


class Share(NamedTuple):
    """What one program walks of a segment: every `programs`-th tile of its losses."""

    losses: Any
    length: Any
    program: Any
    programs: Any


class Candidates(NamedTuple):
    """The losses of the bracket (lo, hi]: those of a list that lie in it, in any order."""

    list: Any
    length: Any
    lo: Any
    hi: Any


@triton.jit
def evaluate(candidates, thresholds, q, fraction_bits, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """For each of the thresholds (bit patterns): how many candidates lie above, Σ (ℓ/t)^q of the others."""
    above = tl.zeros([THRESHOLDS, BLOCK], tl.int32)
    powers = tl.zeros([THRESHOLDS, BLOCK], tl.int64)
    t = bits_float(thresholds)[:, None]
    for start in range(0, candidates.length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        # .cg: other programs wrote the list, and the first-level cache is not coherent.
        x = tl.load(candidates.list + index, mask=index < candidates.length, other=-1.0, cache_modifier=".cg")
        bits = float_bits(x)
        in_bracket = (bits > candidates.lo) & (bits <= candidates.hi)
        above += (in_bracket[None, :] & (bits[None, :] > thresholds[:, None])).to(tl.int32)
        under = in_bracket[None, :] & (bits[None, :] <= thresholds[:, None])
        powers += to_fixed(power(tl.where(under, x[None, :], 0.0), t, q, POWER), fraction_bits)
    return tl.sum(above, 1), tl.sum(powers, 1)


@triton.jit
def carried(lo, t, q, POWER: tl.constexpr):
    """Σ (ℓ/t)^q over the losses up to lo ≤ t (bit patterns), from what it is at lo."""
    at = bits_float(t)
    share = power(tl.minimum(bits_float(tl.maximum(lo.bits, 1)), at), at, q, POWER)
    share = tl.where(lo.bits == t, 1.0, share)  # an approximation is not
    return lo.powers * tl.where(lo.bits > 0, share, 0.0).to(tl.float64)


@triton.jit
def pivot_by_rounds(candidates, lo, hi, m, q, fraction_bits, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """The pivot (bit pattern), and how many rounds it took; lo and hi: the ends of the bracket."""
    first, outside = lo, hi.above
    rounds = 0
    while (hi.bits - lo.bits > 1) & (lo.above > hi.above):
        t = propose(lo, hi, m, q)
        above, powers = evaluate(candidates, t, q, fraction_bits, POWER, BLOCK)
        powers = carried(first, t, q, POWER) + from_fixed(powers, fraction_bits)
        lo, hi = narrow(lo, hi, t, above + outside, powers, m)
        rounds += 1
    return lo.bits, rounds


@triton.jit
def pivot_by_sorting(candidates, lo, hi, m, q, LENGTH: tl.constexpr):
    """The pivot (bit pattern) among at most LENGTH candidates, by one scan: the last of them where f ≥ 0, or lo."""
    place = tl.arange(0, LENGTH)
    x = tl.load(candidates.list + place, mask=place < candidates.length, other=-1.0, cache_modifier=".cg")
    # What fills them up comes first: it stays at lo, where the sum starts with what is known there.
    bits = tl.maximum(tl.sort(float_bits(x)), lo.bits)
    before = tl.where(place > 0, tl.gather(bits, tl.maximum(place - 1, 0), 0), lo.bits)
    ell = bits_float(bits)
    loss_decay = decay(tl.minimum(bits_float(before), ell), ell, q)
    is_loss = bits > lo.bits
    powers = tl.where(place > 0, 0.0, lo.powers.to(tl.float32) * tl.exp2(-loss_decay)) + is_loss.to(tl.float32)
    _decay, powers = tl.associative_scan((loss_decay, powers), 0, add_powers)
    above = (hi.above + (LENGTH - 1 - place)).to(tl.float64)
    return tl.max(tl.where(is_loss & (above + powers.to(tl.float64) >= m), bits, lo.bits), 0)


@triton.jit
def sums_at(candidates, pivot, norm, q, fraction_bits, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """Of the candidates: how many lie above the pivot and how many equal it, and in fixed point Σ ℓ over the former,
    in units of 4/norm, and Σ (ℓ/pivot)^q over all others."""
    above = tl.zeros([BLOCK], tl.int32)
    ties = tl.zeros([BLOCK], tl.int32)
    heavy = tl.zeros([BLOCK], tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    t = bits_float(tl.maximum(pivot, 1))
    quarter = 0.25 * norm
    for start in range(0, candidates.length, BLOCK):
        index = start + tl.arange(0, BLOCK)
        x = tl.load(candidates.list + index, mask=index < candidates.length, other=-1.0, cache_modifier=".cg")
        bits = float_bits(x)
        in_bracket = (bits > candidates.lo) & (bits <= candidates.hi)
        over = in_bracket & (bits > pivot)
        tied = in_bracket & (bits == pivot)
        part = power(tl.where(in_bracket & (bits < pivot), x, 0.0), t, q, POWER)
        part = tl.where(tied, 1.0, part)  # which the approximation is not
        part = to_fixed(tl.where(over, tl.minimum(x * quarter, 1.0), part), fraction_bits)
        total += part
        heavy += tl.where(over, part, 0)
        above += over.to(tl.int32)
        ties += tied.to(tl.int32)
    heavy = tl.sum(heavy, 0)
    return tl.sum(above, 0), tl.sum(ties, 0).to(tl.int64), heavy, tl.sum(total, 0) - heavy


@triton.jit
def thread_sums(x, COUNT: tl.constexpr):
    """Of COUNT neighbours each, which a thread has: from tile to tile it keeps their sum, and not every one of them."""
    return tl.sum(tl.reshape(x, [x.shape[0] // COUNT, COUNT]), 1)


class Bracket(NamedTuple):
    """(lo, hi] as bit patterns, and how many losses it holds at most."""

    lo: Any
    hi: Any
    inside: Any


@triton.jit
def load_bracket(here):
    """What the last program of a pass stored."""
    lo = tl.load(here + LO, cache_modifier=".cg").to(tl.int32)
    hi = tl.load(here + HI, cache_modifier=".cg").to(tl.int32)
    return Bracket(lo, hi, tl.load(here + INSIDE, cache_modifier=".cg"))


@triton.jit
def store_bracket(here, lo, hi, inside):
    """For the next launch, or for programs that wait."""
    tl.store(here + LO, lo.to(tl.int64))
    tl.store(here + HI, hi.to(tl.int64))
    tl.store(here + INSIDE, inside)


@triton.jit
def narrow_bracket(share, segment, bracket, capacity, flag, PASS: tl.constexpr, C: tl.constexpr):
    """Narrow the bracket of a segment to about two of 256 bins, unless its losses fill less than a quarter of the list.

    The program that ends last stores it; the other words it uses are zero again. With WAIT the others wait for it, till
    PASSED is `flag`, and all get the new bracket. A bracket that stays is in the registers of every program, and stored
    for the next launch alone: in a launch of several phases nobody reads what another program may be storing.
    """
    WAIT: tl.constexpr = C.wait
    BLOCK: tl.constexpr = C.block
    NEIGHBOURS: tl.constexpr = C.neighbours
    POWER: tl.constexpr = C.power
    here = segment.here
    lo, hi, inside = bracket.lo, bracket.hi, bracket.inside
    if (4 * inside <= capacity) | segment.poisoned:
        if PASS == 0 and not WAIT:  # otherwise it is there; all programs write the same
            store_bracket(here, lo, hi, inside)
    else:
        low = bits_float(tl.maximum(lo, 1))
        shift = fine_shift(lo, hi)
        below = tl.zeros([BLOCK // NEIGHBOURS], tl.int64)
        above = tl.zeros([BLOCK // NEIGHBOURS], tl.int32)
        histogram = tl.zeros([FINE_BINS], tl.int32)
        for tile in range(share.program, tl.cdiv(share.length, BLOCK), share.programs):
            index = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(share.losses + index, mask=index < share.length, other=-1.0)
            bits = float_bits(x)
            x = tl.where((bits > 0) & (bits <= lo), x, 0.0)
            below += thread_sums(to_fixed(power(x, low, segment.q32, POWER), segment.fraction_bits), NEIGHBOURS)
            above += thread_sums((bits > hi).to(tl.int32), NEIGHBOURS)
            in_bracket = (bits > lo) & (bits <= hi)
            histogram += tl.histogram(tl.where(in_bracket, (bits - lo - 1) >> shift, 0), FINE_BINS, mask=in_bracket)
        bins = tl.arange(0, FINE_BINS)
        tl.atomic_add(here + BELOW_POWERS, tl.sum(below, 0), sem="relaxed")
        tl.atomic_add(here + ABOVE_COUNT, tl.sum(above, 0).to(tl.int64), sem="relaxed")
        tl.atomic_add(here + FINE + bins, histogram.to(tl.int64), mask=histogram > 0, sem="relaxed")

        if take_ticket(here + FINISHED) == share.programs - 1:
            base = from_fixed(tl.load(here + BELOW_POWERS, cache_modifier=".cg"), segment.fraction_bits)
            outside = tl.load(here + ABOVE_COUNT, cache_modifier=".cg")
            counts = tl.load(here + FINE + bins, cache_modifier=".cg").to(tl.int32)
            new_lo, new_hi, left = finer_bracket(counts, base.to(tl.float32), outside, lo, hi, segment.m, segment.q32)
            store_bracket(here, new_lo, new_hi, left)
            tl.debug_barrier()  # everybody has read the counts
            tl.store(here + FINE + bins, tl.zeros([FINE_BINS], tl.int64))
            tl.store(here + BELOW_POWERS, tl.cast(0, tl.int64))
            tl.store(here + ABOVE_COUNT, tl.cast(0, tl.int64))
            tl.store(here + FINISHED, tl.cast(0, tl.int64))
            if WAIT:
                raise_flag(here + PASSED)
        if WAIT:
            wait_for(here + PASSED, flag)
            new = load_bracket(here)
            lo, hi, inside = new.lo, new.hi, new.inside
    return Bracket(lo, hi, inside)


@triton.jit
def solve_candidates(share, segment, bracket, task, C: tl.constexpr):
    """Find the pivot among the losses on the list, or among all where it overflowed, and write the solution."""
    POWER: tl.constexpr = C.power
    SORTED: tl.constexpr = C.sorted
    SOLVE_BLOCK: tl.constexpr = C.solve_block
    REDUCTION: tl.constexpr = C.reduction  # Triton 3.6: a string can't be handed on as a field
    here, m, q = segment.here, segment.m, segment.q32
    listed = tl.load(here + LISTED, cache_modifier=".cg")
    outside = tl.load(here + ABOVE_COUNT, cache_modifier=".cg")
    base = from_fixed(tl.load(here + BELOW_POWERS, cache_modifier=".cg"), segment.fraction_bits)
    heavy = tl.load(here + ABOVE_SUM, cache_modifier=".cg")
    fits = listed <= task.capacity
    source = tl.where(fits, task.short_list + segment.index * task.capacity, share.losses)
    size = tl.where(fits, listed, share.length.to(tl.int64)).to(tl.int32)
    candidates = Candidates(source, size, bracket.lo, bracket.hi)
    lo = End(bracket.lo, outside + listed, base)
    hi = End(bracket.hi, outside, base * 0.0)  # powers are not known before hi was a threshold, and never 0 then

    pivot, rounds = bracket.lo, 0
    if segment.poisoned == 0:
        if fits & (listed <= SORTED):
            pivot = pivot_by_sorting(candidates, lo, hi, m, q, SORTED)
        else:
            pivot, rounds = pivot_by_rounds(candidates, lo, hi, m, q, segment.fraction_bits, POWER, SOLVE_BLOCK)
    tl.store(here + ROUNDS, rounds)
    largest = bits_float(segment.max_bits)
    norm = normaliser(largest)
    above, ties, extra, powers = sums_at(candidates, pivot, norm, q, segment.fraction_bits, POWER, SOLVE_BLOCK)
    heavy = from_normalised(heavy + extra, segment.fraction_bits - 2, largest)
    powers = carried(lo, pivot, q, POWER) + from_fixed(powers, segment.fraction_bits)
    pivot = End(pivot, outside + above, powers)
    write_solution(task.workspace, task.outputs, segment, pivot, heavy, ties, REDUCTION)


@triton.jit
def collect_and_solve(share, segment, bracket, task, C: tl.constexpr):
    """List the losses in the bracket of a segment and add up the others; the program that ends last solves."""
    BLOCK: tl.constexpr = C.block
    NEIGHBOURS: tl.constexpr = C.neighbours
    here = segment.here
    capacity = task.capacity
    fraction_bits = segment.fraction_bits
    short_list = task.short_list + segment.index * capacity
    POWER: tl.constexpr = C.power
    norm = normaliser(bits_float(segment.max_bits))
    bracket_lo, bracket_hi = bracket.lo, bracket.hi
    low = bits_float(tl.maximum(bracket_lo, 1))
    quarter = 0.25 * norm  # heavy losses are below 2 where they are normalised

    total = tl.zeros([BLOCK // NEIGHBOURS], tl.int64)
    above = tl.zeros([BLOCK // NEIGHBOURS], tl.int32)
    above_sum = tl.zeros([BLOCK // NEIGHBOURS], tl.int64)
    for tile in range(share.program, tl.cdiv(share.length, BLOCK), share.programs):
        index = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(share.losses + index, mask=index < share.length, other=-1.0)
        bits = float_bits(x)
        is_above = bits > bracket_hi
        is_listed = (bits > bracket_lo) & (bits <= bracket_hi)
        part = power(tl.where((bits > 0) & (bits <= bracket_lo), x, 0.0), low, segment.q32, POWER)
        # A loss is below or above: one conversion to fixed point does for both sums. min: no integer is infinite.
        part = to_fixed(tl.where(is_above, tl.minimum(x * quarter, 1.0), part), fraction_bits)
        total += thread_sums(part, NEIGHBOURS)
        above_sum += thread_sums(tl.where(is_above, part, 0), NEIGHBOURS)
        above += thread_sums(is_above.to(tl.int32), NEIGHBOURS)
        found = tl.sum(is_listed.to(tl.int32), 0)
        if found > 0:
            rank = tl.cumsum(is_listed.to(tl.int32), 0)
            slot = tl.atomic_add(here + LISTED, found.to(tl.int64), sem="relaxed") + rank - 1
            tl.store(short_list + slot, x, mask=is_listed & (slot < capacity))
    above_sum = tl.sum(above_sum, 0)
    tl.atomic_add(here + BELOW_POWERS, tl.sum(total, 0) - above_sum, sem="relaxed")
    tl.atomic_add(here + ABOVE_COUNT, tl.sum(above, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(here + ABOVE_SUM, above_sum, sem="relaxed")

    if take_ticket(here + FINISHED) == share.programs - 1:
        solve_candidates(share, segment, bracket, task, C)


@triton.jit
def solve_segment(task, index, program, PASSED_BEFORE: tl.constexpr, C: tl.constexpr):
    """The phases of one of the programs of a segment. PASSED_BEFORE: how often its flag was raised before them."""
    PASSES: tl.constexpr = C.passes
    FIRST: tl.constexpr = C.first
    END: tl.constexpr = C.end
    length = task.length * C.unit
    share = Share(task.losses + index * length, length, program, task.programs)
    segment = load_segment(task.workspace, index, task.parameters, task.fraction_bits)
    if FIRST == 0:
        lo, hi, inside = first_bracket(segment)
        bracket = Bracket(lo, hi, inside)
    else:
        bracket = load_bracket(segment.here)
    for phase in tl.static_range(FIRST, END):
        if phase < PASSES:
            bracket = narrow_bracket(share, segment, bracket, task.capacity, PASSED_BEFORE + phase + 1, phase, C)
        else:
            collect_and_solve(share, segment, bracket, task, C)


@triton.jit
def select_kernel(task: Task, C: tl.constexpr):
    """Solve every segment, or one phase of it; grid S × programs, which stride over the tiles.

    Reads   losses (S, n) float32 once in each phase, or not at all where no pass is needed; in the last one then the
            short list (S, capacity) float32, or the losses again, once a round by one program; workspace: the
            statistics of stage one.
    Writes  outputs.
    Bytes   4 read a pixel and phase, and 4 read and written for each loss in the bracket.
    Rounds  none where the list is sorted; else at most 31 (see `bracket.propose`), 3 or 4 as a rule: Newton's steps.
    Waits   with C.wait, in a launch of more than one phase, for the other programs of the segment after each pass: then
            all programs must be on the device at once, which a cooperative launch guarantees.
    """
    wait_for_launch_before()
    program = tl.program_id(0)
    solve_segment(task, (program // task.programs).to(tl.int64), program % task.programs, 0, C)


def task_for(
    losses: Tensor, short_list: Tensor, workspace: Tensor, outputs: Outputs, parameters: Parameters, programs: int
) -> Task:
    """For losses (S, n)."""
    length, capacity = losses.shape[1], short_list.shape[1]
    units = length // unit_of(length)
    return Task(losses, short_list, workspace, outputs, parameters, units, capacity, fraction_bits(length), programs)


def solve_by_selection(
    losses: Tensor,
    short_list: Tensor,
    workspace: Tensor,
    outputs: Outputs,
    parameters: Parameters,
    reduction: str,
    config: SelectConfig,
    cooperative: bool = False,
) -> None:
    """Fill the outputs from losses (S, n) and the workspace of stage one.

    Launches: 1, and one more for each of config.passes that n exceeds; with `cooperative` always 1, if all programs fit
    on the device at once.

    Raises:
        TooLarge: with `cooperative`, if they don't; nothing was launched.
    """
    segments, length = losses.shape
    passes = passes_for(length, config)
    phases = [(0, passes + 1)] if cooperative else [(phase, phase + 1) for phase in range(passes + 1)]
    unit, power = unit_of(length), power_for(parameters, config.approximation)
    solve_block = config.exact_solve_block if power == "exact" else config.solve_block
    tiles = (config.block, neighbours(unit, config), solve_block, config.sorted)
    constants = [Constants(unit, passes, *phase, cooperative, reduction, power, *tiles) for phase in phases]
    programs = programs_a_row(length, segments, config, losses.device)
    task = task_for(losses, short_list, workspace, outputs, parameters, programs)
    if cooperative:
        room = resident_programs(select_kernel, (task,), (constants[0],), config.warps, losses.device)
        # One after another, as in the interpreter, programs can't wait for each other: one a segment.
        programs = 1 if room is None else min(programs, room // segments)
        if programs < 1:
            raise TooLarge(f"{segments} segments, but only {room} programs are on the device at once")
        task = task._replace(programs=programs)
    for C in constants:
        launch(select_kernel, segments * programs, (task,), (C,), config.warps, cooperative)
