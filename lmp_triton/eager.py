"""The backend in plain PyTorch: any device, no host sync, no data-dependent shape or branch.

It is the fallback where Triton does not run, the path for float64, and the second opinion the kernels are compared
with. The stages are those of `types.Backend`. On the CPU, where nobody makes a graph, values may be looked at for
nothing and passes are cut into slices (`slices`); there some stages have a form of their own, of the same contract.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import distributed, eager_upsampled, host, search
from .powers import log2_ratio_near
from .search import Q_CAP
from .settings import on_host, traced
from .slices import Scratch, cut, cut_pixels, dense
from .types import (
    DROP,
    EXPONENT,
    IGNORED,
    PIVOT,
    STEP,
    TAU,
    UNIFORM_PIVOT,
    CrossEntropy,
    PixelLosses,
    Pool,
    Pooling,
    segments_of,
)


def _real(x: Tensor) -> torch.dtype:
    """The type to compute in: float32, and float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- stage one: pixel losses --------------------------------------------------------------------------------------


def softmax_losses(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, scope: str) -> PixelLosses:
    """See `types.Backend`; scope is for the kernels."""
    if cross_entropy.align_corners is not None:
        return eager_upsampled.softmax_losses(logits, target, cross_entropy)
    logits, target = logits.flatten(2), target.flatten(1)
    classes, real = logits.shape[1], _real(logits)
    weight, smoothing = cross_entropy.weight, cross_entropy.label_smoothing
    weight = None if weight is None else weight.to(real)

    labels = _labels(target, classes)
    losses, spread = _losses(logits, labels, weight, smoothing > 0)
    also = () if spread is None else (spread,)
    for y, label, ell, *rest in cut_pixels(target, labels, losses, *also):
        ell.neg_()
        if weight is not None:
            ell.mul_(weight[label.long()])
        if smoothing:
            ell.mul_(1 - smoothing).sub_(rest[0], alpha=smoothing / classes)
        if host.alone(ell):
            host.mark(ell, y, label, cross_entropy.ignore_index)
        else:
            y = y.long()  # a label of 156 is not -100
            ell.copy_(_mark(ell, y == label, y != cross_entropy.ignore_index))
    return PixelLosses(losses, (labels,))


def _labels(target: Tensor, classes: int) -> Tensor:
    """The target (N, L) inside [0, C), in a small type; of a label outside, anything."""
    narrow = torch.int16 if classes <= 1 << 15 else torch.int32
    if traced():  # Inductor leaves loops over int16 to scalar code
        narrow = torch.uint8 if classes <= 1 << 8 else torch.int32
        return target.long().clamp(0, classes - 1).to(narrow)
    labels = torch.empty_like(target, dtype=narrow)
    for y, label in cut_pixels(target, labels):
        label.copy_(y).clamp_(0, classes - 1)
    return labels


def _losses(logits: Tensor, labels: Tensor, weight: Tensor | None, spread: bool) -> tuple[Tensor, Tensor | None]:
    """log softmax at the label of each pixel, (N, L), and its sum over the classes, weighted, if asked for."""
    real = _real(logits)
    if not on_host(logits):
        x = logits.to(real).log_softmax(1)
        total = (x if weight is None else x * weight[:, None]).sum(1) if spread else None
        return x.gather(1, labels.long().unsqueeze(1)).squeeze(1), total
    found, total = torch.empty_like(labels, dtype=real), torch.empty_like(labels, dtype=real) if spread else None
    columns = (x.unsqueeze(1) for x in (labels, found, found if total is None else total))
    scratch, out = Scratch(real), Scratch(real)
    for x, label, ell, summed in cut(logits, *columns):
        # By this function, since it leaves the logarithm of a tensor to a library that starts threads for any size.
        x = _over_classes(torch.log_softmax, x, scratch, out.like(x))
        torch.gather(x, 1, _index(label), out=ell)
        if spread:
            torch.sum(x if weight is None else x.mul_(weight[:, None]), 1, keepdim=True, out=summed)
    return found, total


def _index(labels: Tensor) -> Tensor:
    """The labels (n, 1, l) of a slice as gather and scatter take them."""
    index = torch.empty_like(labels, dtype=torch.int64, memory_format=torch.contiguous_format)
    for label, out in cut_pixels(labels, index):
        out.copy_(label)
    return index


def _over_classes(function: Callable[..., Tensor], x: Tensor, scratch: Scratch, out: Tensor) -> Tensor:
    """`torch.softmax` or `torch.log_softmax` of a slice (n, C, l) into `out`, which is dense, with the classes where x
    has them.

    Of a dense tensor, into a dense one: else PyTorch makes it so.
    """
    if x.dtype != out.dtype or not dense(x):
        x = scratch.like(x).copy_(x)
    if x.stride(1) == 1:
        function(x.mT, 2, out=out.mT)
    else:
        function(x, 1, out=out)
    return out


