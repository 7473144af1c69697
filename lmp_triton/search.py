"""Where the pivot of each segment lies: in rounds, which read no value, or on the host, by counting and sorting.

With f(t) = |{ℓ > t}| + Σ_{ℓ ≤ t} (ℓ/t)^q − m, which falls as t grows, α* is the largest root of f. A pivot is a number
of the type of the losses with f(pivot) ≥ 0 such that no loss lies strictly between it and α*; 0 if fewer than m
losses are positive. A number ≥ 0 and its bit pattern read as an integer are ordered alike, and so are the leading bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import checks, distributed, host
from .host import LOG2E, Array, np
from .settings import compiling, exporting, on_host, traced
from .slices import cut_pixels
from .types import IGNORED

Q_CAP = {torch.float32: 2.0**40, torch.float64: 2.0**70}
"""Above it q changes nothing: two different losses differ by at least a rounding error, 2^-24 or 2^-53, and that to
the power of the cap is 0. Capped, p = 1 (q = ∞) needs no case of its own: (ℓ/t)^q is 1 for ℓ = t and else 0."""

PATTERNS = {torch.float32: (torch.int32, 31, 0x7F7FFFFF), torch.float64: (torch.int64, 63, 0x7FEFFFFFFFFFFFFF)}
"""The integer type that a loss is read as, the bits that make up a number ≥ 0, and the pattern of the largest."""

BUCKETS_LOG2 = 11
"""A round of the search looks at 2^11 thresholds: three rounds pin down all 31 bits of a float32, six a float64."""

SORTED_LENGTH = 1 << 13
"""Losses of a segment up to which the host sorts them all, at most `host.BLOCK`; of more it counts all, sorts a few."""


class Crossing(NamedTuple):
    """What a search finds, tensors or arrays (S,): counts int64, the pivot in the type of losses, the others wide."""

    valid: Any
    """n."""
    poisoned: Any
    """Whether a loss is NaN; nothing else holds then."""
    m: Any
    pivot: Any
    above: Any
    """|{ℓ > pivot}|."""
    power_sum: Any
    """Σ_{ℓ ≤ pivot} (ℓ/pivot)^q; 0 for pivot 0."""
    tied: Any = None
    """|{ℓ = pivot}|, where the search has come by it."""


def wide(device: torch.device) -> torch.dtype:
    """The type for scalars of a segment: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def log2_ratio_near(x: Tensor, t: Tensor | float) -> Tensor:
    """log2(x/t) for 0 ≤ x ≤ 2t: from the difference, which is exact near 1. Nothing overflows.

    With d = x/t − 1 it is 2·atanh(d/(2 + d)). (log1p(d) would do as well; PyTorch's CPU code takes thirteen times
    as long for it as for atanh.)
    """
    d = (x - t).div_(t)
    return d.div_(d + 2).atanh_().mul_(2 * LOG2E)


def support(valid: Tensor, ratio: Tensor) -> Tensor:
    """m = clamp(ratio·n, 1, n), and 1 for n = 0; real, never rounded."""
    n = valid.to(ratio.dtype)
    return torch.minimum(ratio * n, n).clamp_min(1.0)


# --- on the host --------------------------------------------------------------------------------------------------


@host.quiet
def on_the_host(losses: Tensor, ratio: Any, q: Any) -> Crossing:
    """By looking at values, in NumPy: short segments are sorted, of long ones the few losses near α*.

    Arguments: `in_rounds`, ratio and q also as numbers. The sums are of floating numbers; all it finds are arrays.
    """
    ell, ratio, q = host.array(losses), float(ratio), float(q)
    if losses.shape[1] <= SORTED_LENGTH:
        found = [_sorted(some, ratio, q) for _, (some,) in host.blocks(ell)]
    else:
        found = [_counted(row, ratio, q) for row in ell]
    return Crossing(*(np.concatenate(each) for each in zip(*found, strict=True)))


