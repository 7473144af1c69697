"""The functions a user calls: check, choose a backend, flatten, hand on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import autograd, checks, dispatch, distributed
from .autograd import Pooled
from .types import (
    ALPHA,
    SATURATED,
    TAU,
    VALID,
    CrossEntropy,
    PixelLosses,
    Pool,
    PoolingStats,
    segments_of,
)


def loss_max_pooling(
    logits: Tensor,
    target: Tensor,
    *,
    p: float | Tensor = 1.3,
    ratio: float | Tensor = 0.25,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scope: str = "image",
    reduction: str = "mean",
    group: Any = None,
    backend: str = "auto",
    solver: str = "auto",
    return_stats: bool = False,
    check_targets: bool = False,
) -> Tensor | tuple[Tensor, PoolingStats]:
    """Softmax cross-entropy, max-pooled: L_W = max {w·ℓ : ‖w‖_p ≤ γ, ‖w‖_∞ ≤ τ} (equations 4 and 5 of the paper).

    Args:
        logits: (N, C, *spatial), float16, bfloat16, float32 or float64; any strides, never modified.
            (N, C) needs scope="batch". The kernels take up to 1024 classes.
        target: (N, *spatial), class indices of type uint8, int8, int16, int32 or int64.
        p: the norm that bounds the weights, in [1, ∞]: 1 pools the hardest pixels alone, ∞ is the mean. A float, or a
            0-dim floating tensor on the device of the logits. Default 1.3, the best of the paper's Table 1.
        ratio: m/n, the least share of the valid pixels that the weights spread over, in (0, 1]; m = clamp(ratio·n, 1,
            n). 1 is the mean. Like p, a float or a tensor. Default 0.25, from Section 5.2 of the paper.
        weight: (C,) class weights, finite and not negative, as in `F.cross_entropy(reduction="none")`.
        ignore_index: pixels with this label take no part: not in the loss, not in n, not in m.
        label_smoothing: in [0, 1], as in `F.cross_entropy`.
        scope: "image": each image is pooled on its own, as in the paper; "batch": all pixels together.
        reduction: "mean" over the segments (images, or the one batch) that have a valid pixel, "sum" over segments, or
            "none".
        group: a torch.distributed process group, with scope="batch": pool the pixels of all its ranks together. Every
            rank must make the call, with the same options and precision, at the price of five small collectives in the
            forward pass (eight for float64; one more for return_stats) and none in the backward pass. The loss and the
            statistics are the global ones, with the same bits on every rank (of the same kind of device); the gradient
            is ∂(global loss)/∂(local logits), so multiply the loss by the world size under DistributedDataParallel,
            which averages gradients. A rank may have no valid pixel, or an empty batch; one that raises, on bad input
            say, leaves the others waiting. The threshold is found by the eager solver; solver must be "auto".
        backend: "auto", "triton" or "eager"; see `lmp_triton.dispatch.choose`. "auto" may fall back, a name may not.
        solver: "auto", "select" or "sort": which kernel finds the threshold; both find the same weights up to rounding.
            "auto" sorts short segments and searches long ones (`kernels/configs.py`).
        return_stats: return (loss, PoolingStats) instead of the loss; costs one more launch, and no host sync.
        check_targets: check the labels on a GPU too, at the price of a host sync (`LMP_TRITON_CHECK=1` does so for all
            calls). On the CPU they are always checked, in compiled code never.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or (S,) for reduction="none", with S = N for
        scope="image" and 1 for "batch". 0 for a segment without a valid pixel, NaN for one with a NaN or +inf logit, an
        infinite loss (−inf as the logit of the label, or of any class under label smoothing: F.cross_entropy says inf
        there) or, where labels are not checked, a bad label; other segments are not affected.
        The gradient has the type and layout of the logits. It treats w* as constant and has no derivative of its own.

    Raises:
        ValueError, TypeError: an argument does not fit; names it, what it was and what it must be.
        IndexError: a label outside [0, C) that is not ignore_index, where labels are checked.
        NotImplementedError: a transform of torch.func, forward-mode differentiation.
        RuntimeError: group, but torch.distributed is not initialised.
    """
    cross_entropy = CrossEntropy(weight, checks.plain(ignore_index), checks.plain(label_smoothing))
    pool = Pool(checks.plain(p), checks.plain(ratio), scope, reduction, solver, group)
    return _from_logits(logits, target, cross_entropy, pool, backend, return_stats, check_targets)


def _from_logits(
    logits: Tensor,
    target: Tensor,
    cross_entropy: CrossEntropy,
    pool: Pool,
    backend: str,
    return_stats: bool,
    check_targets: bool,
) -> Tensor | tuple[Tensor, PoolingStats]:
    checks.pooled_tensor("logits", logits)
    checks.pool(pool, logits.device)
    checks.cross_entropy(cross_entropy)
    checks.logits_and_target(logits, target, cross_entropy, pool.scope)
    checks.labels(target, logits.shape[1], cross_entropy.ignore_index, check_targets)
    if logits.ndim == 2:  # rows are pixels of one image
        logits, target = logits.t().unsqueeze(0), target.unsqueeze(0)
    upsampled = cross_entropy.align_corners is not None
    backend = dispatch.choose(logits, backend, pool.solver, pool.scope, pool.group, target if upsampled else None)
    if not target.numel() and pool.group is None:
        return _nothing(logits, pool, return_stats)
    return _result(autograd.from_logits(logits, target, cross_entropy, pool, backend), pool, backend, return_stats)


def pool_losses(
    losses: Tensor,
    mask: Tensor | None = None,
    *,
    p: float | Tensor = 1.3,
    ratio: float | Tensor = 0.25,
    scope: str = "image",
    reduction: str = "mean",
    group: Any = None,
    backend: str = "auto",
    solver: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, PoolingStats]:
    """Max-pool any pixel losses that are not negative; the gradient with respect to them is w*.

    Args:
        losses: (N, *spatial), floating; with scope="batch" any shape from (n,) on. A negative, infinite or NaN loss of
            a valid pixel makes the loss and gradient of its segment NaN.
        mask: bool, the shape of losses, True where valid; None: everywhere.
        p, ratio, scope, reduction, group, backend, solver, return_stats: as in `loss_max_pooling`.

    Returns:
        As `loss_max_pooling`.

    Raises:
        ValueError, TypeError, RuntimeError: as `loss_max_pooling`.
    """
    pool = Pool(checks.plain(p), checks.plain(ratio), scope, reduction, solver, group)
    losses, mask, backend = _own_losses(losses, mask, pool, backend)
    if not losses.numel() and group is None:
        return _nothing(losses, pool, return_stats)
    return _result(autograd.from_losses(losses, mask, pool, backend), pool, backend, return_stats)


def optimal_weights(
    losses: Tensor,
    mask: Tensor | None = None,
    *,
    p: float | Tensor = 1.3,
    ratio: float | Tensor = 0.25,
    scope: str = "image",
    group: Any = None,
    backend: str = "auto",
    solver: str = "auto",
) -> tuple[Tensor, PoolingStats]:
    """The weights w* that `pool_losses` would use (Theorem 1 of the paper), outside any graph.

    Returns:
        (weights, stats): weights of the shape of losses, float32 (float64 for float64 losses), 0 where invalid.

    The arguments and errors are those of `pool_losses`.
    """
    pool = Pool(checks.plain(p), checks.plain(ratio), scope, "none", solver, group)
    given = losses
    losses, mask, backend = _own_losses(losses, mask, pool, backend)
    dtype = torch.promote_types(losses.dtype, torch.float32)
    if not losses.numel() and group is None:
        return losses.detach().to(dtype).view(given.shape), _no_stats(losses, pool)
    with torch.no_grad():
        pooled = autograd.from_losses(losses, mask, pool, backend)
        one = torch.ones((), dtype=dtype, device=losses.device)
        stages = dispatch.stages(backend)
        weights = stages.pixel_weights(PixelLosses(pooled.losses), pooled.solution, one, dtype)
    return weights.view(given.shape), _stats(pooled, pool, backend)


def upsampled_loss_max_pooling(
    logits: Tensor,
    target: Tensor,
    *,
    align_corners: bool = False,
    p: float | Tensor = 1.3,
    ratio: float | Tensor = 0.25,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scope: str = "image",
    reduction: str = "mean",
    group: Any = None,
    backend: str = "auto",
    solver: str = "auto",
    return_stats: bool = False,
    check_targets: bool = False,
) -> Tensor | tuple[Tensor, PoolingStats]:
    """`loss_max_pooling` of logits upsampled bilinearly to the size of target, without the large logits in memory.

    Value and gradient are those of

        large = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=align_corners)
        loss_max_pooling(large, target, ...)

    but what is read are the small logits and the labels, and what is written the small gradient and a few bytes a
    pixel. Half-precision logits are interpolated in float32, where `F.interpolate` rounds the large ones.

    With ratio=1 nothing is pooled and this is cross-entropy with the upsampling fused in: the mean over each image's
    valid pixels; with scope="batch", and no class weights, `F.cross_entropy(large, target)`.

    Args:
        logits: (N, C, h, w), as in `loss_max_pooling`.
        target: (N, H, W): the size to upsample to, for any ratio of the sizes, below 1 as well.
        align_corners: as in `F.interpolate`. Most segmentation heads leave it False.
        p, ratio, weight, ignore_index, label_smoothing, scope, reduction, group, backend, solver, return_stats,
            check_targets: as in `loss_max_pooling`.

    Returns:
        As `loss_max_pooling`. A NaN or +inf logit spoils the segments of the valid pixels between it and its
        neighbours.

    Raises:
        As `loss_max_pooling`; ValueError for logits that don't have two spatial dimensions.
    """
    checks.align_corners(align_corners)
    cross_entropy = CrossEntropy(weight, checks.plain(ignore_index), checks.plain(label_smoothing), align_corners)
    pool = Pool(checks.plain(p), checks.plain(ratio), scope, reduction, solver, group)
    return _from_logits(logits, target, cross_entropy, pool, backend, return_stats, check_targets)


def obstacle(*, losses: Tensor | None = None, logits: Tensor | None = None, scope: str = "image") -> str | None:
    """Why the kernels can't serve these tensors, or None if they can: no launch, no copy, no host sync.

        weights = my_weights(losses) if lmp_triton.obstacle(losses=losses) else lmp_triton.optimal_weights(losses)[0]

    Args:
        losses: what would be given to `pool_losses` or `optimal_weights`.
        logits: or what would be given to `loss_max_pooling`, (N, C, *spatial).
        scope: as in that call.

    Raises:
        ValueError: not exactly one of losses and logits.
    """
    if losses is not None and logits is None:
        checks.losses_and_mask(losses, None, scope)
        rows = (losses.shape[0], math.prod(losses.shape[1:])) if losses.ndim > 1 else (1, losses.shape[0])
        stand_in = losses.detach().as_strided(rows, (0, 0))  # flatten() might copy
        return dispatch.obstacle(stand_in, scope)
    if logits is not None and losses is None:
        if logits.ndim == 2:  # rows are pixels of one image
            logits = logits.t().unsqueeze(0)
        return dispatch.obstacle(logits, scope)
    raise ValueError("obstacle takes either losses or logits")


def _own_losses(losses: Tensor, mask: Tensor | None, pool: Pool, backend: str) -> tuple[Tensor, Tensor | None, str]:
    """Checked, as rows (N, L), and the backend that will serve them."""
    checks.pooled_tensor("losses", losses)
    checks.pool(pool, losses.device)
    checks.losses_and_mask(losses, mask, pool.scope)
    losses, mask = _rows(losses), None if mask is None else _rows(mask)
    return losses, mask, dispatch.choose(losses, backend, pool.solver, pool.scope, pool.group)


def _rows(x: Tensor) -> Tensor:
    """(N, *spatial) as (N, L), and (n,) as one row."""
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(0)


def _result(pooled: Pooled, pool: Pool, backend: str, return_stats: bool) -> Tensor | tuple[Tensor, PoolingStats]:
    return (pooled.value, _stats(pooled, pool, backend)) if return_stats else pooled.value


def _stats(pooled: Pooled, pool: Pool, backend: str) -> PoolingStats:
    _, solution, counts, losses = pooled
    total = dispatch.stages(backend).total_weight(PixelLosses(losses), solution)
    if pool.group is not None:
        total = distributed.sum_of_reals(total.double(), pool.group).to(total.dtype)
    return PoolingStats(solution[ALPHA], solution[TAU], counts[VALID], counts[SATURATED], total)


def _no_stats(values: Tensor, pool: Pool) -> PoolingStats:
    segments = segments_of(values.shape[0], pool.scope)
    real = torch.zeros(segments, dtype=torch.promote_types(values.dtype, torch.float32), device=values.device)
    count = torch.zeros(segments, dtype=torch.int64, device=values.device)
    return PoolingStats(real, real, count, count, real)


def _nothing(values: Tensor, pool: Pool, return_stats: bool) -> Tensor | tuple[Tensor, PoolingStats]:
    """The loss of no pixel at all: 0, with a graph."""
    zero = values.to(torch.promote_types(values.dtype, torch.float32)).sum()
    value = zero.expand(segments_of(values.shape[0], pool.scope)).clone() if pool.reduction == "none" else zero
    return (value, _no_stats(values, pool)) if return_stats else value
