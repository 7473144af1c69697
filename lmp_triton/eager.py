"""The backend in plain PyTorch: any device, no host sync, no data-dependent shape or branch.

It is the fallback where Triton does not run, the path for float64, and the second opinion the kernels are compared
with. The stages are those of `types.Backend`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import distributed, eager_upsampled
from .settings import on_host
from .types import IGNORED, STEP, TAU, UNIFORM_PIVOT, CrossEntropy, PixelLosses, Pool, Pooling, segments_of

LOG2E = 1.4426950408889634

CHUNK_ELEMENTS = 1 << 20
"""Elements a CPU pass handles at a time: temporaries then stay in the cache instead of faulting in fresh pages, which
costs more than the arithmetic."""

CHUNK_LOSSES = 1 << 16
"""The same for losses, whose passes have more temporaries."""

Q_CAP = {torch.float32: 2.0**40, torch.float64: 2.0**70}
"""Above it q changes nothing: two different losses differ by at least a rounding error, 2^-24 or 2^-53, and that to
the power of the cap is 0. Capped, p = 1 (q = ∞) needs no case of its own: (ℓ/t)^q is 1 for ℓ = t and else 0."""

PATTERNS = {torch.float32: (torch.int32, 31, 0x7F7FFFFF), torch.float64: (torch.int64, 63, 0x7FEFFFFFFFFFFFFF)}
"""The integer type that a loss is read as, the bits that make up a number ≥ 0, and the pattern of the largest."""

BUCKETS_LOG2 = 11
"""A round of the search looks at 2^11 thresholds: three rounds pin down all 31 bits of a float32, six a float64."""


def _wide(device: torch.device) -> torch.dtype:
    """The type for scalars of a segment: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _real(x: Tensor) -> torch.dtype:
    """The type to compute in: float32, and float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: Tensor, elements: int = CHUNK_ELEMENTS) -> int:
    """Into how many slices along the pixels, the last dimension, a pass over x is cut."""
    return max(1, min(x.shape[-1], x.numel() // elements)) if on_host(x) else 1


def _slices(x: Tensor, n_chunks: int) -> tuple[Tensor, ...]:
    """x cut along the pixels. One slice is x itself: the size of a chunk would fix a symbolic shape."""
    return (x,) if n_chunks == 1 else x.chunk(n_chunks, -1)


def _count(mask: Tensor) -> Tensor:
    """How many entries of each row are True, (S,) int64. (PyTorch widens all of a bool tensor before it adds.)"""
    counts = [piece.sum(1) for piece in _slices(mask, _chunks(mask, CHUNK_LOSSES))]
    return torch.stack(counts).sum(0)


def _log2_ratio_near_(difference: Tensor, total: Tensor) -> Tensor:
    """log2(x/t), in place of x − t, from that and x + t: near 1 it comes from the difference, which is exact there.

    (log1p((x − t)/t) would do as well; PyTorch's CPU code takes thirteen times as long for it as for atanh.)
    """
    return difference.div_(total).atanh_().mul_(2 * LOG2E)


def _exp_(x: Tensor) -> Tensor:
    """e^x in place; by way of exp2, which PyTorch's CPU code does four times as fast at the same accuracy."""
    return x.mul_(LOG2E).exp2_()


# --- stage one: pixel losses --------------------------------------------------------------------------------------


def softmax_losses(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, scope: str) -> PixelLosses:
    """See `types.Backend`; scope is for the kernels."""
    if cross_entropy.align_corners is not None:
        return eager_upsampled.softmax_losses(logits, target, cross_entropy)
    logits, target = logits.flatten(2), target.flatten(1)
    n_chunks = _chunks(logits)
    slices = zip(_slices(logits, n_chunks), _slices(target, n_chunks), strict=True)
    parts = [_softmax_losses(x, y, cross_entropy) for x, y in slices]
    losses, labels = (torch.cat(columns, 1) for columns in zip(*parts, strict=True))
    return PixelLosses(losses, (labels,))


def _softmax_losses(x: Tensor, target: Tensor, cross_entropy: CrossEntropy) -> tuple[Tensor, Tensor]:
    """The losses of a slice of pixels and their labels, inside [0, C): each (N, L)."""
    weight, label_smoothing = cross_entropy.weight, cross_entropy.label_smoothing
    classes = x.shape[1]
    label = target.long()
    valid = label != cross_entropy.ignore_index
    good = (label >= 0) & (label < classes)
    label = label.clamp(0, classes - 1)

    log_softmax = x.to(_real(x)).log_softmax(1)
    losses = -log_softmax.gather(1, label.unsqueeze(1)).squeeze(1)
    if weight is not None:
        weight = weight.to(losses.dtype)
        losses = losses * weight[label]
    if label_smoothing:
        spread = -(log_softmax if weight is None else log_softmax * weight[:, None]).sum(1)
        losses = (1 - label_smoothing) * losses + (label_smoothing / classes) * spread
    narrow = torch.int16 if classes <= 1 << 15 else torch.int32
    return _mark(losses, good, valid), label.to(narrow)


def marked_losses(losses: Tensor, mask: Tensor | None, scope: str) -> PixelLosses:
    """See `types.Backend`; scope is for the kernels."""
    losses = losses.to(_real(losses))
    everywhere = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    # As rows they are viewed as segments: where() keeps the layout of a transposed view.
    return PixelLosses(_mark(losses, everywhere, everywhere).contiguous())


def _mark(losses: Tensor, good: Tensor, valid: Tensor) -> Tensor:
    """Losses with NaN where there is none to be had (bad label, negative or infinite loss), IGNORED where invalid."""
    good = good & (losses >= 0) & (losses < torch.inf)
    return torch.where(valid, torch.where(good, losses, torch.nan), IGNORED)


# --- stage two: the pivot, α* and the loss ------------------------------------------------------------------------


def solve(pixels: PixelLosses, pool: Pool) -> Pooling:
    """Find α* of each segment and with it the pooled loss (equations 9 and 10).

    With f(t) = |{ℓ > t}| + Σ_{ℓ ≤ t} (ℓ/t)^q − m, which falls as t grows, α* is the largest root of f, and the pivot
    the largest number of the losses' type with f(pivot) ≥ 0. A number ≥ 0 and its bit pattern read as an integer are
    ordered alike, so the pivot is found bit group by bit group, from the top: a fixed number of rounds for every
    input. All sums are integers (fixed point): the order of the additions leaves no trace.

    With a process group the sums are over all its ranks, in one collective before the rounds, one a round and one after
    them; the solution is the same on every rank. Ranks without a pixel take part.

    pool.solver is unused here: it chooses among kernels.
    """
    group = pool.group
    losses = pixels.losses.view(segments_of(pixels.losses.shape[0], pool.scope), -1)
    dtype, wide = losses.dtype, _wide(losses.device)
    p, ratio = (
        x.to(wide) if isinstance(x, Tensor) else torch.full((), x, dtype=wide, device=losses.device)
        for x in (pool.p, pool.ratio)
    )
    q = torch.where(p == torch.inf, 1.0, p / (p - 1)).clamp_max(Q_CAP[dtype])
    exponent = (1 / (p - 1)).clamp_max(Q_CAP[dtype])
    length: int | Tensor = losses.shape[1]
    valid, positive, poisoned = _count(losses != IGNORED), _count(losses > 0), losses.isnan().any(1)
    if group is not None:
        totals = torch.stack([valid, positive, poisoned.long(), torch.full_like(valid, losses.shape[1])])
        valid, positive, poisoned, lengths = distributed.sum_of_integers(totals, group)
        poisoned, length = poisoned > 0, lengths[0]
    n = valid.to(wide)
    m = torch.minimum(ratio * n, n).clamp_min(1.0)
    tau = torch.where(valid > 0, torch.exp2(-(n.log2() / q + m.log2() / p)), 0.0)
    poisoned = poisoned | ~((p >= 1) & (ratio > 0) & (ratio <= 1))

    pivot, above, power_sum = _search(losses, positive, _fixed_point(length, losses.device, wide), m, q, group)
    c = m - above
    log2_excess = torch.where(pivot > 0, (power_sum / c).clamp_min(1.0), 1.0).log2()
    alpha = pivot.to(wide) * torch.exp2(log2_excess / q)
    drop = log2_excess * (exponent / q)

    uniform = (valid > 0) & ((m >= n) | (q == 1))
    pivot = torch.where(uniform, UNIFORM_PIVOT, pivot)
    drop = torch.where(uniform, 0.0, drop)
    tied = _count(losses == pivot.unsqueeze(1))
    heavy = torch.where(losses > pivot.unsqueeze(1), losses, 0.0).sum(1, dtype=wide)
    if group is not None:
        heavy, ties = distributed.sum_of_reals(torch.stack([heavy, tied.to(wide)]), group)
        tied = ties.long()
    saturated = torch.where(uniform, valid, above + torch.where((drop == 0) & (pivot > 0), tied, 0))
    loss = tau * (heavy + torch.where(uniform, 0.0, c * alpha))
    loss = torch.where(valid > 0, loss, 0.0)

    loss, alpha, tau, drop = (torch.where(poisoned, torch.nan, x).to(dtype) for x in (loss, alpha, tau, drop))
    step = tau
    if pool.reduction == "mean":
        scale = (valid > 0).to(wide) / (valid > 0).sum().clamp_min(1)
        value, step = (loss * scale).sum().to(dtype), tau * scale.to(dtype)
    else:
        value = loss.sum() if pool.reduction == "sum" else loss
    solution = torch.stack([alpha, tau, pivot, drop, step, exponent.to(dtype).expand_as(tau)])
    return Pooling(value, solution, torch.stack([valid, saturated]))


def _fixed_point(length: int | Tensor, device: torch.device, wide: torch.dtype) -> float | Tensor:
    """A power of 2 to multiply numbers in [0, 1] by, such that the sum of `length` of them fits an int64."""
    if isinstance(length, int):
        if not torch.compiler.is_compiling():
            return 2.0 ** (62 - length.bit_length())
        # It may be a symbol, which its bit length would make a constant.
        length = torch.full((), length, dtype=torch.int64, device=device)
    # Shifts are exact everywhere, exp2 need not be.
    bits = (length >= 1 << torch.arange(62, device=device)).sum()
    return (1 << (62 - bits)).to(wide)


def _search(
    losses: Tensor, positive: Tensor, scale: float | Tensor, m: Tensor, q: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The pivot of each segment, |{ℓ > pivot}| and Σ_{ℓ ≤ pivot} (ℓ/pivot)^q.

    Each round lays K = 2^11 edges over the bracket, lo, lo + 2^shift, lo + 2·2^shift … in units of bit patterns,
    counts the losses between neighbours and sums their powers relative to the upper neighbour, and moves lo up to the
    last edge where f ≥ 0. f(lo) ≥ 0 holds throughout, or lo = 0: then fewer than m losses are positive.

    Args:
        losses: (S, n).
        positive: (S,), int64: |{ℓ > 0}|.
        scale: of the fixed point that powers are added in.
        m: (S,), in the wide type.
        q: (), in the wide type, capped.
        group: the process group to add over, or None. All but `losses` is the same on every rank.

    Returns:
        Tensors of shape (S,): the pivot in the type of the losses, the count, int64, and the sum in the wide type.
    """
    integer, shift, largest = PATTERNS[losses.dtype]
    segments = losses.shape[0]
    edge_count, wide, device = 1 << BUCKETS_LOG2, m.dtype, losses.device
    column = torch.arange(edge_count, dtype=integer, device=device)
    q_pixel = q.to(losses.dtype)

    lo = torch.zeros(segments, 1, dtype=integer, device=device)
    above = positive.unsqueeze(1)
    power_sum = torch.zeros_like(m).unsqueeze(1)
    x, row = losses, torch.arange(segments, device=device).unsqueeze(1)
    while shift > 0:
        shift = max(0, shift - BUCKETS_LOG2)
        sums = torch.zeros(2, segments * (edge_count + 1), dtype=torch.int64, device=device)
        n_chunks = _chunks(x, CHUNK_LOSSES)
        rows = _slices(row, n_chunks) if row.ndim == 1 else [row] * n_chunks
        for ell, r in zip(_slices(x, n_chunks), rows, strict=False):
            # A loss goes to the first edge that is not below it: 0 if that is lo, K if it is beyond the last one. What
            # is computed for these two is not used, so it may be infinite or NaN. An ignored pixel goes with the zeros.
            start = lo[r, 0]
            index = (ell.view(integer).clamp_min(0).sub_(start + 1) >> shift).add_(1).clamp_(0, edge_count)
            edge = (index << shift).add_(start).clamp_max_(largest).view(losses.dtype)
            power = _log2_ratio_near_(ell - edge, ell + edge).mul_(q_pixel).exp2_().mul_(scale).to(torch.int64)
            place = index.long().add_(r * (edge_count + 1)).flatten()
            sums[0].scatter_add_(0, place, torch.ones_like(place))
            sums[1].scatter_add_(0, place, power.flatten())
        if group is not None:
            sums = distributed.sum_of_integers(sums, group)
        counts, powers = sums.view(2, segments, edge_count + 1)[:, :, 1:-1].unbind()

        edges = (lo + (column << shift)).clamp_max(largest).view(losses.dtype)
        above = torch.cat([above, above - counts.cumsum(1)], 1)
        power_sum = _scan(torch.cat([power_sum, powers.to(wide) / scale], 1), edges.to(wide), q)
        last = ((above + power_sum >= m.unsqueeze(1)).sum(1, keepdim=True) - 1).clamp_min(0)
        lo = lo + (last << shift).to(integer)
        above, power_sum = above.gather(1, last), power_sum.gather(1, last)
        if on_host(losses):  # elsewhere the shapes stay, and the losses outside the bracket are counted once more
            inside = (x.view(integer) - (lo[row, 0] + 1)) >> shift == 0
            x, row = x[inside], row.expand_as(x)[inside]
    return lo.squeeze(1).view(losses.dtype), above.squeeze(1), power_sum.squeeze(1)


def _scan(sums: Tensor, edges: Tensor, q: Tensor) -> Tensor:
    """R_b = Σ_{j ≤ b} sums_j·(edge_j/edge_b)^q, by doubling; no term is ever above its sum, so none overflows."""
    log2_edges = edges.log2().clamp_min(-2000.0)  # edge 0 may be 0; its sum is 0 then
    distance = 1
    while distance < edges.shape[1]:
        lower, upper = edges[:, :-distance], edges[:, distance:]
        # Near 1 from the difference: two neighbours' logarithms may round to the same number, and with q without bound
        # the lower one would then count in full.
        near = _log2_ratio_near_(lower - upper, lower + upper)
        far = log2_edges[:, :-distance] - log2_edges[:, distance:]
        factor = torch.where(lower > 0.5 * upper, near, far).mul_(q).exp2_()
        sums = torch.cat([sums[:, :distance], sums[:, distance:] + sums[:, :-distance] * factor], 1)
        distance *= 2
    return sums


def pool_logits(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, pool: Pool) -> tuple[PixelLosses, Pooling]:
    """See `types.Backend`."""
    pixels = softmax_losses(logits, target, cross_entropy, pool.scope)
    return pixels, solve(pixels, pool)


def pool_losses(losses: Tensor, mask: Tensor | None, pool: Pool) -> tuple[PixelLosses, Pooling]:
    """See `types.Backend`."""
    pixels = marked_losses(losses, mask, pool.scope)
    return pixels, solve(pixels, pool)


# --- stage three: weights and gradients ---------------------------------------------------------------------------


def relative_weights(losses: Tensor, solution: Tensor) -> Tensor:
    """w*/τ of every loss, (S, n): 1 above the pivot, 2^((q−1)·log2(ℓ/pivot) − drop) up to it, 0 where ignored."""
    _, _, pivot, drop, _, exponent = solution.unsqueeze(2).unbind()
    ratio = losses / pivot
    # Near 1 the logarithm comes from the difference, which is exact; further down from the ratio, while there is one.
    near = _log2_ratio_near_(losses - pivot, losses + pivot)
    far = torch.where(ratio > 1e-30, ratio.log2(), losses.log2() - pivot.log2())
    log2_ratio = torch.where(ratio > 0.5, near, far)
    below = torch.where((losses >= 0) & (pivot > 0), torch.exp2(exponent * log2_ratio - drop), 0.0)
    return torch.where(losses > pivot, 1.0, below)


def total_weight(pixels: PixelLosses, solution: Tensor) -> Tensor:
    """See `types.Backend`."""
    losses, tau = pixels.losses.view(solution.shape[1], -1), solution[TAU]
    return (relative_weights(losses, solution).sum(1, dtype=_wide(losses.device)) * tau).to(tau.dtype)


def pixel_weights(pixels: PixelLosses, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """See `types.Backend`."""
    losses, step = pixels.losses.view(solution.shape[1], -1), solution[STEP].unsqueeze(1)
    scale = step * grad_output.view(-1, 1)
    out = torch.empty_like(losses, dtype=dtype)
    n_chunks = _chunks(losses, CHUNK_LOSSES)
    for x, w in zip(_slices(losses, n_chunks), _slices(out, n_chunks), strict=True):
        # A NaN scale (a poisoned segment) times 0 is NaN as well: ignored pixels are set last.
        w.copy_((relative_weights(x, solution) * scale).masked_fill_(x == IGNORED, 0.0))
    return out.view_as(pixels.losses)


def logits_gradient(
    logits: Tensor, pixels: PixelLosses, solution: Tensor, grad_output: Tensor, cross_entropy: CrossEntropy
) -> Tensor:
    """See `types.Backend`."""
    dtype = pixels.losses.dtype
    weights = pixel_weights(pixels, solution, grad_output, dtype)
    if cross_entropy.align_corners is not None:
        return eager_upsampled.logits_gradient(logits, pixels, weights, cross_entropy)
    weight, label_smoothing = cross_entropy.weight, cross_entropy.label_smoothing
    shape, logits = logits.shape, logits.flatten(2)
    (labels,) = pixels.saved
    classes, n_chunks = logits.shape[1], _chunks(logits)
    hit = weights * (1 - label_smoothing)
    if weight is not None:
        weight = weight.to(dtype)
        hit = hit * weight[labels.long()]
    spread, share = hit, None
    if label_smoothing:
        weight = torch.ones(classes, dtype=dtype, device=logits.device) if weight is None else weight
        share = weight * (label_smoothing / classes)
        spread = hit + weights * share.sum()

    grad = torch.empty_like(logits)
    images = (image.unsqueeze(1) for image in (labels, spread, hit, weights))
    for x, out, label, a, b, w in zip(*(_slices(piece, n_chunks) for piece in (logits, grad, *images)), strict=True):
        d = x.to(dtype)
        # NaN here comes of a bad logit. Of an ignored pixel it must not get through, but 0·NaN is NaN; of a valid one
        # it will get through, since its segment is poisoned and the factor NaN. Elsewhere the sum is 1 at least.
        d = _exp_(d - d.amax(1, keepdim=True)).nan_to_num_()
        d = d.mul_(a / d.sum(1, keepdim=True).clamp_min_(1.0)).scatter_add_(1, label.long(), -b)
        out.copy_(d if share is None else d.sub_(w * share[:, None]))
    return grad.view(shape)