@custom_op("lmp_triton::crossing", mutates_args=(), device_types="cpu")
def _crossing(
    losses: Tensor, ratio: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`on_the_host`, where a graph is compiled for the CPU: one opaque node, which may look at values."""
    checks.transforms(losses)
    valid, poisoned, m, pivot, above, power_sum, tied = map(torch.from_numpy, on_the_host(losses, ratio, q))
    return valid, poisoned, m, pivot, above, power_sum, tied


@_crossing.register_fake
def _(losses: Tensor, ratio: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def each(dtype: torch.dtype) -> Tensor:
        return losses.new_empty(losses.shape[0], dtype=dtype)

    count, real = torch.int64, torch.float64
    return each(count), each(torch.bool), each(real), each(losses.dtype), each(count), each(real), each(count)


def gives_arrays(losses: Tensor, group: Any = None) -> bool:
    """Whether `find` searches in NumPy, and takes and gives no tensors of a few numbers."""
    return group is None and host.serves(losses)


def find(losses: Tensor, ratio: Any, q: Any, group: Any = None) -> Crossing:
    """By whichever way fits. What is exported is to run without this package: in rounds. Arguments: `in_rounds`."""
    if gives_arrays(losses, group):
        return on_the_host(losses, ratio, q)
    if losses.device.type == "cpu" and group is None and host.PRESENT and traced() and not exporting():
        return Crossing(*torch.ops.lmp_triton.crossing(losses, ratio, q))
    return in_rounds(losses, ratio, q, group)


Found = tuple[Array, Array, Array, Array, Array, Array, Array]
"""The arrays of a `Crossing`."""


def _support(valid: Array, ratio: float) -> Array:
    return np.maximum(np.minimum(ratio * valid, valid), 1.0)


def _sorted(losses: Array, ratio: float, q: float) -> Found:
    """All losses of every segment sorted: Algorithm 1 of the paper."""
    ascending = np.sort(losses, 1)  # ignored ones first, NaN last
    valid = losses.shape[1] - np.count_nonzero(ascending == IGNORED, 1)
    m, nothing = _support(valid, ratio), np.zeros(len(losses))
    found = _scan_sorted(ascending, np.zeros_like(valid), nothing, nothing, m, q)
    return valid, np.isnan(ascending[:, -1]), m, *found


def _counted(row: Array, ratio: float, q: float) -> Found:
    """One long segment, (n,): a histogram narrows α* down to a factor of 1 + 2^-7; what lies in there is sorted.

    Were every loss the lower edge of its bin, α* would be `low`; were it the upper one, at most that factor more.
    """
    integer, bits = (np.int32, 31) if row.dtype == np.float32 else (np.int64, 63)
    shift, exponent_bits = bits - 15, 8 if bits == 31 else 11
    counts = host.histogram(row.view(integer), shift)
    infinite = ((1 << exponent_bits) - 1) << (15 - exponent_bits)
    ignored = (int(row.dtype.type(IGNORED).view(integer)) >> shift) & 0xFFFF
    valid = np.array([len(row) - counts[ignored]])
    m = _support(valid, ratio)
    poisoned = np.array([counts[infinite : 1 << 15].any()])
    none, nothing = np.zeros_like(valid), np.zeros(1)
    used = np.flatnonzero(counts[1:infinite]) + 1
    if poisoned[0] or not len(used):
        if poisoned[0] or not (row > 0).any():
            return valid, poisoned, m, np.zeros(1, row.dtype), none, nothing, none
        return _sorted(row[None], ratio, q)

    count = counts[used]
    up_to = count.cumsum()
    above = up_to[-1] - up_to
    mantissa_bits = 15 - exponent_bits
    edges = (used >> mantissa_bits) + _log2_mantissas(mantissa_bits)[used & ((1 << mantissa_bits) - 1)]
    enough = np.count_nonzero(above + count >= m) - 1  # the bin of the ⌈m⌉-th largest loss: α* is not below
    if enough < 0 and np.count_nonzero(row > 0) == up_to[-1]:
        return valid, poisoned, m, np.zeros(1, row.dtype), up_to[-1:], nothing, none
    bias = (1 << (exponent_bits - 1)) - 1
    if enough < 0 or edges[enough] < bias // 2:  # from there on denormal numbers, whose bins are wide, add nothing
        return _sorted(row[None], ratio, q)
    log2_power = q * (edges - edges[enough])
    power = np.exp2(np.minimum(log2_power, 900.0))
    power_sum = (count * power).cumsum() / power
    last = np.flatnonzero((above + power_sum >= m) & (log2_power < 900.0))[-1]
    margin = 2.0**-20
    log2_low = edges[last] - bias + math.log2(power_sum[last] / (m[0] - above[last])) / q
    low = 2.0 ** min(log2_low, 1023.5) * (1 - margin)
    high = low * (1 + 2.0**-mantissa_bits) * (1 + 3 * margin) if log2_low < 1023.5 else math.inf
    most = np.finfo(row.dtype).max
    t, high = (float(row.dtype.type(min(x, most))) for x in (low, high))

    total, beyond, inside = _powers(row, t, high, q)
    near = np.sort(inside)[None]
    # Each loss above t has added (t/t)^q = 1.
    below = np.array([total - (beyond + near.shape[1])])
    return valid, poisoned, m, *_scan_sorted(near, np.array([beyond]), np.array([t]), below, m, q)


def _powers(row: Array, t: float, high: float, q: float) -> tuple[float, int, Array]:
    """Of losses (n,): Σ (min(ℓ, t)/t)^q over the positive ones, how many are above `high`, and those in (t, high]."""
    total, beyond, inside = 0.0, 0, []
    for _, (ell,) in host.blocks(row[None]):
        x = np.clip(ell, 0, t)
        if q <= host.LARGE:
            x /= t
            np.log(x, out=x)
            x *= q * LOG2E
        else:  # only the powers of losses close to t count, and their logarithms must be exact
            x = log2_ratio_near(torch.from_numpy(x), t).mul_(q).numpy()
        host.exp2(x)
        total += float(x.sum(dtype=np.float64))
        near, over = ell > t, ell > high
        beyond += int(np.count_nonzero(over))
        inside.append(ell[near ^ over])
    return total, beyond, np.concatenate(inside)


@functools.cache
def _log2_mantissas(bits: int) -> Array:
    """log2 of 1 + i·2^-bits."""
    return np.log2(1 + np.arange(1 << bits) / (1 << bits))


def _scan_sorted(
    ascending: Array, beyond: Array, start: Array, below: Array, m: Array, q: float
) -> tuple[Array, Array, Array, Array]:
    """The largest loss with f ≥ 0 among ascending ones, or else `start`; with it what `Crossing` says.

    Powers are relative to the ⌈m⌉-th largest loss: α* is not below it, so the sums that count are 1 at least, and f < 0
    wherever a power overflows.

    Args:
        ascending: (S, k), those above `start`; those not positive don't count.
        beyond: (S,), how many losses are larger than all of them.
        start: (S,), a number with f ≥ 0, or 0.
        below: (S,), Σ_{ℓ ≤ start} (ℓ/start)^q.
        m, q: as in `in_rounds`.
    """
    k, rows = ascending.shape[1], np.arange(len(ascending))
    if not k:
        return start.astype(ascending.dtype), beyond, below, np.zeros_like(beyond)
    place = np.arange(k)
    at = k - (np.ceil(m).astype(np.int64) - beyond)
    base = np.where(at >= 0, ascending[rows, at.clip(0, k - 1)], start)
    some = base > 0
    base = np.where(some, base, 1.0)[:, None]

    exponent = ascending.clip(0, None).astype(np.float64)
    if ascending.dtype == np.float64:  # from the difference, which is exact near 1
        exponent -= base
        exponent /= base
        np.log1p(exponent, out=exponent)
    else:  # no float64 that is not 1 is so near to it that its logarithm would be wrong
        exponent /= base
        np.log(exponent, out=exponent)
    exponent *= LOG2E * q
    power = np.minimum(exponent, 900.0)
    host.exp2(power)
    before = below * np.exp2(LOG2E * q * np.log1p((start - base[:, 0]) / base[:, 0]))
    power_sum = power.cumsum(1)
    power_sum += before[:, None]
    power_sum /= power
    # Of tied losses each counts those after it as larger: a 1 for a 1.
    fits = power_sum >= (m - beyond - (k - 1))[:, None] + place
    fits &= (power > 0) & (exponent < 900.0) & some[:, None]
    found = fits.any(1)
    last = k - 1 - fits[:, ::-1].argmax(1)
    pivot = ascending[rows, last]
    last = np.count_nonzero(ascending <= pivot[:, None], 1) - 1
    tied = np.count_nonzero(ascending == pivot[:, None], 1)
    above_start = np.count_nonzero(ascending > start[:, None], 1)
    return (
        np.where(found, pivot, start.astype(ascending.dtype)),
        beyond + np.where(found, k - 1 - last, above_start),
        np.where(found, power_sum[rows, last.clip(0)], below),
        np.where(found, tied, 0),
    )


# --- in rounds ----------------------------------------------------------------------------------------------------


def in_rounds(losses: Tensor, ratio: Tensor, q: Tensor, group: Any = None) -> Crossing:
    """Bit group by bit group, from the top: the same fixed number of rounds for every input, no value is read.

    Each round lays K = 2^11 edges over the bracket, lo, lo + 2^shift, lo + 2·2^shift … in units of bit patterns,
    counts the losses between neighbours and sums their powers relative to the upper neighbour, and moves lo up to the
    last edge where f ≥ 0. f(lo) ≥ 0 holds throughout, or lo = 0: then fewer than m losses are positive. The pivot is
    the largest number with f ≥ 0. All sums are integers (fixed point): the order of the additions leaves no trace.

    Args:
        losses: (S, n), `IGNORED` or NaN among them.
        ratio: (), in the wide type.
        q: (), in the wide type, capped.
        group: the process group to add over, or None: one collective before the rounds and one a round. All but
            `losses` is the same on every rank, the result too.
    """
    length: int | Tensor = losses.shape[1]
    valid, poisoned = count(losses != IGNORED), losses.isnan().any(1)
    positive = count(losses.view(PATTERNS[losses.dtype][0]) > 0)  # of the pattern: a denormal may be read as 0
    if group is not None:
        totals = torch.stack([valid, positive, poisoned.long(), torch.full_like(valid, losses.shape[1])])
        valid, positive, poisoned, lengths = distributed.sum_of_integers(totals, group)
        poisoned, length = poisoned > 0, lengths[0]
    scale, m = fixed_point(length, losses.device, q.dtype), support(valid, ratio)

    integer, shift, largest = PATTERNS[losses.dtype]
    segments, edge_count, device = losses.shape[0], 1 << BUCKETS_LOG2, losses.device
    column = torch.arange(edge_count, dtype=integer, device=device)
    q_pixel = q.to(losses.dtype)

    lo = torch.zeros(segments, 1, dtype=integer, device=device)
    above = positive.unsqueeze(1)
    power_sum = torch.zeros_like(m).unsqueeze(1)
    row = torch.arange(segments, device=device).unsqueeze(1).expand_as(losses)
    while shift > 0:
        shift = max(0, shift - BUCKETS_LOG2)
        sums = torch.zeros(2, segments * (edge_count + 1), dtype=torch.int64, device=device)
        for ell, r in cut_pixels(losses, row):
            # A loss goes to the first edge that is not below it: 0 if that is lo, K if it is beyond the last one. What
            # is computed for these two is not used, so it may be infinite or NaN. An ignored pixel goes with the zeros.
            start = lo[r, 0]
            index = (ell.view(integer).clamp_min(0).sub_(start + 1) >> shift).add_(1).clamp_(0, edge_count)
            edge = (index << shift).add_(start).clamp_max_(largest).view(losses.dtype)
            power = log2_ratio_near(ell, edge).mul_(q_pixel).exp2_().mul_(scale).to(torch.int64)
            place = index.long().add_(r * (edge_count + 1)).flatten()
            sums[0].scatter_add_(0, place, torch.ones_like(place))
            sums[1].scatter_add_(0, place, power.flatten())
        if group is not None:
            sums = distributed.sum_of_integers(sums, group)
        counts, powers = sums.view(2, segments, edge_count + 1)[:, :, 1:-1].unbind()

        edges = (lo + (column << shift)).clamp_max(largest).view(losses.dtype)
        above = torch.cat([above, above - counts.cumsum(1)], 1)
        power_sum = _scan(torch.cat([power_sum, powers.to(m.dtype) / scale], 1), edges.to(m.dtype), q)
        last = ((above + power_sum >= m.unsqueeze(1)).sum(1, keepdim=True) - 1).clamp_min(0)
        lo = (lo + (last << shift)).clamp_max(largest).to(integer)
        above, power_sum = above.gather(1, last), power_sum.gather(1, last)
    pivot = lo.squeeze(1).view(losses.dtype)
    return Crossing(valid, poisoned, m, pivot, above.squeeze(1), power_sum.squeeze(1))


def count(mask: Tensor) -> Tensor:
    """How many entries of each row are True, (S,) int64."""
    return mask.count_nonzero(1) if on_host(mask) else mask.sum(1)


def fixed_point(length: int | Tensor, device: torch.device, dtype: torch.dtype) -> float | Tensor:
    """A power of 2 to multiply numbers in [0, 1] by, such that the sum of `length` of them fits an int64."""
    if isinstance(length, int):
        if not compiling():
            return 2.0 ** (62 - length.bit_length())
        # It may be a symbol, which its bit length would make a constant.
        length = torch.full((), length, dtype=torch.int64, device=device)
    # Shifts are exact everywhere, exp2 need not be.
    bits = (length >= 1 << torch.arange(62, device=device)).sum()
    return (1 << (62 - bits)).to(dtype)


def _scan(sums: Tensor, edges: Tensor, q: Tensor) -> Tensor:
    """R_b = Σ_{j ≤ b} sums_j·(edge_j/edge_b)^q, by doubling; no term is ever above its sum, so none overflows."""
    log2_edges = edges.log2().clamp_min(-2000.0)  # edge 0 may be 0; its sum is 0 then
    distance = 1
    while distance < edges.shape[1]:
        lower, upper = edges[:, :-distance], edges[:, distance:]
        # Near 1 from the difference: two neighbours' logarithms may round to the same number, and with q without bound
        # the lower one would then count in full.
        near = log2_ratio_near(lower, upper)
        far = log2_edges[:, :-distance] - log2_edges[:, distance:]
        factor = torch.where(lower > 0.5 * upper, near, far).mul_(q).exp2_()
        sums = torch.cat([sums[:, :distance], sums[:, distance:] + sums[:, :-distance] * factor], 1)
        distance *= 2
    return sums
