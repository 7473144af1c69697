"""The kernels as operators of PyTorch, `torch.ops.lmp_triton.*`: the stages of `fused`, where a graph is being made.

A compiler sees an operator as one opaque node: nothing in it is traced, split or launched in another way (a cooperative
launch stays one), and what comes out, it learns from the fake implementations here. Under `torch.compile` this is the
Triton backend; a plain eager call does not come here, since the dispatcher and a Python operator cost it tens of
microseconds (`perf/NOTES.md`).

Like the stages of every backend they have no derivative, which `autograd` gives them; called by themselves under a
transform of torch.func or in forward mode, they say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import checks, settings
from .types import Backend, CrossEntropy, PixelLosses, Pool, Pooling, segments_of


def softmax_losses(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, scope: str) -> PixelLosses:
    """See `types.Backend`."""
    losses, saved = torch.ops.lmp_triton.softmax_losses(logits, target, *cross_entropy, scope)
    return PixelLosses(losses, tuple(saved))


def marked_losses(losses: Tensor, mask: Tensor | None, scope: str) -> PixelLosses:
    """See `types.Backend`."""
    return PixelLosses(torch.ops.lmp_triton.marked_losses(losses, mask, scope))


def pool_logits(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, pool: Pool) -> tuple[PixelLosses, Pooling]:
    """See `types.Backend`."""
    losses, saved, *pooling = torch.ops.lmp_triton.pool_logits(logits, target, *cross_entropy, *_flat(pool))
    return PixelLosses(losses, tuple(saved)), Pooling(*pooling)


def pool_losses(losses: Tensor, mask: Tensor | None, pool: Pool) -> tuple[PixelLosses, Pooling]:
    """See `types.Backend`."""
    marked, *pooling = torch.ops.lmp_triton.pool_losses(losses, mask, *_flat(pool))
    return PixelLosses(marked), Pooling(*pooling)


def total_weight(pixels: PixelLosses, solution: Tensor) -> Tensor:
    """See `types.Backend`."""
    return torch.ops.lmp_triton.total_weight(pixels.losses, solution)


def pixel_weights(pixels: PixelLosses, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """See `types.Backend`."""
    return torch.ops.lmp_triton.pixel_weights(pixels.losses, solution, grad_output, dtype)


def logits_gradient(
    logits: Tensor, pixels: PixelLosses, solution: Tensor, grad_output: Tensor, cross_entropy: CrossEntropy
) -> Tensor:
    """See `types.Backend`."""
    return torch.ops.lmp_triton.logits_gradient(
        logits, pixels.losses, pixels.saved, solution, grad_output, *cross_entropy
    )


def _flat(pool: Pool) -> tuple[float, float, Tensor | None, Tensor | None, str, str, str]:
    """An operator's argument has one type: a float is a constant of the graph, a tensor takes the float's place."""
    p, ratio = (1.0 if isinstance(x, Tensor) else float(x) for x in (pool.p, pool.ratio))
    p_tensor, ratio_tensor = (x if isinstance(x, Tensor) else None for x in (pool.p, pool.ratio))
    return p, ratio, p_tensor, ratio_tensor, pool.scope, pool.reduction, pool.solver


def _pool(
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    scope: str,
    reduction: str,
    solver: str,
) -> Pool:
    """What `_flat` laid flat."""
    p_or_tensor, ratio_or_tensor = p if p_tensor is None else p_tensor, ratio if ratio_tensor is None else ratio_tensor
    return Pool(p_or_tensor, ratio_or_tensor, scope, reduction, solver)


# --- the operators ------------------------------------------------------------------------------------------------


def _stages() -> Backend:
    """Triton is imported here, on first use."""
    from . import fused

    return fused


@custom_op("lmp_triton::softmax_losses", mutates_args=())
def _softmax_losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None,
    scope: str,
) -> tuple[Tensor, list[Tensor]]:
    """The losses, and what else backward needs; see `types.PixelLosses`."""
    checks.transforms(logits)
    cross_entropy = CrossEntropy(weight, ignore_index, label_smoothing, align_corners)
    pixels = _stages().softmax_losses(logits, target, cross_entropy, scope)
    return pixels.losses, list(pixels.saved)


@custom_op("lmp_triton::marked_losses", mutates_args=())
def _marked_losses(losses: Tensor, mask: Tensor | None, scope: str) -> Tensor:
    """The losses in the form of the solver."""
    checks.transforms(losses)
    return _stages().marked_losses(losses, mask, scope).losses


@custom_op("lmp_triton::pool_logits", mutates_args=())
def _pool_logits(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None,
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    scope: str,
    reduction: str,
    solver: str,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """The losses and what else backward needs (`types.PixelLosses`); value, solution and counts (`types.Pooling`)."""
    checks.transforms(logits)
    cross_entropy = CrossEntropy(weight, ignore_index, label_smoothing, align_corners)
    pool = _pool(p, ratio, p_tensor, ratio_tensor, scope, reduction, solver)
    pixels, pooling = _stages().pool_logits(logits, target, cross_entropy, pool)
    return pixels.losses, list(pixels.saved), *pooling


@custom_op("lmp_triton::pool_losses", mutates_args=())
def _pool_losses(
    losses: Tensor,
    mask: Tensor | None,
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    scope: str,
    reduction: str,
    solver: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses in the form of the solver; value, solution and counts (`types.Pooling`)."""
    checks.transforms(losses)
    pool = _pool(p, ratio, p_tensor, ratio_tensor, scope, reduction, solver)
    pixels, pooling = _stages().pool_losses(losses, mask, pool)
    return pixels.losses, *pooling