def marked_losses(losses: Tensor, mask: Tensor | None, scope: str) -> PixelLosses:
    """See `types.Backend`; scope is for the kernels."""
    losses = losses.to(_real(losses))
    everywhere = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    if not on_host(losses):
        # As rows they are viewed as segments: where() keeps the layout of a transposed view.
        return PixelLosses(_mark(losses, everywhere, everywhere).contiguous())
    marked = torch.empty_like(losses, memory_format=torch.contiguous_format)
    for x, valid, out in cut_pixels(losses, everywhere, marked):
        out.copy_(_mark(x, valid, valid))
    return PixelLosses(marked)


def _mark(losses: Tensor, good: Tensor, valid: Tensor) -> Tensor:
    """Losses with NaN where there is none to be had (bad label, negative or infinite loss), IGNORED where invalid."""
    good = good & (losses >= 0) & (losses < torch.inf)
    return losses.masked_fill(~good, torch.nan).masked_fill_(~valid, IGNORED)


# --- stage two: the pivot, α* and the loss ------------------------------------------------------------------------


def solve(pixels: PixelLosses, pool: Pool) -> Pooling:
    """Find α* of each segment and with it the pooled loss (equations 9 and 10).

    With a process group the sums are over all its ranks, in one collective before the rounds of the search, one a round
    and one after them; the solution is the same on every rank. Ranks without a pixel take part.

    pool.solver is unused here: it chooses among kernels.
    """
    losses = pixels.losses.view(segments_of(pixels.losses.shape[0], pool.scope), -1)
    p: Any
    ratio: Any
    if search.gives_arrays(losses, pool.group):
        p, ratio = (host.np.float64(float(x)) for x in (pool.p, pool.ratio))
        value, rows, counts = _solve_arrays(host.np, losses, p, ratio, pool)
        found = (torch.from_numpy(x) for x in (host.np.asarray(value), host.np.stack(rows), host.np.stack(counts)))
        value, solution, counted = found
        return Pooling(value.to(losses.dtype), solution.to(losses.dtype), counted)
    wide = search.wide(losses.device)
    p, ratio = (
        x.to(wide) if isinstance(x, Tensor) else torch.full((), x, dtype=wide, device=losses.device)
        for x in (pool.p, pool.ratio)
    )
    value, rows, counts = _solve(torch, losses, p, ratio, pool)
    return Pooling(value.to(losses.dtype), torch.stack([x.to(losses.dtype) for x in rows]), torch.stack(counts))


def _solve(xp: Any, losses: Tensor, p: Any, ratio: Any, pool: Pool) -> tuple[Any, list[Any], list[Any]]:
    """The value, the rows of the solution and those of the counts: tensors, or arrays where xp is NumPy, which does
    a tenth of PyTorch's work for a few numbers."""
    group, limits = pool.group, torch.finfo(losses.dtype)
    q = xp.clip(xp.where(p == math.inf, 1.0, p / (p - 1)), None, Q_CAP[losses.dtype])
    exponent = xp.clip(1 / (p - 1), None, Q_CAP[losses.dtype])
    found = search.find(losses, ratio, q, group)
    valid, m, pivot, above = found.valid, found.m, found.pivot, found.above
    wide = xp.zeros_like(m)
    n, some = wide + valid, valid > 0
    tau = xp.where(some, xp.exp2(-(xp.log2(n) / q + xp.log2(m) / p)), 0.0)
    poisoned = found.poisoned | ~((p >= 1) & (ratio > 0) & (ratio <= 1))

    c = m - above
    log2_excess = xp.log2(xp.where(pivot > 0, xp.clip(found.power_sum / c, 1.0, None), 1.0))
    drop = log2_excess * (exponent / q)
    growth = xp.exp2(log2_excess / q)
    alpha, rest = (wide + pivot) * growth, (tau * c * growth) * pivot  # α* may be above the largest number, τ·c·α* not

    uniform = some & ((m >= n) | (q == 1))
    pivot = xp.where(uniform, UNIFORM_PIVOT, pivot)
    drop = xp.where(uniform, 0.0, drop)
    tied = search.count(losses == pivot.unsqueeze(1)) if found.tied is None else found.tied
    summed = found.heavy is not None and losses.dtype != torch.float64  # whose sum may be infinite
    heavy = tau * found.heavy if summed else _sum_above(losses, pivot, tau)
    if group is not None:
        heavy, ties = distributed.sum_of_reals(torch.stack([heavy, wide + tied]), group)
        tied = ties.long()
    saturated = xp.where(uniform, valid, above + xp.where((drop == 0) & (pivot > 0), tied, 0))
    loss = xp.where(some, heavy + xp.where(uniform, 0.0, rest), 0.0)
    loss = xp.clip(loss, None, limits.max)  # it is at most the largest loss: beyond by a rounding

    loss, alpha, tau, drop = (xp.where(poisoned, math.nan, x) for x in (loss, alpha, tau, drop))
    value, step = loss, tau
    if pool.reduction == "mean":
        scale = (wide + some) / xp.clip(some.sum(), 1, None)
        value, step = (loss * scale).sum(), tau * scale
    elif pool.reduction == "sum":
        value = loss.sum()
    return value, [alpha, tau, pivot, drop, step, wide + exponent], [valid, saturated]


