"""The search for the pivots on the host, in NumPy: short segments are sorted, of long ones the losses near α*.

What is looked for says `search`. One segment after another, since Python's own numbers cost less than arrays of a few.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import host
from .host import Array, np
from .powers import LOG2E, log2_ratio_near
from .types import IGNORED

SORTED_LENGTH = 1 << 13
"""Losses of a segment up to which all are sorted, at most `host.BLOCK`; of more all are counted and a few sorted."""


class Found(NamedTuple):
    """Of one segment, see `search.Crossing`."""

    valid: int
    poisoned: bool
    m: float
    pivot: float
    above: int
    power_sum: float
    tied: int
    heavy: float


@host.quiet
def segments(losses: Array, ratio: float, q: float) -> list[Array]:
    """The columns of a `search.Crossing`, (S,) each, of losses (S, n)."""
    rows = [_counted(row, ratio, q) if len(row) > SORTED_LENGTH else _sorted(row, ratio, q) for row in losses]
    types = np.int64, np.bool_, np.float64, losses.dtype, np.int64, np.float64, np.int64, np.float64
    return [np.array(column, dtype) for column, dtype in zip(zip(*rows, strict=True), types, strict=True)]


def _support(valid: int, ratio: float) -> float:
    return max(1.0, min(valid, ratio * valid))  # all of them if the ratio is not a number


def _sorted(row: Array, ratio: float, q: float) -> Found:
    """All losses (n,) sorted: Algorithm 1 of the paper."""
    ascending = np.sort(row)  # ignored ones first, NaN last
    ascending = ascending[ascending.searchsorted(row.dtype.type(IGNORED), "right") :]
    valid = len(ascending)
    m = _support(valid, ratio)
    if not valid or np.isnan(ascending[-1]):
        return Found(valid, valid > 0, m, 0.0, 0, 0.0, 0, 0.0)
    found = _scan(ascending, Outside(0.0, 0.0, 0, 0.0), m, q)
    if m >= valid or q == 1:
        found = found._replace(heavy=_sum(ascending))
    return found


def _counted(row: Array, ratio: float, q: float) -> Found:
    """Of losses (n,) a histogram narrows α* down to a factor of 1 + 2^-7; what lies in there is sorted.

    Were every loss the lower edge of its bin, α* would be `low`; were it the upper one, at most that factor more.
    """
    integer, bits = (np.int32, 31) if row.dtype == np.float32 else (np.int64, 63)
    shift, exponent_bits = bits - 15, 8 if bits == 31 else 11
    counts = host.histogram(row.view(integer), shift)
    infinite = ((1 << exponent_bits) - 1) << (15 - exponent_bits)
    ignored = (int(row.dtype.type(IGNORED).view(integer)) >> shift) & 0xFFFF
    valid = len(row) - int(counts[ignored])
    m = _support(valid, ratio)
    if counts[infinite : 1 << 15].any():
        return Found(valid, True, m, 0.0, 0, 0.0, 0, 0.0)
    used = np.flatnonzero(counts[1:infinite]) + 1
    count = counts[used]
    up_to = count.cumsum()
    positive = int(up_to[-1]) if len(used) else 0
    above = positive - up_to
    mantissa_bits = 15 - exponent_bits
    edges = (used >> mantissa_bits) + _log2_mantissas(mantissa_bits)[used & ((1 << mantissa_bits) - 1)]
    enough = np.count_nonzero(above + count >= m) - 1  # the bin of the ⌈m⌉-th largest loss: α* is not below
    if enough < 0 and np.count_nonzero(row > 0) == positive:
        return Found(valid, False, m, 0.0, positive, 0.0, 0, _sum(row))
    bias = (1 << (exponent_bits - 1)) - 1
    if enough < 0 or edges[enough] < bias // 2:  # from there on denormal numbers, whose bins are wide, add nothing
        return _sorted(row, ratio, q)
    log2_power = q * (edges - edges[enough])
    power = np.exp2(np.minimum(log2_power, 900.0))
    power_sum = (count * power).cumsum() / power
    last = np.flatnonzero((above + power_sum >= m) & (log2_power < 900.0))[-1]
    margin = 2.0**-20
    log2_low = edges[last] - bias + math.log2(power_sum[last] / (m - above[last])) / q
    low = 2.0 ** min(log2_low, 1023.5) * (1 - margin)
    high = low * (1 + 2.0**-mantissa_bits) * (1 + 3 * margin) if log2_low < 1023.5 else math.inf
    most = np.finfo(row.dtype).max
    t, high = (float(row.dtype.type(min(x, most))) for x in (low, high))

    power_total, total, beyond, inside = _sums(row, t, high, q)
    # Each loss above t has added (t/t)^q = 1, and each that is not above `high` has added that.
    below, heavy = power_total - (beyond + len(inside)), total - (len(row) - beyond) * high
    found = _scan(np.sort(inside), Outside(t, below, beyond, heavy), m, q)
    if m >= valid or q == 1:
        found = found._replace(heavy=_sum(row))
    return found._replace(valid=valid)


@functools.cache
def _log2_mantissas(bits: int) -> Array:
    """log2 of 1 + i·2^-bits."""
    return np.log2(1 + np.arange(1 << bits) / (1 << bits))


def _pieces(row: Array) -> Iterator[Array]:
    """That stay in the cache."""
    return (row[start : start + host.BLOCK] for start in range(0, len(row), host.BLOCK))


def _sum(row: Array) -> float:
    """Of what is positive."""
    return float(sum(np.maximum(ell, 0).sum(dtype=np.float64) for ell in _pieces(row)))


def _sums(row: Array, t: float, high: float, q: float) -> tuple[float, float, int, Array]:
    """Of losses (n,): Σ (min(ℓ, t)/t)^q over the positive ones, Σ max(ℓ, high) over all, how many are above `high`, and
    those in (t, high]."""
    power_total, total, beyond, inside = 0.0, 0.0, 0, []
    for ell in _pieces(row):
        x = np.clip(ell, 0, t)
        if q <= host.LARGE:
            x /= t
            np.log(x, out=x)
            x *= q * LOG2E
        else:  # only the powers of losses close to t count, and their logarithms must be exact
            x = log2_ratio_near(torch.from_numpy(x), t).mul_(q).numpy()
        host.exp2(x)
        power_total += float(x.sum(dtype=np.float64))
        total += float(np.maximum(ell, high, out=x).sum(dtype=np.float64))
        near, over = ell > t, ell > high
        beyond += int(np.count_nonzero(over))
        inside.append(ell[near ^ over])
    return power_total, total, beyond, np.concatenate(inside)


class Outside(NamedTuple):
    """What is known of the losses that are not among those sorted."""

    start: float
    """All sorted ones are larger; a number with f ≥ 0, or 0."""
    below: float
    """Σ_{ℓ ≤ start} (ℓ/start)^q."""
    beyond: int
    """How many losses are larger than all of the sorted ones."""
    heavy: float
    """The sum of these."""


def _scan(ascending: Array, outside: Outside, m: float, q: float) -> Found:
    """The largest loss with f ≥ 0 among ascending ones, or else `start`; those not positive don't count.

    Powers are relative to the ⌈m⌉-th largest loss: α* is not below it, so the sums that count are 1 at least, and f < 0
    wherever a power is about to overflow.
    """
    start, power_sum, beyond, heavy = outside
    k, pivot, tied = len(ascending), ascending.dtype.type(start), 0
    at = min(k - (math.ceil(m) - beyond), k - 1)
    base = float(ascending[at]) if at >= 0 else start
    fits = np.arange(0)
    if k and base > 0:
        power = ascending.clip(0, None).astype(np.float64)
        if ascending.dtype == np.float64:  # from the difference, which is exact near 1
            power -= base
            power /= base
            np.log1p(power, out=power)
        else:  # no float64 that is not 1 is so near to it that its logarithm would be wrong
            power /= base
            np.log(power, out=power)
        power *= LOG2E * q
        host.exp2(power)
        sums = power.cumsum()
        sums += power_sum * np.exp2(LOG2E * q * np.log1p((start - base) / base))
        at, end = max(at, 0), int(power.searchsorted(2.0**900))
        # Of tied losses each counts those after it as larger: a 1 for a 1.
        fits = np.flatnonzero(sums[at:end] / power[at:end] - np.arange(at, end) >= m - beyond - (k - 1))
    if len(fits):
        pivot = ascending[at + fits[-1]]
    upper = int(ascending.searchsorted(pivot, "right"))
    if len(fits):
        tied = upper - int(ascending.searchsorted(pivot, "left"))
        power_sum = float(sums[upper - 1] / power[upper - 1])
    heavy += float(ascending[upper:].sum(dtype=np.float64))
    return Found(k, False, m, pivot, beyond + k - upper, power_sum, tied, heavy)
