"""The Triton backend: the stages of `lmp_triton.eager`, each one launch. Allocates, then calls `lmp_triton.kernels`.

Launches of one call, the zeroing of the workspace included:

    forward     3: zero, losses, solve; one or two more for segments above 2^13 or 2^19 pixels (`kernels.select`)
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

from . import dispatch
from .kernels import configs, cross_entropy, forward, gradient, select, sort, weights, workspace
from .kernels import losses as own_losses
from .kernels.launch import TooLarge
from .kernels.layout import LEVELS, layout_of
from .kernels.solution import parameters
from .types import SOLUTION_ROWS, PixelLosses, Pooling

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
def softmax_losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    segments: int,
) -> PixelLosses:
    """See `eager.softmax_losses`; logits (N, C, *spatial) float16, bfloat16 or float32, target (N, *spatial)."""
    target = _walkable(target, logits)
    table = configs.table(logits.device)
    statistics = _workspace(segments, logits.device)
    pixel_losses, labels, nll = pixel_buffers(logits, table, weight is None and not label_smoothing)
    cross_entropy.softmax_losses(
        logits, target, weight, ignore_index, label_smoothing, pixel_losses, labels, nll, statistics, table
    )
    return PixelLosses(pixel_losses, (labels,) if nll is None else (labels, nll), statistics)


def _walkable(target: Tensor, logits: Tensor) -> Tensor:
    """The target, copied if it and the logits together step through memory in more ways than a kernel walks."""
    return target if len(layout_of(logits, target).sizes) <= LEVELS else target.contiguous()


def pixel_buffers(logits: Tensor, table: configs.Table, plain: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """losses, labels, and nll if the gradient needs it. Also what `lmp_triton.operators` tells a compiler.

    With all classes in registers the gradient kernel needs no help; otherwise −log softmax, which is the loss itself
    (plain) unless class weights or smoothing change it.
    """
    images, classes, *spatial = logits.shape
    classes = int(classes)  # a symbol where shapes are traced: C is a constant of the graph
    pixel_losses = torch.empty(images, math.prod(spatial), dtype=torch.float32, device=logits.device)
    labels = torch.empty_like(pixel_losses, dtype=torch.uint8 if classes <= 256 else torch.int16)
    whole = table.rows.above if cross_entropy.classes_adjacent(logits) else configs.pixel_config(table, classes).chunk
    nll = torch.empty_like(pixel_losses) if classes > whole and not plain else None
    return pixel_losses, labels, nll


@_on_its_device
def marked_losses(values: Tensor, mask: Tensor | None, segments: int) -> PixelLosses:
    """See `eager.marked_losses`."""
    statistics = _workspace(segments, values.device)
    pixel_losses = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    own_losses.mark_losses(values, mask, pixel_losses, statistics, configs.table(values.device).stream)
    return PixelLosses(pixel_losses, (), statistics)


@_on_its_device
def solve(
    pixels: PixelLosses, p: float | Tensor, ratio: float | Tensor, segments: int, reduction: str, solver: str = "auto"
) -> Pooling:
    """See `eager.solve`; solver: "sort", "select", or "auto" for the one the table says."""
    device = pixels.losses.device
    table = configs.table(device)
    assert pixels.statistics is not None
    losses = pixels.losses.view(segments, -1)
    length = losses.shape[1]
    pooling = pooling_buffers(segments, reduction, device)
    rest = (pixels.statistics, pooling.solution, pooling.loss, pooling.counts, pooling.value)
    options = (parameters(p, ratio), reduction)
    if configs.solver_for(length, solver, table.sort) == "sort":
        runs = -(-length // table.sort.run)
        scratch = torch.empty(1 if runs == 1 else 3, segments * runs * table.sort.run, dtype=torch.int32, device=device)
        sort.sort(losses, scratch, *rest, *options, table.sort)
        return pooling
    short_list = _short_list(segments, length, table.select, device)
    if dispatch.cooperative():
        with contextlib.suppress(TooLarge):
            select.select(losses, short_list, *rest, *options, table.select, cooperative=True)
            return pooling
    select.select(losses, short_list, *rest, *options, table.select)
    return pooling


def _short_list(segments: int, length: int, config: configs.SelectConfig, device: torch.device) -> Tensor:
    return torch.empty(segments, min(config.capacity, length), dtype=torch.float32, device=device)


def pooling_buffers(segments: int, reduction: str, device: torch.device) -> Pooling:
    """Also what `lmp_triton.operators` tells a compiler."""
    solution = torch.empty(len(SOLUTION_ROWS), segments, dtype=torch.float32, device=device)
    loss = torch.empty(segments, dtype=torch.float32, device=device)
    counts = torch.empty(2, segments, dtype=torch.int64, device=device)
    value = loss if reduction == "none" else torch.empty((), dtype=torch.float32, device=device)
    return Pooling(loss, value, solution, counts)


def pool_logits(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    p: float | Tensor,
    ratio: float | Tensor,
    segments: int,
    reduction: str,
    solver: str = "auto",
) -> tuple[PixelLosses, Pooling]:
    """`softmax_losses` and `solve`: two launches or more, or one cooperative one where that is asked for."""
    if dispatch.cooperative() == "forward":
        length = target.numel() // segments
        if configs.solver_for(length, solver, configs.table(logits.device).sort) == "select":
            with contextlib.suppress(TooLarge):
                return _forward(
                    logits, target, weight, ignore_index, label_smoothing, p, ratio, segments, reduction, length
                )
    pixels = softmax_losses(logits, target, weight, ignore_index, label_smoothing, segments)
    return pixels, solve(pixels, p, ratio, segments, reduction, solver)


@_on_its_device
def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    p: float | Tensor,
    ratio: float | Tensor,
    segments: int,
    reduction: str,
    length: int,
) -> tuple[PixelLosses, Pooling]:
    target = _walkable(target, logits)
    table = configs.table(logits.device)
    statistics = _workspace(segments, logits.device)
    pixel_losses, labels, nll = pixel_buffers(logits, table, weight is None and not label_smoothing)
    pooling = pooling_buffers(segments, reduction, logits.device)
    forward.forward(
        logits,
        target,
        weight,
        ignore_index,
        label_smoothing,
        pixel_losses,
        labels,
        nll,
        _short_list(segments, length, table.select, logits.device),
        statistics,
        pooling.solution,
        pooling.loss,
        pooling.counts,
        pooling.value,
        parameters(p, ratio),
        reduction,
        table,
    )
    return PixelLosses(pixel_losses, (labels,) if nll is None else (labels, nll), statistics), pooling


@_on_its_device
def total_weight(pixels: PixelLosses, solution: Tensor) -> Tensor:
    """See `eager.total_weight`."""
    segments, device = solution.shape[1], solution.device
    rows = pixels.losses.view(segments, -1)
    totals = torch.zeros(segments, dtype=torch.int64, device=device)
    weights.pixel_weights(rows, solution, solution[4], None, totals, configs.table(device).stream)
    return (totals.double() * 2.0 ** -configs.fraction_bits(rows.shape[1]) * solution[1]).float()


@_on_its_device
def pixel_weights(pixels: PixelLosses, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """See `eager.pixel_weights`."""
    out = torch.empty_like(pixels.losses, dtype=dtype)
    rows, stream = pixels.losses.view(solution.shape[1], -1), configs.table(out.device).stream
    weights.pixel_weights(rows, solution, grad_output, out.view_as(rows), None, stream)
    return out


@_on_its_device
def logits_gradient(
    logits: Tensor,
    pixels: PixelLosses,
    solution: Tensor,
    grad_output: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """See `eager.logits_gradient`; logits (N, C, *spatial)."""
    grad = gradient_buffer(logits)
    labels, *rest = pixels.saved
    gradient.logits_gradient(
        logits,
        pixels.losses,
        labels,
        rest[0] if rest else pixels.losses,
        weight,
        label_smoothing,
        solution,
        grad_output,
        grad,
        configs.table(logits.device),
    )
    return grad


def gradient_buffer(logits: Tensor) -> Tensor:
    """Of the layout of the logits, where that is dense. Also what `lmp_triton.operators` tells a compiler."""
    grad = torch.empty_like(logits)
    rows = cross_entropy.classes_adjacent(logits)
    if (rows and not cross_entropy.classes_adjacent(grad)) or len(layout_of(logits, grad).sizes) > LEVELS:
        # Expanded logits, say.
        images, classes, *spatial = logits.shape
        grad = torch.empty(images, *spatial, classes, dtype=logits.dtype, device=logits.device).movedim(-1, 1)
    return grad