@custom_op("lmp_triton::total_weight", mutates_args=())
def _total_weight(losses: Tensor, solution: Tensor) -> Tensor:
    """Σ w* of every segment, (S,)."""
    checks.transforms(losses)
    return _stages().total_weight(PixelLosses(losses), solution)


@custom_op("lmp_triton::pixel_weights", mutates_args=())
def _pixel_weights(losses: Tensor, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """w*·∂value/∂loss_s·grad_output of every pixel, (N, L)."""
    checks.transforms(losses)
    return _stages().pixel_weights(PixelLosses(losses), solution, grad_output, dtype)


@custom_op("lmp_triton::logits_gradient", mutates_args=())
def _logits_gradient(
    logits: Tensor,
    losses: Tensor,
    saved: Sequence[Tensor],
    solution: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None,
) -> Tensor:
    """∂value/∂logits·grad_output, of the type and layout of the logits."""
    checks.transforms(logits)
    cross_entropy = CrossEntropy(weight, ignore_index, label_smoothing, align_corners)
    pixels = PixelLosses(losses, tuple(saved))
    return _stages().logits_gradient(logits, pixels, solution, grad_output, cross_entropy)


OPERATORS = (
    "softmax_losses",
    "marked_losses",
    "pool_logits",
    "pool_losses",
    "total_weight",
    "pixel_weights",
    "logits_gradient",
)


# --- what a compiler is told --------------------------------------------------------------------------------------


@_softmax_losses.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None,
    scope: str,
) -> tuple[Tensor, list[Tensor]]:
    from . import fused

    _require_interpreter(logits)
    cross_entropy = CrossEntropy(weight, ignore_index, label_smoothing, align_corners)
    losses, saved = fused.pixel_buffers(logits, target, cross_entropy)
    return losses, list(saved)


@_marked_losses.register_fake
def _(losses: Tensor, mask: Tensor | None, scope: str) -> Tensor:
    _require_interpreter(losses)
    return losses.new_empty(losses.shape, dtype=torch.float32)


@_pool_logits.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None,
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    scope: str,
    reduction: str,
    solver: str,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    from . import fused

    _require_interpreter(logits)
    cross_entropy = CrossEntropy(weight, ignore_index, label_smoothing, align_corners)
    losses, saved = fused.pixel_buffers(logits, target, cross_entropy)
    _, pooling = fused.pooling_buffers(segments_of(logits.shape[0], scope), reduction, logits.device)
    return losses, list(saved), *pooling


@_pool_losses.register_fake
def _(
    losses: Tensor,
    mask: Tensor | None,
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    scope: str,
    reduction: str,
    solver: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import fused

    _require_interpreter(losses)
    _, pooling = fused.pooling_buffers(segments_of(losses.shape[0], scope), reduction, losses.device)
    return losses.new_empty(losses.shape, dtype=torch.float32), *pooling


@_total_weight.register_fake
def _(losses: Tensor, solution: Tensor) -> Tensor:
    return losses.new_empty((solution.shape[1],), dtype=torch.float32)


@_pixel_weights.register_fake
def _(losses: Tensor, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(losses, dtype=dtype)


@_logits_gradient.register_fake
def _(
    logits: Tensor,
    losses: Tensor,
    saved: Sequence[Tensor],
    solution: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None,
) -> Tensor:
    from . import fused

    return fused.gradient_buffer(logits)


def _require_interpreter(x: Tensor) -> None:
    """What `dispatch.obstacle` can't ask while it is traced."""
    if x.device.type == "cpu" and not settings.interpreting():
        raise ValueError(f'backend="triton" cannot serve this call: {settings.NOT_INTERPRETING}')


def _refuse(*arguments: Any, **options: Any) -> NoReturn:
    raise NotImplementedError(checks.NO_TRANSFORMS)


# What every transform of torch.func comes to first. By itself jvp would make a zero of the tangent, vmap a loop.
_TRANSFORMS = torch.library.Library("lmp_triton", "FRAGMENT")
for _name in (*OPERATORS, "crossing"):  # the last is the one of `search`
    _TRANSFORMS.impl(_name, _refuse, "FuncTorchDynamicLayerFrontMode")
