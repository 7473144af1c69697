"""The kernels as operators of PyTorch, `torch.ops.lmp_triton.*`: what traced code calls instead of `fused`.

A compiler sees an operator as one opaque node: nothing in it is traced, split or launched in another way (a cooperative
launch stays one), and what comes out, it learns from the fake implementations here. Under `torch.compile` this is the
Triton backend; a plain eager call does not come here, since the dispatcher and a Python operator cost it tens of
microseconds (`perf/NOTES.md`).

No operator has a derivative of its derivative, a batching rule or a forward derivative; each says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import checks, dispatch
from .autograd import NO_SECOND_DERIVATIVE, Options, refuse_second_derivative
from .types import PixelLosses


def pool_logits(
    logits: Tensor, target: Tensor, weight: Tensor | None, p: float | Tensor, ratio: float | Tensor, options: Options
) -> tuple[Tensor, ...]:
    """`autograd.FromLogits.apply`, as an operator."""
    value, solution, counts, losses, _ = torch.ops.lmp_triton.pool_logits(
        logits,
        target,
        weight,
        *_parameters(p, ratio),
        options.segments,
        options.reduction,
        options.solver,
        options.ignore_index,
        options.label_smoothing,
    )
    return value, solution, counts, losses


def pool_losses(
    values: Tensor, mask: Tensor | None, p: float | Tensor, ratio: float | Tensor, options: Options
) -> tuple[Tensor, ...]:
    """`autograd.FromLosses.apply`, as an operator."""
    return torch.ops.lmp_triton.pool_losses(
        values, mask, *_parameters(p, ratio), options.segments, options.reduction, options.solver
    )


def logits_gradient(
    logits: Tensor,
    pixels: PixelLosses,
    solution: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """See `eager.logits_gradient`."""
    return torch.ops.lmp_triton.logits_gradient(
        logits, pixels.losses, pixels.saved, solution, grad_output, weight, label_smoothing
    )


def pixel_weights(pixels: PixelLosses, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """See `eager.pixel_weights`."""
    return torch.ops.lmp_triton.pixel_weights(pixels.losses, solution, grad_output, dtype)


def total_weight(pixels: PixelLosses, solution: Tensor) -> Tensor:
    """See `eager.total_weight`."""
    return torch.ops.lmp_triton.total_weight(pixels.losses, solution)


def _parameters(p: float | Tensor, ratio: float | Tensor) -> tuple[float, float, Tensor | None, Tensor | None]:
    """An operator's argument has one type: a float is a constant of the graph, a tensor takes the float's place."""
    floats = (1.0 if isinstance(x, Tensor) else float(x) for x in (p, ratio))
    tensors = (x if isinstance(x, Tensor) else None for x in (p, ratio))
    return (*floats, *tensors)  # type: ignore[return-value]


# --- the operators ------------------------------------------------------------------------------------------------


def _stages() -> ModuleType:
    """Triton is imported here, on first use."""
    from . import fused

    return fused


def _either(tensor: Tensor | None, constant: float) -> float | Tensor:
    return constant if tensor is None else tensor


@custom_op("lmp_triton::pool_logits", mutates_args=())
def _pool_logits(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    segments: int,
    reduction: str,
    solver: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Value, solution and counts (see `types.Pooling`), losses and what else backward needs (`types.PixelLosses`)."""
    checks.transforms(logits)
    pixels, pooling = _stages().pool_logits(
        logits,
        target,
        weight,
        ignore_index,
        label_smoothing,
        _either(p_tensor, p),
        _either(ratio_tensor, ratio),
        segments,
        reduction,
        solver,
    )
    return pooling.value, pooling.solution, pooling.counts, pixels.losses, list(pixels.saved)


