"""The functions a user calls: check, choose a backend, flatten, hand on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, dispatch, distributed, operators
from .autograd import FromLogits, FromLosses, Options
from .types import PixelLosses, PoolingStats


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
            (N, C) needs scope="batch".
        target: (N, *spatial), class indices of type uint8, int8, int16, int32 or int64.
        p: the norm that bounds the weights, in [1, ∞]: 1 pools the hardest pixels alone, ∞ is the mean. A float, or a
            0-dim floating tensor on the device of the logits. Default 1.3, the best of the paper's Table 1.
        ratio: m/n, the least share of the valid pixels that the weights spread over, in (0, 1]; m = clamp(ratio·n, 1,
            n). 1 is the mean. Like p, a float or a tensor. Default 0.25, from Section 5.2 of the paper.
        weight: (C,) class weights, not negative, as in `F.cross_entropy(reduction="none")`.
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
        infinite loss or, where labels are not checked, a bad label; other segments are not affected.
        The gradient has the type and layout of the logits. It treats w* as constant and has no derivative of its own.

    Raises:
        ValueError, TypeError: an argument does not fit; names it, what it was and what it must be.
        IndexError: a label outside [0, C) that is not ignore_index, where labels are checked.
        NotImplementedError: a transform of torch.func, forward-mode differentiation.
        RuntimeError: group, but torch.distributed is not initialised.
    """
    checks.transforms(logits)
    checks.options(p, ratio, scope, reduction, group, logits.device)
    checks.cross_entropy_options(weight, ignore_index, label_smoothing)
    checks.logits_and_target(logits, target, weight, scope)
    checks.labels(target, logits.shape[1], ignore_index, check_targets)
    segments = logits.shape[0] if scope == "image" else 1
    if logits.ndim == 2:  # rows are pixels of one image
        logits, target = logits.t().unsqueeze(0), target.unsqueeze(0)
    backend = dispatch.choose(logits, backend, solver, segments, group)
    if not target.numel() and group is None:
        return _nothing(logits, segments, reduction, return_stats)
    options = Options(backend, segments, reduction, solver, ignore_index, float(label_smoothing), group)
    weight = weight if weight is None else weight.contiguous()
    pool = operators.pool_logits if _traced(backend) else FromLogits.apply
    return _result(pool(logits, target, weight, p, ratio, options), options, return_stats)


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
    checks.transforms(losses)
    checks.options(p, ratio, scope, reduction, group, losses.device)
    checks.losses_and_mask(losses, mask, scope)
    segments = losses.shape[0] if scope == "image" else 1
    losses, mask = _rows(losses), None if mask is None else _rows(mask)
    backend = dispatch.choose(losses, backend, solver, segments, group)
    if not losses.numel() and group is None:
        return _nothing(losses, segments, reduction, return_stats)
    options = Options(backend, segments, reduction, solver, group=group)
    pool = operators.pool_losses if _traced(backend) else FromLosses.apply
    return _result(pool(losses, mask, p, ratio, options), options, return_stats)


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
    checks.transforms(losses)
    checks.options(p, ratio, scope, "none", group, losses.device)
    checks.losses_and_mask(losses, mask, scope)
    segments = losses.shape[0] if scope == "image" else 1
    shape, dtype = losses.shape, torch.promote_types(losses.dtype, torch.float32)
    losses, mask = _rows(losses), None if mask is None else _rows(mask)
    backend = dispatch.choose(losses, backend, solver, segments, group)
    if not losses.numel() and group is None:
        return losses.detach().to(dtype).view(shape), _no_stats(losses, segments)
    options = Options(backend, segments, "none", solver, group=group)
    pool = operators.pool_losses if _traced(backend) else FromLosses.apply
    with torch.no_grad():
        _, solution, counts, losses = pool(losses, mask, p, ratio, options)
        one = torch.ones((), dtype=dtype, device=losses.device)
        weights = dispatch.module(backend).pixel_weights(PixelLosses(losses), solution, one, dtype)
    return weights.view(shape), _stats(solution, counts, losses, options)


def upsampled_loss_max_pooling(
    logits: Tensor, target: Tensor, *, align_corners: bool = False, **options: Any
) -> Tensor | tuple[Tensor, PoolingStats]:
    """`loss_max_pooling` of logits upsampled bilinearly to the size of target, without the large logits in memory.

    Raises:
        NotImplementedError: always; it is not built yet.
    """
    raise NotImplementedError(
        "upsampled_loss_max_pooling is not built yet; until then: "
        "loss_max_pooling(F.interpolate(logits, target.shape[1:], mode='bilinear', align_corners=...), target)"
    )


def _traced(backend: str) -> bool:
    """Whether the kernels are to be called as operators."""
    return backend == "triton" and torch.compiler.is_compiling()


def _rows(x: Tensor) -> Tensor:
    """(N, *spatial) as (N, L), and (n,) as one row."""
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(0)


def _result(outputs: tuple[Tensor, ...], options: Options, return_stats: bool) -> Tensor | tuple[Tensor, PoolingStats]:
    value, solution, counts, losses = outputs
    return (value, _stats(solution, counts, losses, options)) if return_stats else value


def _stats(solution: Tensor, counts: Tensor, losses: Tensor, options: Options) -> PoolingStats:
    total = dispatch.module(options.backend).total_weight(PixelLosses(losses), solution)
    if options.group is not None:
        total = distributed.sum_of_reals(total.double(), options.group).to(total.dtype)
    return PoolingStats(solution[0], solution[1], counts[0], counts[1], total)


def _no_stats(values: Tensor, segments: int) -> PoolingStats:
    real = torch.zeros(segments, dtype=torch.promote_types(values.dtype, torch.float32), device=values.device)
    count = torch.zeros(segments, dtype=torch.int64, device=values.device)
    return PoolingStats(real, real, count, count, real)


def _nothing(values: Tensor, segments: int, reduction: str, return_stats: bool) -> Tensor | tuple[Tensor, PoolingStats]:
    """The loss of no pixel at all: 0, with a graph."""
    zero = values.to(torch.promote_types(values.dtype, torch.float32)).sum()
    value = zero.expand(segments).clone() if reduction == "none" else zero
    return (value, _no_stats(values, segments)) if return_stats else value
