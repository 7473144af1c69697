"""What the threshold search has to do, on losses of many kinds: counts by a simulation in NumPy, no kernel and no time.

    python perf/search.py [--bins 64 256 512] [--lengths 302500 …] [--p 1.3 …] [--csv FILE]
    python perf/search.py --conflicts

A row is one vector of losses, p and number of bins in the histogram of stage one. Its columns: losses left in the
bracket by that histogram (`first`), by one and by two passes of 256 bins each (`pass 1`, `pass 2`); then for each
capacity of the short list the passes it takes until the bracket fits, rounds of thresholds over the list, and bytes a
loss: four for the walk of each pass and of the listing, eight for each loss listed, four for each round over one. (The
kernels sort a short list instead, `SelectConfig.sorted`.)

With --conflicts: how many of the 32 losses of a warp meet in one bank of shared memory when they are counted in the
bins of stage one, on average of the fullest bank, losses in random order (neighbours in an image are more alike).

The steps are those of kernels/bracket.py and kernels/select.py in float64. By these tables bins, passes and capacity
in kernels/configs.py were chosen (perf/NOTES.md).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

RATIO = 0.25
LENGTHS = (321 * 321, 512 * 512, 550 * 550, 1 << 20, 1 << 23)
PS = (1.0, 1.05, 1.3, 3.0, 100.0)
BINS = (64, 256, 512)
CAPACITIES = (2048, 8192, 65536)
OCTAVES = 16
"""The bins of stage one divide so many, up to 2^5, into equal shares, but for the lowest bins."""
OCTAVE_BINS = 16
"""The lowest bins, an octave each. The first bin and the last one take the rest."""
MARGIN = 1e-4
FINE_BINS = 256
INFINITE = 0x7F800000


def distributions(n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Losses of an untrained and of a trained network, and harder ones."""
    rng = np.random.default_rng(n)
    yield "untrained", np.abs(2.94 + 0.3 * rng.standard_normal(n))
    yield "nearly constant", 2.94 + 1e-3 * rng.standard_normal(n)
    yield "trained", np.where(rng.random(n) < 0.05, rng.exponential(3, n), rng.exponential(0.01, n))
    yield "well trained", np.where(rng.random(n) < 0.01, rng.exponential(2, n), 10 ** rng.normal(-4, 1, n))
    yield "heavy tail", rng.lognormal(0, 5, n)
    yield "thirty orders", 10.0 ** -rng.uniform(0, 30, n)
    yield "ties", np.round(rng.exponential(1, n), 1)
    yield "all equal", np.full(n, 0.7)
    yield "one outlier", np.append(rng.random(n - 1) * 1e-6, 1e6)


class Bracket(NamedTuple):
    """lo < pivot ≤ hi, bit patterns, and how many losses lie in it."""

    lo: int
    hi: int
    inside: int


class Segment:
    """Losses in ascending order, and what is asked of them."""

    def __init__(self, losses: np.ndarray, p: float) -> None:
        ascending = np.sort(losses.astype(np.float32))
        self.bits = ascending.view(np.int32)
        self.log2 = np.log2(ascending, where=ascending > 0, out=np.full(len(ascending), -np.inf), dtype=np.float64)
        self.q = min(p / (p - 1), 2.0**40) if p > 1 else 2.0**40
        self.m = max(1.0, min(len(losses), RATIO * len(losses)))

    def upto(self, bits: int) -> int:
        """How many losses have at most this bit pattern."""
        return int(np.searchsorted(self.bits, bits, side="right"))

    def power_sum(self, low: int, high: int, t: int) -> float:
        """Σ (ℓ/t)^q over those of bits in (low, high]."""
        part = self.log2[self.upto(low) : self.upto(high)]
        return float(np.exp2(self.q * (part - log2(t))).sum())


def log2(bits: int) -> float:
    """Of a bit pattern."""
    return float(np.log2(np.int32(bits).view(np.float32), dtype=np.float64)) if bits > 0 else -np.inf


def float_bits(x: float) -> int:
    """The bit pattern of a float32, at most that of +inf."""
    return min(int(np.float32(min(x, 3e38)).view(np.int32)), INFINITE)


def bracket_of_bins(segment: Segment, edges: np.ndarray, lo: int, hi: int) -> Bracket:
    """As in kernels/bracket.py: bins (edges[k − 1], edges[k]], the first of them from lo on."""
    q, m = segment.q, segment.m
    below = np.searchsorted(segment.bits, np.concatenate([[lo], edges]), side="right")
    carried = segment.power_sum(0, lo, lo) if lo else 0.0
    least = most = carried
    found_lo, found_hi = lo, hi
    before = lo
    for k, upper in enumerate(map(int, edges)):
        count = int(below[k + 1] - below[k])
        decay = np.exp2(q * (log2(before) - log2(upper))) if before > 0 else 0.0
        least = (least + count) * decay
        most = most * decay + count
        above = len(segment.bits) - below[k + 1]
        if above + least * (1 - MARGIN) >= m:
            found_lo = max(found_lo, upper)
        if above + most * (1 + MARGIN) < m:
            found_hi = min(found_hi, upper)
        before = upper
    found_hi = max(found_hi, found_lo + 1)
    return Bracket(found_lo, found_hi, segment.upto(found_hi) - segment.upto(found_lo))


