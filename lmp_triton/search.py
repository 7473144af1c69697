"""Where the pivot of each segment lies: in rounds, which read no value, or by `host_search`.

With f(t) = |{ℓ > t}| + Σ_{ℓ ≤ t} (ℓ/t)^q − m, which falls as t grows, α* is the largest root of f. A pivot is a number
of the type of the losses with f(pivot) ≥ 0 such that no loss lies strictly between it and α*; 0 if fewer than m
losses are positive. A number ≥ 0 and its bit pattern read as an integer are ordered alike, and so are the leading bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from . import checks, distributed, host, host_search
from .powers import log2_ratio_near
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
    """|{ℓ = pivot}|,"""
    heavy: Any = None
    """and Σ_{ℓ > pivot} ℓ, or over all where all weigh the same; in float64, which may overflow: where the search has
    come by them."""


def wide(device: torch.device) -> torch.dtype:
    """The type for scalars of a segment: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def support(valid: Tensor, ratio: Tensor) -> Tensor:
    """m = clamp(ratio·n, 1, n), and 1 for n = 0; real, never rounded."""
    n = valid.to(ratio.dtype)
    return torch.minimum(ratio * n, n).clamp_min(1.0)


@custom_op("lmp_triton::crossing", mutates_args=(), device_types="cpu")
def _crossing(losses: Tensor, ratio: Tensor, q: Tensor) -> list[Tensor]:
    """`host_search`, where a graph is compiled for the CPU: one opaque node, which may look at values."""
    checks.transforms(losses)
    return [torch.from_numpy(x) for x in host_search.segments(host.array(losses), float(ratio), float(q))]


@_crossing.register_fake
def _(losses: Tensor, ratio: Tensor, q: Tensor) -> list[Tensor]:
    count, real = torch.int64, torch.float64
    types = count, torch.bool, real, losses.dtype, count, real, count, real
    return [losses.new_empty(losses.shape[0], dtype=dtype) for dtype in types]


def gives_arrays(losses: Tensor, group: Any = None) -> bool:
    """Whether `find` searches in NumPy, and takes and gives no tensors of a few numbers."""
    return group is None and host.serves(losses)


def find(losses: Tensor, ratio: Any, q: Any, group: Any = None) -> Crossing:
    """By whichever way fits. What is exported is to run without this package: in rounds. Arguments: `in_rounds`."""
    if gives_arrays(losses, group):
        return Crossing(*host_search.segments(host.array(losses), float(ratio), float(q)))
    if losses.device.type == "cpu" and group is None and host.PRESENT and traced() and not exporting():
        return Crossing(*torch.ops.lmp_triton.crossing(losses, ratio, q))
    return in_rounds(losses, ratio, q, group)


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