@custom_op("lmp_triton::logits_gradient", mutates_args=())
def _logits_gradient(
    logits: Tensor,
    losses: Tensor,
    saved: Sequence[Tensor],
    solution: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """∂value/∂logits·grad_output, of the type and layout of the logits."""
    pixels = PixelLosses(losses, tuple(saved))
    return _stages().logits_gradient(logits, pixels, solution, grad_output, weight, label_smoothing)


@custom_op("lmp_triton::pool_losses", mutates_args=())
def _pool_losses(
    values: Tensor,
    mask: Tensor | None,
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    segments: int,
    reduction: str,
    solver: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, solution and counts (see `types.Pooling`), and the losses in the form of the solver."""
    checks.transforms(values)
    stages = _stages()
    pixels = stages.marked_losses(values, mask, segments)
    pooling = stages.solve(pixels, _either(p_tensor, p), _either(ratio_tensor, ratio), segments, reduction, solver)
    return pooling.value, pooling.solution, pooling.counts, pixels.losses


@custom_op("lmp_triton::pixel_weights", mutates_args=())
def _pixel_weights(losses: Tensor, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """w*·∂value/∂loss_s·grad_output of every pixel, (N, L)."""
    return _stages().pixel_weights(PixelLosses(losses), solution, grad_output, dtype)


@custom_op("lmp_triton::total_weight", mutates_args=())
def _total_weight(losses: Tensor, solution: Tensor) -> Tensor:
    """Σ w* of every segment, (S,)."""
    return _stages().total_weight(PixelLosses(losses), solution)


OPERATORS = (_pool_logits, _logits_gradient, _pool_losses, _pixel_weights, _total_weight)


# --- what a compiler is told --------------------------------------------------------------------------------------


@_pool_logits.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    segments: int,
    reduction: str,
    solver: str,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    _require_interpreter(logits)
    stages = _stages()
    table = stages.configs.table(logits.device)
    losses, *saved = stages.pixel_buffers(logits, table, weight is None and not label_smoothing)
    pooling = stages.pooling_buffers(segments, reduction, logits.device)
    return pooling.value, pooling.solution, pooling.counts, losses, [x for x in saved if x is not None]


@_logits_gradient.register_fake
def _(
    logits: Tensor,
    losses: Tensor,
    saved: Sequence[Tensor],
    solution: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    return _stages().gradient_buffer(logits)


@_pool_losses.register_fake
def _(
    values: Tensor,
    mask: Tensor | None,
    p: float,
    ratio: float,
    p_tensor: Tensor | None,
    ratio_tensor: Tensor | None,
    segments: int,
    reduction: str,
    solver: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _require_interpreter(values)
    pooling = _stages().pooling_buffers(segments, reduction, values.device)
    return pooling.value, pooling.solution, pooling.counts, values.new_empty(values.shape, dtype=torch.float32)


@_pixel_weights.register_fake
def _(losses: Tensor, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(losses, dtype=dtype)


@_total_weight.register_fake
def _(losses: Tensor, solution: Tensor) -> Tensor:
    return losses.new_empty((solution.shape[1],), dtype=torch.float32)


def _require_interpreter(x: Tensor) -> None:
    """What `dispatch.obstacle` can't ask while it is traced."""
    if x.device.type == "cpu" and not dispatch.interpreting():
        raise ValueError(f'backend="triton" cannot serve this call: {dispatch.NOT_INTERPRETING}')


# --- derivatives, and their absence -------------------------------------------------------------------------------


def _keep_for_logits(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, _, weight, *_, label_smoothing = inputs
    _, solution, counts, losses, saved = output
    ctx.label_smoothing = label_smoothing
    ctx.save_for_backward(logits, weight, solution, losses, *saved)
    ctx.mark_non_differentiable(solution, counts, losses, *saved)
    ctx.set_materialize_grads(False)


def _gradient_of_logits(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 12
    logits, weight, solution, losses, *saved = ctx.saved_tensors
    with torch.no_grad():
        grad = logits_gradient(
            logits, PixelLosses(losses, tuple(saved)), solution, grad_output, weight, ctx.label_smoothing
        )
    return refuse_second_derivative(grad, logits, grad_output), *(None,) * 11


def _keep_for_losses(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    values, *_ = inputs
    _, solution, counts, losses = output
    ctx.dtype = values.dtype
    ctx.save_for_backward(values, solution, losses)
    ctx.mark_non_differentiable(solution, counts, losses)
    ctx.set_materialize_grads(False)


def _gradient_of_losses(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 9
    values, solution, losses = ctx.saved_tensors
    with torch.no_grad():
        grad = pixel_weights(PixelLosses(losses), solution, grad_output, ctx.dtype)
    return refuse_second_derivative(grad, values, grad_output), *(None,) * 8


def _no_second_derivative(ctx: Any, *grad_outputs: Any) -> NoReturn:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def _no_batching(info: Any, in_dims: Any, *arguments: Any) -> NoReturn:
    raise NotImplementedError(checks.NO_TRANSFORMS)


_pool_logits.register_autograd(_gradient_of_logits, setup_context=_keep_for_logits)
_pool_losses.register_autograd(_gradient_of_losses, setup_context=_keep_for_losses)
for _operator in (_logits_gradient, _pixel_weights, _total_weight):
    _operator.register_autograd(_no_second_derivative)
for _operator in OPERATORS:
    _operator.register_vmap(_no_batching)