_solve_arrays = host.quiet(_solve)


def _sum_above(losses: Tensor, pivot: Any, tau: Any) -> Any:
    """τ·Σ_{ℓ > pivot} ℓ, (S,) in the wide type."""
    if not isinstance(tau, Tensor):
        return host.array(_sum_above(losses, torch.from_numpy(pivot), torch.from_numpy(tau)))
    largest = torch.where(losses > pivot.unsqueeze(1), losses, 0.0)
    if losses.dtype != tau.dtype:
        return tau * largest.sum(1, dtype=tau.dtype)
    # The sum may be above the largest number, τ times it is not.
    shrink = torch.where((largest > 1).any(1), 2.0**-40, 1.0)
    return tau * (largest * shrink.unsqueeze(1)).sum(1) / shrink


def pool_logits(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, pool: Pool) -> tuple[PixelLosses, Pooling]:
    """See `types.Backend`."""
    pixels = softmax_losses(logits, target, cross_entropy, pool.scope)
    return pixels, solve(pixels, pool)


def pool_losses(losses: Tensor, mask: Tensor | None, pool: Pool) -> tuple[PixelLosses, Pooling]:
    """See `types.Backend`."""
    pixels = marked_losses(losses, mask, pool.scope)
    return pixels, solve(pixels, pool)


# --- stage three: weights and gradients ---------------------------------------------------------------------------


def relative_weights(losses: Tensor, exponent: Tensor, pivot: Tensor, base: Tensor, drop: Tensor) -> Tensor:
    """w*/τ of losses: 1 above the pivot, (ℓ/pivot)^(q−1)·2^(−drop) up to it; of an ignored one, anything.

    Args:
        exponent: (), q − 1, of the solution.
        pivot, drop: of the solution, expanded to the losses.
        base: the pivot, 1 where that is not positive.
    """
    ratio = losses / base
    if on_host(losses) and 0.2 <= (power := float(exponent)) <= host.LARGE:
        below = ratio.pow_(power).mul_((-drop).exp2())
    else:
        # Near 1 the logarithm comes from the difference, which is exact; further down from the ratio if there is one.
        far = torch.where(ratio > 1e-30, ratio.log2(), losses.log2() - base.log2())
        log2_ratio = torch.where(ratio > 0.5, log2_ratio_near(losses, base), far)
        below = log2_ratio.mul_(exponent).sub_(drop).exp2_()
    return below.masked_fill_(losses > pivot, 1.0)


def _solution_of_losses(losses: Tensor, solution: Tensor) -> list[Tensor]:
    """Pivot, base and drop as `relative_weights` takes them with the losses (S, n)."""
    pivot = solution[PIVOT]
    rows = (pivot, torch.where(pivot > 0, pivot, 1.0), solution[DROP])
    return [row.unsqueeze(1).expand_as(losses) for row in rows]


def total_weight(pixels: PixelLosses, solution: Tensor) -> Tensor:
    """See `types.Backend`."""
    losses = pixels.losses.view(solution.shape[1], -1)
    weights = relative_weights(losses, solution[EXPONENT, 0], *_solution_of_losses(losses, solution))
    weights.masked_fill_(losses == IGNORED, 0.0)
    return (weights.sum(1, dtype=search.wide(losses.device)) * solution[TAU]).to(losses.dtype)