def first_edges(bins: int) -> np.ndarray:
    """The upper edges of the bins of stage one, bit patterns."""
    place = np.arange(bins)
    fine = ((127 + 5) << 23) - (bins - 1 - place) * ((1 << 23) * OCTAVES // bins)
    octave = fine[OCTAVE_BINS - 1] - ((OCTAVE_BINS - 1 - place) << 23)
    inner = np.where(place < OCTAVE_BINS, octave, fine) - 1
    inner[-1] = INFINITE - 1
    return inner


def first_bracket(segment: Segment, bins: int) -> Bracket:
    """By the histogram of stage one."""
    largest, inner = int(segment.bits[-1]), first_edges(bins)
    return bracket_of_bins(segment, np.unique(np.minimum(inner, largest)), 0, largest + 1)


def conflicts(losses: np.ndarray, bins: int) -> float:
    """Of the losses of a warp, those in the fullest of the 32 banks."""
    inner = first_edges(bins)
    banks = np.searchsorted(inner, losses.astype(np.float32).view(np.int32)).clip(0, bins - 1).reshape(-1, 32) % 32
    return float((banks[:, :, None] == np.arange(32)).sum(1).max(1).mean())


def finer(segment: Segment, bracket: Bracket) -> Bracket:
    """By one pass over it."""
    lo, hi, _inside = bracket
    shift = max((hi - lo - 1).bit_length() - FINE_BINS.bit_length() + 1, 0)
    edges = np.unique(np.minimum(lo + (np.arange(1, FINE_BINS + 1) << shift), hi))
    return bracket_of_bins(segment, edges, lo, hi)


def rounds(segment: Segment, bracket: Bracket) -> int:
    """Rounds of four thresholds until no loss is left, as `bracket.propose` and `narrow` take them."""
    q, m, n = segment.q, segment.m, len(segment.bits)
    base = segment.power_sum(0, bracket.lo, bracket.lo) if bracket.lo else 0.0

    def evaluate(t: int) -> tuple[int, float]:
        carried = base * np.exp2(q * (log2(bracket.lo) - log2(t))) if bracket.lo else 0.0
        return n - segment.upto(t), carried + segment.power_sum(bracket.lo, t, t)

    def newton(t: int, above: int, powers: float) -> int:
        c = m - above
        return float_bits(2 ** (log2(t) + np.log2(powers / c) / q)) if c > 0 and t > 0 and powers > 0 else INFINITE

    lo, hi = bracket.lo, bracket.hi
    lo_above, lo_powers = n - segment.upto(lo), base
    hi_above, hi_powers = n - segment.upto(hi), 0.0
    taken = 0
    while hi - lo > 1 and lo_above > hi_above:
        taken += 1
        step = min(newton(lo, lo_above, lo_powers), newton(hi, hi_above, hi_powers))
        fifth = (hi - lo) // 5
        if step == INFINITE:
            tried = [lo + k * fifth + k // 2 for k in (1, 2, 3, 4)]
        else:
            chord = lo + fifth
            if hi_powers > 0 and lo > 0:
                u = np.exp2(q * (log2(lo) - log2(hi)))
                f_lo, f_hi = max(lo_above + lo_powers - m, 0.0) * u, m - hi_above - hi_powers
                u += (1 - u) * f_lo / (f_lo + f_hi)
                chord = float_bits(2 ** (log2(hi) + np.log2(max(u, 1e-300)) / q)) - 4
            tried = [step + 4, step - 4, chord, lo + (hi - lo) // 2]
        for t in sorted({min(max(t, lo + 1), hi - 1) for t in tried}):
            above, powers = evaluate(t)
            if above + powers >= m:
                lo, lo_above, lo_powers = t, above, powers
            else:
                hi, hi_above, hi_powers = t, above, powers
                break
    return taken


def simulate(name: str, losses: np.ndarray, p: float, all_bins: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """One row for each number of bins."""
    segment, n = Segment(losses, p), len(losses)
    for bins in all_bins:
        brackets = [first_bracket(segment, bins)]
        for _ in range(2):
            brackets.append(finer(segment, brackets[-1]))
        left = [bracket.inside for bracket in brackets]
        row: dict[str, object] = {"n": n, "losses": name, "p": p, "bins": bins, "first": left[0]}
        row |= {"pass 1": left[1], "pass 2": left[2]}
        known: dict[int, int] = {}
        for capacity in CAPACITIES:
            passes = next((k for k, inside in enumerate(left) if inside <= capacity), 2)
            if passes not in known:
                known[passes] = rounds(segment, brackets[passes])
            listed = left[passes]
            each = listed if listed <= capacity else n
            row[f"passes, {capacity}"] = passes
            row[f"rounds, {capacity}"] = known[passes]
            row[f"bytes, {capacity}"] = 4 * (passes + 1) + (8 * listed + 4 * each * known[passes]) / n
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bins", type=int, nargs="+", default=BINS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--p", type=float, nargs="+", default=PS)
    parser.add_argument("--csv")
    parser.add_argument("--conflicts", action="store_true")
    options = parser.parse_args()
    if options.conflicts:
        every = dict(distributions(1 << 16))
        table = {bins: {name: conflicts(losses, bins) for name, losses in every.items()} for bins in options.bins}
        print(pd.DataFrame(table).to_string(float_format=lambda x: f"{x:.1f}"))
        return
    found = pd.DataFrame(
        row
        for n in options.lengths
        for name, losses in distributions(n)
        for p in options.p
        for row in simulate(name, losses, p, tuple(options.bins))
    )
    if options.csv:
        found.to_csv(options.csv, index=False, float_format="%.4g")
    print(found.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


if __name__ == "__main__":
    main()
