"""The statistics of each segment: one int64 tensor, zeroed on the stream for every call.

A segment has WORDS entries; one more entry, after the last segment, counts the segments that are solved.
All of it is integers and filled by atomic adds and maxima, so the order of the programs leaves no trace.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .numerics import INF_BITS, float_bits

MAXIMUM = tl.constexpr(0)  # bit pattern of the largest loss; NaN (a poisoned segment) exceeds every number
VALID = tl.constexpr(1)  # n
BELOW_POWERS = tl.constexpr(2)  # Σ (ℓ/lo)^q over ℓ ≤ lo, fixed point
ABOVE_COUNT = tl.constexpr(3)  # |{ℓ > hi}|
ABOVE_SUM = tl.constexpr(4)  # Σ ℓ over ℓ > hi, normalised, fixed point
LISTED = tl.constexpr(5)  # how many losses lie in the bracket (lo, hi]
FINISHED = tl.constexpr(6)  # programs that are through with their share: the last one solves
LO = tl.constexpr(7)  # the bracket (LO, HI] a pass before the solver came to, bit patterns
HI = tl.constexpr(8)
INSIDE = tl.constexpr(9)  # how many losses it holds at most
ROUNDS = tl.constexpr(10)  # rounds of thresholds the solver took, for perf/solvers.py
PASSED = tl.constexpr(11)  # in a cooperative launch: phases that all programs of the segment are through with
HISTOGRAM = tl.constexpr(16)  # counts of the bins, by stage one
BINS = tl.constexpr(256)
FINE = tl.constexpr(272)  # counts of the finer bins of a bracket, zero again after each pass
FINE_BITS = tl.constexpr(8)
FINE_BINS = tl.constexpr(1 << 8)
WORDS = tl.constexpr(528)

# From 2^-10 to 2^5 a bin is 1/16 of an octave: bits >> 19 counts those, so that bin 16 is the first of them. Below they
# are an octave each, for well trained networks, whose losses are mostly small: bits >> 23 counts these, from 2^-26.
# Bin 0 takes all smaller losses, too, the last one all larger.
OCTAVE_BINS = tl.constexpr(16)
OCTAVE_SHIFT = tl.constexpr(23)
BIN_SHIFT = tl.constexpr(19)
FIRST_OCTAVE = tl.constexpr((127 - 26) << 23)  # the bit patterns where bin 0 would begin, by either count
FIRST_BIN = tl.constexpr((127 - 11) << 23)


class Statistics(NamedTuple):
    """Of the losses that a program has seen so far, in registers."""

    maximum: Any
    """int32, the shape of a tile, as count: reduced once a program."""
    count: Any
    histogram: Any
    """(BINS,) int32."""


@triton.jit
def no_statistics(BLOCK: tl.constexpr):
    """Of no losses, for tiles of BLOCK."""
    return Statistics(tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32), tl.zeros([BINS], tl.int32))


@triton.jit
def tally(statistics, loss, valid):
    """The statistics with a tile of losses added."""
    bits = tl.where(valid, float_bits(loss) & 0x7FFFFFFF, 0)
    # Each count is the smaller one where the other holds.
    octave = tl.minimum(tl.maximum((bits - FIRST_OCTAVE) >> OCTAVE_SHIFT, 0), OCTAVE_BINS - 1)
    bins = tl.minimum(tl.maximum((bits - FIRST_BIN) >> BIN_SHIFT, octave), BINS - 1)
    return Statistics(
        tl.maximum(statistics.maximum, bits),
        statistics.count + valid.to(tl.int32),
        statistics.histogram + tl.histogram(bins, BINS),
    )


@triton.jit
def publish(here, statistics):
    """Add a program's statistics to those of its segment, whose words begin here: two atomics and one a filled bin."""
    tl.atomic_max(here + MAXIMUM, tl.max(statistics.maximum, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(here + VALID, tl.sum(statistics.count, 0).to(tl.int64), sem="relaxed")
    bins = tl.arange(0, BINS)
    # Bin 0 also holds ignored pixels; nobody reads it, n − Σ of the others is the true count.
    some = (bins > 0) & (statistics.histogram > 0)
    tl.atomic_add(here + HISTOGRAM + bins, statistics.histogram.to(tl.int64), mask=some, sem="relaxed")


@triton.jit
def poison(loss, good):
    """The loss where it is a finite number ≥ 0 and `good` holds, else NaN."""
    return tl.where(good & (loss >= 0) & (float_bits(loss) < INF_BITS), loss, float("nan"))


@triton.jit
def take_ticket(counter):
    """How many programs came here before. What they wrote can be read after, past the first-level cache."""
    tl.debug_barrier()  # Triton 3.6 puts none of its own before a scalar release, nor after the acquire
    ticket = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return ticket


@triton.jit
def raise_flag(flag):
    """One program says that all of them are through with a phase, and that what was written in it can be read."""
    tl.debug_barrier()
    tl.atomic_add(flag, 1, sem="release")


@triton.jit
def wait_for(flag, value):
    """Wait until a flag has been raised `value` times. The program that raises it must be running or done."""
    while tl.atomic_add(flag, 0, sem="acquire") < value:
        pass
    tl.debug_barrier()
