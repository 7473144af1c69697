"""The two differentiable functions, the same for every backend: from logits, and from a user's own losses.

(Under `torch.compile` the kernels are called by the same two functions as operators, see `lmp_triton.operators`.)

Forward solves, backward writes the gradient: the threshold forces a second read of the logits in any case, and a
gradient stored before grad_output is known would be flushed to zero in float16 (τ is about 1/m) and cost another pass.
What is kept in between is the logits, which the caller owns, and a few bytes a pixel; so a second backward under
retain_graph is no different from the first, and the caller's tensors are left alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, eager
from .types import PixelLosses, Pooling


class Options(NamedTuple):
    """What a call asks for, apart from its tensors."""

    backend: str
    segments: int
    reduction: str
    solver: str = "auto"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    group: Any = None


def _solve(pixels: PixelLosses, p: float | Tensor, ratio: float | Tensor, options: Options) -> Pooling:
    """The solve stage of the backend; over the ranks of a group the eager one, whoever computed the losses."""
    if options.group is not None:
        return eager.solve(pixels, p, ratio, options.segments, options.reduction, group=options.group)
    stages = dispatch.module(options.backend)
    return stages.solve(pixels, p, ratio, options.segments, options.reduction, options.solver)


NO_SECOND_DERIVATIVE = (
    "loss max-pooling has no second derivative: the weights w* are held constant in its gradient "
    "(Rota Bulò et al. 2017, Section 4), so differentiating that gradient again would be wrong"
)


class _Once(torch.autograd.Function):
    """The identity on a gradient, whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *others: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def refuse_second_derivative(grad: Tensor, *sources: Tensor) -> Tensor:
    """The gradient as it is; under create_graph=True, tied to its sources so that differentiating it raises."""
    return _Once.apply(grad, *sources) if torch.is_grad_enabled() else grad


class FromLogits(torch.autograd.Function):
    """Logits (N, C, *spatial) and target (N, *spatial) to the pooled loss.

    Returns (value, solution, counts, losses); only `value` is differentiable, and only by the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        p: float | Tensor,
        ratio: float | Tensor,
        options: Options,
    ) -> tuple[Tensor, ...]:
        stages = dispatch.module(options.backend)
        call = (logits, target, weight, options.ignore_index, options.label_smoothing)
        if options.group is None:
            pixels, pooling = stages.pool_logits(*call, p, ratio, options.segments, options.reduction, options.solver)
        else:
            pixels = stages.softmax_losses(*call, options.segments)
            pooling = _solve(pixels, p, ratio, options)
        ctx.options = options
        ctx.save_for_backward(logits, weight, pooling.solution, pixels.losses, *pixels.saved)
        return _outputs(ctx, pixels, pooling)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None or not ctx.needs_input_grad[0]:
            return (None,) * 6
        logits, weight, solution, losses, *saved = ctx.saved_tensors
        options: Options = ctx.options
        with torch.no_grad():
            grad = dispatch.module(options.backend).logits_gradient(
                logits, PixelLosses(losses, tuple(saved)), solution, grad_output, weight, options.label_smoothing
            )
        return refuse_second_derivative(grad, logits, grad_output), None, None, None, None, None


class FromLosses(torch.autograd.Function):
    """A user's own losses (N, L) and mask (N, L) to the pooled loss; returns as `FromLogits`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, mask: Tensor | None, p: float | Tensor, ratio: float | Tensor, options: Options
    ) -> tuple[Tensor, ...]:
        pixels = dispatch.module(options.backend).marked_losses(values, mask, options.segments)
        pooling = _solve(pixels, p, ratio, options)
        ctx.options, ctx.dtype = options, values.dtype
        # The values themselves are kept for the graph of a second derivative only; they are the caller's.
        ctx.save_for_backward(values, pooling.solution, pixels.losses)
        return _outputs(ctx, pixels, pooling)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None or not ctx.needs_input_grad[0]:
            return (None,) * 5
        values, solution, losses = ctx.saved_tensors
        with torch.no_grad():
            grad = dispatch.module(ctx.options.backend).pixel_weights(
                PixelLosses(losses), solution, grad_output, ctx.dtype
            )
        return refuse_second_derivative(grad, values, grad_output), None, None, None, None


def _outputs(ctx: Any, pixels: PixelLosses, pooling: Pooling) -> tuple[Tensor, ...]:
    ctx.mark_non_differentiable(pooling.solution, pooling.counts, pixels.losses)
    ctx.set_materialize_grads(False)
    return pooling.value, pooling.solution, pooling.counts, pixels.losses
