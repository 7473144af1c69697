"""The Triton backend: the stages of `types.Backend`, each one launch. Allocates, then calls `lmp_triton.kernels`.

Launches of one call, the zeroing of the workspace included:

    forward     3: zero, losses, solve; one or two more for segments above 2^13 or 2^21 pixels (`kernels.select`)
                3 always with LMP_TRITON_COOPERATIVE=solve: all phases of the solve in one cooperative launch
                2 with LMP_TRITON_COOPERATIVE=forward: losses and solve in one cooperative launch
    backward    1
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import fused_upsampled, settings
from .kernels import configs, forward, given_losses, gradient, select, sort, weighting, workspace
from .kernels import cross_entropy as stage_one
from .kernels.launcher import TooLarge
from .kernels.layout import layout_of
from .kernels.logits import classes_adjacent
from .kernels.solution import Outputs, parameters
from .types import COUNT_ROWS, SOLUTION_ROWS, STEP, TAU, CrossEntropy, PixelLosses, Pool, Pooling, segments_of

P = ParamSpec("P")
X = TypeVar("X", Tensor, PixelLosses)
R = TypeVar("R")


def _on_its_device(stage: Callable[Concatenate[X, P], R]) -> Callable[Concatenate[X, P], R]:
    """Triton launches on the current device: make that the device of the first argument while a stage runs."""

    @functools.wraps(stage)
    def run(x: X, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(x if isinstance(x, Tensor) else x.losses):
            return stage(x, *args, **kwargs)

    return run


def _workspace(segments: int, device: torch.device) -> Tensor:
    return torch.zeros(segments * workspace.WORDS.value + 1, dtype=torch.int64, device=device)


@_on_its_device
def softmax_losses(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, scope: str) -> PixelLosses:
    """See `types.Backend`; logits float16, bfloat16 or float32."""
    if cross_entropy.align_corners is not None:
        statistics = _workspace(segments_of(logits.shape[0], scope), logits.device)
        return fused_upsampled.softmax_losses(logits, target, cross_entropy, statistics)
    inputs, buffers = _stage_one(logits, target, cross_entropy, scope)
    stage_one.softmax_losses(inputs, buffers, configs.table(logits.device))
    return _pixel_losses(buffers)


def _stage_one(
    logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, scope: str
) -> tuple[stage_one.Inputs, stage_one.Buffers]:
    statistics = _workspace(segments_of(logits.shape[0], scope), logits.device)
    weight, ignore_index, label_smoothing, *_ = cross_entropy
    inputs = stage_one.Inputs(logits, _walkable(target, logits), weight, ignore_index, label_smoothing)
    return inputs, stage_one.Buffers(*_pixel_buffers(logits, cross_entropy), statistics)


def _pixel_losses(buffers: stage_one.Buffers) -> PixelLosses:
    saved = (buffers.labels,) if buffers.nll is None else (buffers.labels, buffers.nll)
    return PixelLosses(buffers.losses, saved, buffers.workspace)


def _walkable(target: Tensor, logits: Tensor) -> Tensor:
    """The target, copied if it and the logits together step through memory in more ways than a kernel walks."""
    return target if len(layout_of(logits, target).sizes) <= settings.MAX_LEVELS else target.contiguous()


def pixel_buffers(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `softmax_losses` returns of `types.PixelLosses`, losses and saved, for `lmp_triton.operators` to tell."""
    if cross_entropy.align_corners is not None:
        losses, *saved = fused_upsampled.pixel_buffers(logits, tuple(target.shape[1:]))
        return losses, tuple(saved)
    losses, labels, nll = _pixel_buffers(logits, cross_entropy)
    return losses, (labels,) if nll is None else (labels, nll)


