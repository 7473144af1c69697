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

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .bracket import THRESHOLDS, End, add_powers, decay, first_bracket, narrow, propose
from .configs import SortConfig, fraction_bits
from .launcher import launch, wait_for_launch_before
from .layout import unit_of
from .numerics import bits_float, float_bits, from_fixed, from_normalised, normaliser, power, to_fixed
from .solution import Outputs, Parameters, load_segment, write_solution
from .workspace import FINISHED, ROUNDS, take_ticket


class Task(NamedTuple):
    """What the kernel reads and writes, see there."""

    losses: Tensor
    sorted_runs: Tensor
    powers: Tensor | None
    sums: Tensor | None
    workspace: Tensor
    outputs: Outputs
    parameters: Parameters
    runs: tl.int32
    """Of a segment."""
    length: tl.int32
    """n, in units (see `layout.unit_of`)."""
    fraction_bits: tl.int32


class Constants(NamedTuple):
    """What the kernel is compiled for."""

    reduction: str
    one_run: bool
    """A segment is one run."""
    unit: int
    run: int
    steps: int
    """log2(run) + 1, the steps of a binary search."""
    lanes: int


class Runs(NamedTuple):
    """The sorted runs of a segment."""

    losses: Any
    """Ascending bit patterns."""
    powers: Any
    sums: Any
    count: Any


@triton.jit
def positions(losses, first, thresholds, C: tl.constexpr):
    """How many losses of each run are ≤ each threshold (bit pattern); first: where the runs begin.

    .cg: other programs wrote the runs, and the first-level cache is not coherent.
    """
    RUN: tl.constexpr = C.run
    STEPS: tl.constexpr = C.steps
    position = (first * 0).to(tl.int32) + thresholds * 0
    for i in tl.static_range(STEPS):
        candidate = position + (RUN >> i)
        fits = candidate <= RUN
        last = tl.load(losses + first + candidate - 1, mask=fits, other=0, cache_modifier=".cg")
        position = tl.where(fits & (last <= thresholds), candidate, position)
    return position


@triton.jit
def evaluate_runs(runs, thresholds, q, fraction_bits, C: tl.constexpr):
    """|{ℓ > t}| and, in fixed point, Σ_{ℓ ≤ t} (ℓ/t)^q over all runs, for each of the thresholds t (bit patterns)."""
    RUN: tl.constexpr = C.run
    LANES: tl.constexpr = C.lanes
    above = tl.zeros([THRESHOLDS, LANES], tl.int64)
    totals = tl.zeros([THRESHOLDS, LANES], tl.int64)
    t = bits_float(thresholds)[:, None]
    for start in range(0, runs.count, LANES):
        lane = start + tl.arange(0, LANES)
        there = (lane < runs.count)[None, :]
        first = (tl.where(lane < runs.count, lane, 0).to(tl.int64) * RUN)[None, :]
        position = positions(runs.losses, first, thresholds[:, None], C)
        above += tl.where(there, RUN - position, 0).to(tl.int64)
        some = there & (position > 0)
        last = bits_float(tl.load(runs.losses + first + position - 1, mask=some, other=0, cache_modifier=".cg"))
        share = tl.load(runs.powers + first + position - 1, mask=some, other=0.0, cache_modifier=".cg")
        share = tl.where(share > 0, share * power(tl.minimum(tl.maximum(last, 0.0), t), t, q, "exact"), 0.0)
        totals += to_fixed(share, fraction_bits)
    return tl.sum(above, 1), tl.sum(totals, 1)


@triton.jit
def heaviest_of_runs(runs, pivot_bits, fraction_bits, C: tl.constexpr):
    """Σ ℓ (normalised, fixed point) of the losses above the pivot, and how many equal it."""
    RUN: tl.constexpr = C.run
    LANES: tl.constexpr = C.lanes
    total = tl.zeros([LANES], tl.int64)
    ties = tl.zeros([LANES], tl.int64)
    for start in range(0, runs.count, LANES):
        lane = start + tl.arange(0, LANES)
        there = lane < runs.count
        first = tl.where(there, lane, 0).to(tl.int64) * RUN
        threshold = tl.zeros([LANES], tl.int32) + pivot_bits
        position = positions(runs.losses, first, threshold, C)
        ties += tl.where(there, position - positions(runs.losses, first, threshold - 1, C), 0).to(tl.int64)
        some = there & (position < RUN)
        heavy = tl.load(runs.sums + first + position, mask=some, other=0.0, cache_modifier=".cg")
        total += to_fixed(heavy, fraction_bits)
    return tl.sum(total, 0), tl.sum(ties, 0)


@triton.jit
def search_runs(runs, segment, C: tl.constexpr):
    """The pivot (an `End`), and how many rounds it took."""
    bracket_lo, bracket_hi, _listed = first_bracket(segment)
    max_bits, m = segment.max_bits, segment.m
    k = tl.arange(0, THRESHOLDS)
    # The first thresholds find out what holds at the ends of the bracket, and at 0.
    t = bracket_lo + (bracket_hi - bracket_lo) // 2
    t = tl.where(k == 0, 0, tl.where(k == 1, bracket_lo, tl.where(k == 2, bracket_hi, t)))
    t = tl.minimum(t, max_bits)
    lo = End(tl.cast(-1, tl.int32), segment.n, m * 0.0)
    hi = End(max_bits + 1, segment.n * 0, m * 0.0)
    rounds = 0
    while (hi.bits - lo.bits > 1) & (lo.above > hi.above) & (segment.poisoned == 0):
        if rounds > 0:
            t = propose(lo, hi, m, segment.q32)
        above, powers = evaluate_runs(runs, t, segment.q32, segment.fraction_bits, C)
        lo, hi = narrow(lo, hi, t, above, from_fixed(powers, segment.fraction_bits), m)
        rounds += 1
    return End(tl.maximum(lo.bits, 0), lo.above, lo.powers), rounds


