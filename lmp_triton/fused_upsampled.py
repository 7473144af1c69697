"""Stages one and three of the Triton backend for logits that are upsampled on the way, see `kernels.upsampling`.

Launches of one call: one more forward than without upsampling, for the nodes; two backward, the sums of every span and
those of every node, and one before them that writes the weights where not all classes fit into registers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .kernels import configs, upsampled_gradient, upsampled_losses, weighting
from .kernels.upsampling import plan
from .types import CrossEntropy, PixelLosses


def pixel_buffers(logits: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """losses (N, L), labels (N, H, W), log2 Σ 2^x (N, L) and nodes (N, C, h·w), the last three saved for the gradient.

    Also what `lmp_triton.operators` tells a compiler.
    """
    images, classes, *nodes = logits.shape
    losses = torch.empty(images, size[0] * size[1], dtype=torch.float32, device=logits.device)
    narrow = torch.uint8 if int(classes) <= 256 else torch.int16
    labels = torch.empty(images, *size, dtype=narrow, device=logits.device)
    relative = torch.empty(images, classes, nodes[0] * nodes[1], dtype=torch.float32, device=logits.device)
    return losses, labels, torch.empty_like(losses), relative


def softmax_losses(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, statistics: Tensor) -> PixelLosses:
    """See `types.Backend`; statistics: zeroed, of every segment."""
    weight, ignore_index, label_smoothing, align_corners = cross_entropy
    table = configs.table(logits.device)
    losses, labels, log_totals, nodes = pixel_buffers(logits, tuple(target.shape[1:]))
    dots = torch.empty_like(nodes[:, 0]) if label_smoothing else None
    upsampled_losses.relative_nodes(logits, weight, nodes, dots, table.nodes)
    inputs = upsampled_losses.Inputs(target, weight, ignore_index, label_smoothing)
    buffers = upsampled_losses.Buffers(nodes, dots, losses, labels, log_totals, statistics)
    way = plan(logits, tuple(target.shape[1:]), target.stride(), bool(align_corners), table, label_smoothing > 0)
    upsampled_losses.softmax_losses(inputs, buffers, way)
    return PixelLosses(losses, (labels, log_totals, nodes), statistics)


def logits_gradient(
    logits: Tensor,
    pixels: PixelLosses,
    solution: Tensor,
    grad_output: Tensor,
    cross_entropy: CrossEntropy,
    empty: Callable[[Tensor], Tensor],
) -> Tensor:
    """See `types.Backend`; empty: makes room for it, late, when what else was needed is free again."""
    weight, _, label_smoothing, align_corners = cross_entropy
    labels, log_totals, nodes = pixels.saved
    losses, size, table = pixels.losses, tuple(labels.shape[1:]), configs.table(logits.device)
    scale = weighting.scale_of(solution, grad_output)
    way = plan(logits, size, (size[0] * size[1], size[1], 1), bool(align_corners), table, label_smoothing > 0)
    weights = None
    if way.constants.chunk < logits.shape[1]:
        rows = losses.view(solution.shape[1], -1)
        weights = torch.empty_like(losses)
        weighting.pixel_weights(rows, scale, weights.view_as(rows), None, table.stream)
    sums = torch.empty(upsampled_gradient.sums_shape(logits.shape, way), dtype=torch.float32, device=logits.device)
    room = upsampled_gradient.exchange_shape(len(logits), way)
    exchanged = torch.empty(room, dtype=torch.float32, device=logits.device)
    given = upsampled_gradient.Given(nodes, losses, labels, log_totals, weights, weight, label_smoothing)
    upsampled_gradient.sums_of_spans(given, scale, sums, exchanged, way)
    del exchanged, given, weights
    grad = empty(logits)
    upsampled_gradient.nodes_gradient(sums, grad, way, table.stream)
    return grad