def _pixel_buffers(logits: Tensor, cross_entropy: CrossEntropy) -> tuple[Tensor, Tensor, Tensor | None]:
    """losses, labels, and nll if the gradient needs it.

    With all classes in registers the gradient kernel needs no help; otherwise −log softmax, which is the loss itself
    unless class weights or smoothing change it.
    """
    table = configs.table(logits.device)
    images, classes, *spatial = logits.shape
    classes = int(classes)  # a symbol where shapes are traced: C is a constant of the graph
    pixel_losses = torch.empty(images, math.prod(spatial), dtype=torch.float32, device=logits.device)
    labels = torch.empty_like(pixel_losses, dtype=torch.uint8 if classes <= 255 else torch.int16)
    whole = table.rows.above if classes_adjacent(logits) else configs.pixel_config(table, classes).chunk
    plain = cross_entropy.weight is None and not cross_entropy.label_smoothing
    nll = torch.empty_like(pixel_losses) if classes > whole and not plain else None
    return pixel_losses, labels, nll


@_on_its_device
def marked_losses(losses: Tensor, mask: Tensor | None, scope: str) -> PixelLosses:
    """See `types.Backend`."""
    statistics = _workspace(segments_of(losses.shape[0], scope), losses.device)
    pixel_losses = torch.empty(losses.shape, dtype=torch.float32, device=losses.device)
    given_losses.mark_losses(losses, mask, pixel_losses, statistics, configs.table(losses.device).stream)
    return PixelLosses(pixel_losses, (), statistics)


@_on_its_device
def solve(pixels: PixelLosses, pool: Pool) -> Pooling:
    """Find α* of each segment and with it the pooled loss (equations 9 and 10)."""
    losses, statistics = pixels.losses.view(segments_of(pixels.losses.shape[0], pool.scope), -1), pixels.statistics
    assert statistics is not None
    table = configs.table(losses.device)
    loss, pooling = pooling_buffers(len(losses), pool.reduction, losses.device)
    which = configs.solver_for(losses.shape[1], pool.solver, table.sort)
    SOLVERS[which](losses, statistics, _outputs(loss, pooling), pool, table)
    return pooling


