"""The two differentiable functions, the same for every backend: from logits, and from a user's own losses.

Forward solves, backward writes the gradient: the threshold forces a second read of the logits in any case, and a
gradient stored before grad_output is known would be flushed to zero in float16 (τ is about 1/m) and cost another pass.
What is kept in between is the logits, which the caller owns, and a few bytes a pixel; so a second backward under
retain_graph is no different from the first, and the caller's tensors are left alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, eager
from .types import CrossEntropy, PixelLosses, Pool, Pooling


class Pooled(NamedTuple):
    """What both return."""

    value: Tensor
    """The reduced loss, the only one with a derivative."""
    solution: Tensor
    counts: Tensor
    losses: Tensor
    """(N, L), see `types.PixelLosses`; the others as in `types.Pooling`."""


def from_logits(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, pool: Pool, backend: str) -> Pooled:
    """Logits (N, C, *spatial) and target (N, *spatial) to the pooled loss, differentiable by the logits."""
    # Autograd and Dynamo look for tensors among the arguments, not in what these hold.
    weight, *cross_entropy_options = cross_entropy
    weight = None if weight is None else weight.contiguous()
    p, ratio, *pool_options = pool
    return Pooled(
        *_FromLogits.apply(logits, target, weight, p, ratio, tuple(cross_entropy_options), tuple(pool_options), backend)
    )


def from_losses(losses: Tensor, mask: Tensor | None, pool: Pool, backend: str) -> Pooled:
    """A user's own losses (N, L) and mask (N, L) to the pooled loss, differentiable by the losses."""
    p, ratio, *pool_options = pool
    return Pooled(*_FromLosses.apply(losses, mask, p, ratio, tuple(pool_options), backend))


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        p: float | Tensor,
        ratio: float | Tensor,
        cross_entropy_options: tuple[Any, ...],
        pool_options: tuple[Any, ...],
        backend: str,
    ) -> tuple[Tensor, ...]:
        stages = dispatch.stages(backend)
        cross_entropy, pool = CrossEntropy(weight, *cross_entropy_options), Pool(p, ratio, *pool_options)
        if pool.group is None:
            pixels, pooling = stages.pool_logits(logits, target, cross_entropy, pool)
        else:  # whoever computes the losses, the eager solver adds over the ranks
            pixels = stages.softmax_losses(logits, target, cross_entropy, pool.scope)
            pooling = eager.solve(pixels, pool)
        ctx.backend, ctx.cross_entropy_options = backend, cross_entropy_options
        ctx.save_for_backward(logits, weight, pooling.solution, pixels.losses, *pixels.saved)
        return _outputs(ctx, pixels, pooling)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None or not ctx.needs_input_grad[0]:
            return (None,) * 8
        checks.batched_gradient(grad_output)
        logits, weight, solution, losses, *saved = ctx.saved_tensors
        with torch.no_grad():
            grad = dispatch.stages(ctx.backend).logits_gradient(
                logits,
                PixelLosses(losses, tuple(saved)),
                solution,
                grad_output,
                CrossEntropy(weight, *ctx.cross_entropy_options),
            )
        return checks.refuse_second_derivative(grad, logits, grad_output), *(None,) * 7


class _FromLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        losses: Tensor,
        mask: Tensor | None,
        p: float | Tensor,
        ratio: float | Tensor,
        pool_options: tuple[Any, ...],
        backend: str,
    ) -> tuple[Tensor, ...]:
        stages, pool = dispatch.stages(backend), Pool(p, ratio, *pool_options)
        if pool.group is None:
            pixels, pooling = stages.pool_losses(losses, mask, pool)
        else:
            pixels = stages.marked_losses(losses, mask, pool.scope)
            pooling = eager.solve(pixels, pool)
        ctx.backend, ctx.dtype = backend, losses.dtype
        # The losses as given are kept for the graph of a second derivative only; they are the caller's.
        ctx.save_for_backward(losses, pooling.solution, pixels.losses)
        return _outputs(ctx, pixels, pooling)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None or not ctx.needs_input_grad[0]:
            return (None,) * 6
        checks.batched_gradient(grad_output)
        given, solution, losses = ctx.saved_tensors
        with torch.no_grad():
            grad = dispatch.stages(ctx.backend).pixel_weights(PixelLosses(losses), solution, grad_output, ctx.dtype)
        return checks.refuse_second_derivative(grad, given, grad_output), *(None,) * 5


def _outputs(ctx: Any, pixels: PixelLosses, pooling: Pooling) -> tuple[Tensor, ...]:
    ctx.mark_non_differentiable(pooling.solution, pooling.counts, pixels.losses)
    ctx.set_materialize_grads(False)
    return pooling.value, pooling.solution, pooling.counts, pixels.losses