@triton.jit
def sort_kernel(task: Task, C: tl.constexpr):
    """Solve every segment; grid S × runs, one program a run.

    Reads   losses (S, n) float32 once; workspace: the statistics of stage one; then, by one program a segment, about
            log2(C.run) sorted losses of every run a threshold.
    Writes  sorted_runs (S, runs, C.run) int32: ascending bit patterns, ignored pixels first; powers and sums, of the
            same shape, float32: A and B (None with C.one_run); outputs.
    Bytes   4 read, 4 written and read again a pixel, 8 more written without C.one_run.
    Rounds  none with C.one_run, otherwise at most 32: one to see what the bracket is, then as `select_kernel`.
    """
    wait_for_launch_before()
    RUN: tl.constexpr = C.run
    REDUCTION: tl.constexpr = C.reduction  # Triton 3.6: a string can't be handed on as a field
    program = tl.program_id(0)
    length = task.length * C.unit
    index = (program // task.runs).to(tl.int64)
    fraction_bits = task.fraction_bits

    place = tl.arange(0, RUN)
    at = program % task.runs * RUN + place
    x = tl.load(task.losses + index * length + at, mask=at < length, other=-1.0)
    # As integers: −1 is negative, and a NaN (the segment is poisoned then) can't upset the order.
    bits = tl.sort(float_bits(x))
    # Not before: sorting needs the registers.
    segment = load_segment(task.workspace, index, task.parameters, fraction_bits)
    norm = normaliser(bits_float(segment.max_bits))
    ours = program.to(tl.int64) * RUN + place
    tl.store(task.sorted_runs + ours, bits)
    tl.debug_barrier()  # the neighbour's loss may be in another thread
    before = bits_float(tl.maximum(tl.load(task.sorted_runs + ours - 1, mask=place > 0, other=0), 0))
    ell = bits_float(tl.maximum(bits, 0))
    loss_decay = decay(tl.minimum(before, ell), ell, segment.q32)
    _decay, powers = tl.associative_scan((loss_decay, (bits > 0).to(tl.float32)), 0, add_powers)

    if C.one_run:
        # η ≤ 0, that is f ≥ 0: up to the pivot, and from there on never again.
        is_lo = (bits > 0) & ((RUN - 1 - place).to(tl.float64) + powers.to(tl.float64) >= segment.m)
        lo = tl.max(tl.where(is_lo, bits, 0), 0)
        over = bits > lo
        at_pivot = (bits == lo) & (bits > 0)
        heavy = tl.sum(tl.where(over, to_fixed(ell * norm, fraction_bits - 2), 0), 0)
        heavy = from_normalised(heavy, fraction_bits - 2, bits_float(segment.max_bits))
        ties = tl.sum(at_pivot.to(tl.int64), 0)
        pivot = End(lo, tl.sum(over.to(tl.int64), 0), tl.max(tl.where(at_pivot, powers, 0.0), 0).to(tl.float64))
        write_solution(task.workspace, task.outputs, segment, pivot, heavy, ties, REDUCTION)
    else:
        tl.store(task.powers + ours, powers)
        # Added as integers: no rounding but the last.
        sum_above = tl.cumsum(to_fixed(ell * norm, fraction_bits - 2), 0, reverse=True)
        tl.store(task.sums + ours, from_fixed(sum_above, fraction_bits - 2).to(tl.float32))
        if take_ticket(segment.here + FINISHED) == task.runs - 1:
            first = index * task.runs * RUN
            runs = Runs(task.sorted_runs + first, task.powers + first, task.sums + first, task.runs)
            pivot, rounds = search_runs(runs, segment, C)
            tl.store(segment.here + ROUNDS, rounds)
            heavy, ties = heaviest_of_runs(runs, pivot.bits, fraction_bits - 2, C)
            heavy = from_normalised(heavy, fraction_bits - 2, bits_float(segment.max_bits))
            write_solution(task.workspace, task.outputs, segment, pivot, heavy, ties, REDUCTION)


def solve_by_sorting(
    losses: Tensor,
    scratch: Tensor,
    workspace: Tensor,
    outputs: Outputs,
    parameters: Parameters,
    reduction: str,
    config: SortConfig,
) -> None:
    """As `select.solve_by_selection`, with scratch (1 or 3, S·runs·run) int32: 1 where n ≤ run. Launches: 1."""
    segments, length = losses.shape
    unit = unit_of(length)
    runs = -(-length // config.run)
    sorted_runs, *rest = scratch
    powers, sums = (x.view(losses.dtype) for x in rest) if rest else (None, None)
    buffers = (losses, sorted_runs, powers, sums, workspace, outputs, parameters)
    task = Task(*buffers, runs, length // unit, fraction_bits(length))
    constants = Constants(reduction, runs == 1, unit, config.run, config.run.bit_length(), config.lanes)
    launch(sort_kernel, segments * runs, (task,), (constants,), config.warps, registers=config.registers)