def _sort(losses: Tensor, statistics: Tensor, outputs: Outputs, pool: Pool, table: configs.Table) -> None:
    """Sort runs of losses, then search them."""
    runs = -(-losses.shape[1] // table.sort.run)
    width = losses.shape[0] * runs * table.sort.run
    scratch = torch.empty(1 if runs == 1 else 3, width, dtype=torch.int32, device=losses.device)
    given = parameters(pool.p, pool.ratio)
    sort.solve_by_sorting(losses, scratch, statistics, outputs, given, pool.reduction, table.sort)


def _select(losses: Tensor, statistics: Tensor, outputs: Outputs, pool: Pool, table: configs.Table) -> None:
    """Narrow a bracket around the threshold."""
    run = functools.partial(
        select.solve_by_selection,
        losses,
        _short_list(losses.shape[0], losses.shape[1], table.select, losses.device),
        statistics,
        outputs,
        parameters(pool.p, pool.ratio),
        pool.reduction,
        table.select,
    )
    if settings.cooperative():
        with contextlib.suppress(TooLarge):
            run(cooperative=True)
            return
    run()


SOLVERS = {"sort": _sort, "select": _select}
"""What `configs.solver_for` names."""


def _short_list(segments: int, length: int, config: configs.SelectConfig, device: torch.device) -> Tensor:
    return torch.empty(segments, min(config.capacity, length), dtype=torch.float32, device=device)


def pooling_buffers(segments: int, reduction: str, device: torch.device) -> tuple[Tensor, Pooling]:
    """The loss of each segment, and the solution. Also what `lmp_triton.operators` tells a compiler."""
    solution = torch.empty(len(SOLUTION_ROWS), segments, dtype=torch.float32, device=device)
    loss = torch.empty(segments, dtype=torch.float32, device=device)
    counts = torch.empty(len(COUNT_ROWS), segments, dtype=torch.int64, device=device)
    value = loss if reduction == "none" else torch.empty((), dtype=torch.float32, device=device)
    return loss, Pooling(value, solution, counts)


def _outputs(loss: Tensor, pooling: Pooling) -> Outputs:
    return Outputs(pooling.solution, loss, pooling.counts, pooling.value, len(loss))


def pool_logits(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, pool: Pool) -> tuple[PixelLosses, Pooling]:
    """See `types.Backend`: two launches or more, or one cooperative one where that is asked for."""
    if settings.cooperative() == "forward" and cross_entropy.align_corners is None:
        length = target.numel() // segments_of(logits.shape[0], pool.scope)
        if configs.solver_for(length, pool.solver, configs.table(logits.device).sort) == "select":
            with contextlib.suppress(TooLarge):
                return _forward(logits, target, cross_entropy, pool)
    pixels = softmax_losses(logits, target, cross_entropy, pool.scope)
    return pixels, solve(pixels, pool)


def pool_losses(losses: Tensor, mask: Tensor | None, pool: Pool) -> tuple[PixelLosses, Pooling]:
    """See `types.Backend`."""
    pixels = marked_losses(losses, mask, pool.scope)
    return pixels, solve(pixels, pool)


@_on_its_device
def _forward(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, pool: Pool) -> tuple[PixelLosses, Pooling]:
    inputs, buffers = _stage_one(logits, target, cross_entropy, pool.scope)
    segments = segments_of(logits.shape[0], pool.scope)
    loss, pooling = pooling_buffers(segments, pool.reduction, logits.device)
    table = configs.table(logits.device)
    short_list = _short_list(segments, target.numel() // segments, table.select, logits.device)
    given = parameters(pool.p, pool.ratio)
    forward.losses_and_solution(inputs, buffers, short_list, _outputs(loss, pooling), given, pool.reduction, table)
    return _pixel_losses(buffers), pooling


@_on_its_device
def total_weight(pixels: PixelLosses, solution: Tensor) -> Tensor:
    """See `types.Backend`."""
    segments, device = solution.shape[1], solution.device
    rows = pixels.losses.view(segments, -1)
    totals = torch.zeros(segments, dtype=torch.int64, device=device)
    scale = weighting.scale_of(solution, solution[STEP])
    weighting.pixel_weights(rows, scale, None, totals, configs.table(device).stream)
    return (totals.double() * 2.0 ** -configs.fraction_bits(rows.shape[1]) * solution[TAU]).float()


@_on_its_device
def pixel_weights(pixels: PixelLosses, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """See `types.Backend`."""
    out = torch.empty_like(pixels.losses, dtype=dtype)
    rows, stream = pixels.losses.view(solution.shape[1], -1), configs.table(out.device).stream
    weighting.pixel_weights(rows, weighting.scale_of(solution, grad_output), out.view_as(rows), None, stream)
    return out


@_on_its_device
def logits_gradient(
    logits: Tensor, pixels: PixelLosses, solution: Tensor, grad_output: Tensor, cross_entropy: CrossEntropy
) -> Tensor:
    """See `types.Backend`."""
    if cross_entropy.align_corners is not None:
        return fused_upsampled.logits_gradient(logits, pixels, solution, grad_output, cross_entropy, gradient_buffer)
    grad = gradient_buffer(logits)
    labels, *rest = pixels.saved
    gradient.logits_gradient(
        logits,
        pixels.losses,
        labels,
        rest[0] if rest else pixels.losses,
        cross_entropy.weight,
        cross_entropy.label_smoothing,
        weighting.scale_of(solution, grad_output),
        grad,
        configs.table(logits.device),
    )
    return grad


def gradient_buffer(logits: Tensor) -> Tensor:
    """Of the layout of the logits, where that is dense. Also what `lmp_triton.operators` tells a compiler."""
    grad = torch.empty_like(logits)
    rows = classes_adjacent(logits)
    if (rows and not classes_adjacent(grad)) or len(layout_of(logits, grad).sizes) > settings.MAX_LEVELS:
        # Expanded logits, say.
        images, classes, *spatial = logits.shape
        grad = torch.empty(images, *spatial, classes, dtype=logits.dtype, device=logits.device).movedim(-1, 1)
    return grad
