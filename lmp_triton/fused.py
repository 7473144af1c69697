"""The Triton backend: the stages of `lmp_triton.eager`, each one launch. Allocates, then calls `lmp_triton.kernels`.

Launches of one call: forward 3 (zeroing the workspace, losses, solve; one or two more for long segments, see
`kernels.select`), backward 1.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from .kernels import configs, cross_entropy, gradient, select, sort, weights, workspace
from .kernels import losses as own_losses
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
    """See `eager.softmax_losses`; logits float16, bfloat16 or float32."""
    images, classes, pixels = logits.shape
    statistics = _workspace(segments, logits.device)
    pixel_losses = torch.empty(images, pixels, dtype=torch.float32, device=logits.device)
    labels = torch.empty_like(pixel_losses, dtype=torch.uint8 if classes <= 256 else torch.int16)
    # With all classes in registers the gradient kernel needs no help; otherwise −log softmax, which is the loss itself
    # unless class weights or smoothing change it.
    chunked = classes > configs.pixel_config(classes).chunk
    plain = weight is None and not label_smoothing
    nll = torch.empty_like(pixel_losses) if chunked and not plain else None
    cross_entropy.softmax_losses(
        logits, target, weight, ignore_index, label_smoothing, pixel_losses, labels, nll, statistics
    )
    return PixelLosses(pixel_losses, (labels,) if nll is None else (labels, nll), statistics)


@_on_its_device
def marked_losses(values: Tensor, mask: Tensor | None, segments: int) -> PixelLosses:
    """See `eager.marked_losses`."""
    statistics = _workspace(segments, values.device)
    pixel_losses = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    own_losses.mark_losses(values, mask, pixel_losses, statistics)
    return PixelLosses(pixel_losses, (), statistics)


@_on_its_device
def solve(
    pixels: PixelLosses, p: float | Tensor, ratio: float | Tensor, segments: int, reduction: str, solver: str = "auto"
) -> Pooling:
    """See `eager.solve`; solver: "sort", "select", or "auto" for the one the table says."""
    device = pixels.losses.device
    assert pixels.statistics is not None
    losses = pixels.losses.view(segments, -1)
    length = losses.shape[1]
    sorting = configs.solver_for(length, solver) == "sort"
    scratch: Tensor
    if sorting:
        runs = -(-length // configs.SORT.run)
        scratch = torch.empty(
            1 if runs == 1 else 3, segments * runs * configs.SORT.run, dtype=torch.int32, device=device
        )
    else:
        scratch = torch.empty(segments, min(configs.SELECT.capacity, length), dtype=torch.float32, device=device)
    solution = torch.empty(len(SOLUTION_ROWS), segments, dtype=torch.float32, device=device)
    loss = torch.empty(segments, dtype=torch.float32, device=device)
    counts = torch.empty(2, segments, dtype=torch.int64, device=device)
    value = loss if reduction == "none" else torch.empty((), dtype=torch.float32, device=device)
    (sort.sort if sorting else select.select)(
        losses,
        scratch,
        pixels.statistics,
        solution,
        loss,
        counts,
        value,
        _parameter(p),
        _parameter(ratio),
        reduction,
    )
    return Pooling(loss, value, solution, counts)


def _parameter(x: float | Tensor) -> int | Tensor:
    return x.double() if isinstance(x, Tensor) else struct.unpack("<q", struct.pack("<d", x))[0]


@_on_its_device
def total_weight(pixels: PixelLosses, solution: Tensor) -> Tensor:
    """See `eager.total_weight`."""
    segments, device = solution.shape[1], solution.device
    rows = pixels.losses.view(segments, -1)
    totals = torch.zeros(segments, dtype=torch.int64, device=device)
    weights.pixel_weights(rows, solution, solution[4], None, totals)
    return (totals.double() * 2.0 ** -configs.fraction_bits(rows.shape[1]) * solution[1]).float()


@_on_its_device
def pixel_weights(pixels: PixelLosses, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
    """See `eager.pixel_weights`."""
    out = torch.empty_like(pixels.losses, dtype=dtype)
    segments = solution.shape[1]
    weights.pixel_weights(pixels.losses.view(segments, -1), solution, grad_output, out.view(segments, -1), None)
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
    """See `eager.logits_gradient`."""
    grad = torch.empty_like(logits)
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
    )
    return grad