def pixel_weights(pixels: PixelLosses, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """See `types.Backend`."""
    losses = pixels.losses.view(solution.shape[1], -1)
    out = torch.empty_like(losses, dtype=dtype)
    if host.alone(losses) and dtype == losses.dtype and 0.2 <= float(solution[EXPONENT, 0]) <= host.LARGE:
        host.weights(losses, solution, grad_output, out)
        return out.view_as(pixels.losses)
    scale = (solution[STEP] * grad_output).unsqueeze(1).expand_as(losses)
    for x, factor, w, *found in cut_pixels(losses, scale, out, *_solution_of_losses(losses, solution)):
        # A NaN scale (a poisoned segment) times 0 is NaN as well: ignored pixels are set last.
        w.copy_(relative_weights(x, solution[EXPONENT, 0], *found).mul_(factor).masked_fill_(x == IGNORED, 0.0))
    return out.view_as(pixels.losses)


def logits_gradient(
    logits: Tensor, pixels: PixelLosses, solution: Tensor, grad_output: Tensor, cross_entropy: CrossEntropy
) -> Tensor:
    """See `types.Backend`."""
    dtype = pixels.losses.dtype
    weights = pixel_weights(pixels, solution, grad_output, dtype)
    if cross_entropy.align_corners is not None:
        return eager_upsampled.logits_gradient(logits, pixels, weights, cross_entropy)
    weight, smoothing = cross_entropy.weight, cross_entropy.label_smoothing
    shape, logits = logits.shape, logits.flatten(2)
    (labels,), classes = pixels.saved, logits.shape[1]
    share = None
    if weight is not None:
        weight = weight.to(dtype)
    if smoothing:
        share = torch.ones(classes, dtype=dtype, device=logits.device) if weight is None else weight
        share = share * (smoothing / classes)
    if not on_host(logits):
        factors = _factors(weights, labels, weight, smoothing, share)
        labels, spread, hit, weights = (x.unsqueeze(1) for x in (labels, *factors, weights))
        return _gradient(logits, labels, spread, hit, weights, share).to(logits.dtype).view(shape)

    plain = weight is None and not smoothing
    spread, hit = weights if plain else torch.empty_like(weights), torch.empty_like(weights)
    for w, label, a, b in cut_pixels(weights, labels, spread, hit):
        if plain:
            torch.neg(w, out=b)
        else:
            for out, factor in zip((a, b), _factors(w, label, weight, smoothing, share), strict=True):
                out.copy_(factor)
    grad, scratch, softmax = torch.empty_like(logits), Scratch(dtype), Scratch(dtype)
    in_place = grad.dtype == dtype and dense(logits)
    columns = (x.unsqueeze(1) for x in (labels, spread, hit, weights))
    for x, out, label, a, b, w in cut(logits, grad, *columns, images=sys.maxsize if in_place else 0):
        d = _over_classes(torch.softmax, x, scratch, out if in_place and dense(out) else softmax.like(x))
        d = torch.mul(d, a, out=out if grad.dtype == dtype else d)
        d.scatter_add_(1, _index(label), b)
        if share is not None:
            d.addcmul_(w, share[:, None], value=-1)
        if grad.dtype != dtype:
            out.copy_(d)
    # By a bad logit all of its pixel is NaN. Of a valid one it should; of an ignored one it must not, but 0·NaN is NaN.
    if any(bool(some.sum().isnan()) for (some,) in cut_pixels(grad[:, 0])):
        grad.masked_fill_((pixels.losses == IGNORED).unsqueeze(1), 0.0)
    return grad.view(shape)


def _factors(
    weights: Tensor, labels: Tensor, weight: Tensor | None, smoothing: float, share: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the softmax of a pixel is multiplied by, and what is added at its label."""
    hit = weights * (smoothing - 1)
    if weight is not None:
        hit = hit * weight[labels.long()]
    spread = -hit
    return (spread if share is None else spread + weights * share.sum()), hit


def _gradient(x: Tensor, label: Tensor, a: Tensor, b: Tensor, w: Tensor, share: Tensor | None) -> Tensor:
    """a·softmax + b·[c = y] − w·share, where values can't be looked at; label, a, b and w are (N, 1, L)."""
    x = x.to(a.dtype)
    # NaN here comes of a bad logit. Of an ignored pixel it must not get through, but 0·NaN is NaN; of a valid one it
    # will get through, since its segment is poisoned and the factor NaN. Elsewhere the sum is 1 at least.
    d = (x - x.amax(1, keepdim=True)).exp()
    d = torch.where(d == d, d, 0.0)  # Inductor has no vector code for nan_to_num
    d = d * (a / d.sum(1, keepdim=True).clamp_min(1.0))
    if traced():
        classes = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        d = d + torch.where(classes[:, None] == label, b, 0.0)  # one loop, to a compiler; d first: in its layout
    else:
        d.scatter_add_(1, label.long(), b)
    return d if share is None else d - w * share[:, None]
