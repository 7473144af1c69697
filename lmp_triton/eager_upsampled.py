"""Stages one and three of the eager backend for logits that are upsampled on the way, see `lmp_triton.bilinear`.

The large logits exist a band of rows at a time, small enough for a CPU's cache; what is kept is 10 bytes a pixel.
A band is rows @ x @ columns, two small matrix products whose matrices have two entries a row, and its gradient goes
back by their transposes: always the same sums in the same order. (While a graph is made, one band is all pixels: it
must not depend on sizes.)

The logits given are called nodes. A softmax does not change when all classes of a pixel move alike, and what is added
to all classes of a node moves those of its pixels alike. So each node is taken relative to its largest class: an
interpolated logit is then never above 0, and its exponential needs no maximum of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import bilinear
from .powers import LOG2E
from .settings import on_host, traced
from .types import IGNORED, CrossEntropy, PixelLosses

LN2 = 0.6931471805599453

BAND_ELEMENTS = 1 << 19
"""Interpolated logits a band on the CPU: with its exponentials it stays in the second-level cache."""

DEVICE_BAND_ELEMENTS = 1 << 24
"""The same elsewhere, where a band must fill the device."""

LOWEST = -1e30
"""What a node's class below it counts as, −inf included: 0·(−inf) would be NaN."""

INFINITE = 1e20
"""A pixel loss from here on comes of a label whose class is masked so at one of its nodes: no number."""


class Band(NamedTuple):
    """Some rows of pixels of some images, and the rows of nodes they lie between."""

    images: slice
    pixels: slice
    nodes: slice


class Upsampling(NamedTuple):
    """All that follows from sizes."""

    rows: Tensor
    """(H, h), see `bilinear.weights`."""
    columns: Tensor
    """(W, w)."""
    bands: list[Band]

    def up(self, x: Tensor, band: Band) -> Tensor:
        """(n, C, rows of the band, W) of all nodes (N, C, h, w)."""
        with torch.autocast(x.device.type, enabled=False):
            return self.rows[band.pixels, band.nodes] @ (x[band.images, :, band.nodes] @ self.columns.mT)

    def down(self, d: Tensor, band: Band) -> Tensor:
        """The transpose of `up`: (n, C, rows of nodes of the band, w) of d (n, C, rows, W)."""
        with torch.autocast(d.device.type, enabled=False):
            return self.rows[band.pixels, band.nodes].mT @ d @ self.columns


def upsampling(logits: Tensor, size: tuple[int, ...], align_corners: bool | None) -> Upsampling:
    """From (N, C, h, w) to size (H, W)."""
    assert align_corners is not None
    down, across = (bilinear.axis(n, m, align_corners) for n, m in zip(logits.shape[2:], size, strict=True))
    rows, columns = (bilinear.weights(axis, _real(logits), logits.device) for axis in (down, across))
    return Upsampling(rows, columns, list(_bands(logits, down, size[1])))


def _bands(logits: Tensor, down: bilinear.Axis, width: int) -> Iterator[Band]:
    images, classes, *_ = logits.shape
    if traced():  # its sizes may be symbols
        yield Band(slice(None), slice(None), slice(None))
        return
    most = BAND_ELEMENTS if logits.device.type == "cpu" else DEVICE_BAND_ELEMENTS
    rows = min(down.pixels, max(1, most // (classes * width)))
    together = max(1, most // (classes * width * down.pixels)) if rows == down.pixels else 1
    for image in range(0, images, together):
        for row in range(0, down.pixels, rows):
            end = min(row + rows, down.pixels)
            nodes = slice(max(down.cell_of(row), 0), min(down.cell_of(end - 1), down.nodes - 1) + 2)
            yield Band(slice(image, image + together), slice(row, end), nodes)


def _real(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _relative(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, h, w): log2 of the softmax of each node but for a constant, at most 0; and where it is not defined.

    There (N, 1, h, w) is 1 and the values are 0, so that no NaN gets to a pixel by way of a weight of 0.
    """
    x = logits.to(_real(logits))
    largest = x.amax(1, keepdim=True)
    bad = ~largest.isfinite()
    x = (x - largest).mul_(LOG2E).clamp_min_(LOWEST).masked_fill_(bad, 0.0)
    return x, bad.to(x.dtype)


def softmax_losses(logits: Tensor, target: Tensor, cross_entropy: CrossEntropy) -> PixelLosses:
    """See `types.Backend`; logits (N, C, h, w), target (N, H, W). Saves labels and log2 Σ 2^x."""
    by = upsampling(logits, tuple(target.shape[1:]), cross_entropy.align_corners)
    x, bad = _relative(logits)
    dot = None
    if cross_entropy.label_smoothing:
        v = class_weights(cross_entropy, x)
        dot, total_weight = (x * v[:, None, None]).sum(1, keepdim=True), v.sum()

    losses = torch.empty(target.shape, dtype=x.dtype, device=x.device)
    log_totals = torch.empty_like(losses)
    labels = torch.empty_like(losses, dtype=torch.int16 if x.shape[1] <= 1 << 15 else torch.int32)
    for band in by.bands:
        place = band.images, band.pixels
        label = target[place].long()
        valid = label != cross_entropy.ignore_index
        good = (label >= 0) & (label < x.shape[1])
        label = label.clamp(0, x.shape[1] - 1)
        log_total, x_label = _log_total(by, x, band, label)
        loss = (log_total - x_label).clamp_min_(0.0)
        if cross_entropy.weight is not None:
            loss *= cross_entropy.weight.to(loss.dtype)[label]
        if dot is not None:
            spread = (log_total * total_weight).sub_(by.up(dot, band).squeeze(1)).clamp_min_(0.0)
            smoothing = cross_entropy.label_smoothing
            loss = loss.mul_(1 - smoothing).add_(spread, alpha=smoothing / x.shape[1])
        loss *= LN2
        good &= (by.up(bad, band).squeeze(1) == 0) & (loss >= 0) & (loss < INFINITE)
        losses[place] = torch.where(valid, torch.where(good, loss, torch.nan), IGNORED)
        log_totals[place] = log_total
        labels[place] = label.to(labels.dtype)
    return PixelLosses(losses.flatten(1), (labels, log_totals))


def class_weights(cross_entropy: CrossEntropy, like: Tensor) -> Tensor:
    """(C,): v_c, 1 without weights."""
    if cross_entropy.weight is not None:
        return cross_entropy.weight.to(like.dtype)
    return torch.ones(like.shape[1], dtype=like.dtype, device=like.device)


def _log_total(by: Upsampling, x: Tensor, band: Band, label: Tensor) -> tuple[Tensor, Tensor]:
    """log2 Σ_c 2^x_c and x_label of the pixels of a band, (n, rows, W)."""
    pixels = by.up(x, band)
    x_label = pixels.gather(1, label.unsqueeze(1)).squeeze(1)
    if on_host(x):
        total, limits = pixels.exp2_().sum(1), torch.finfo(x.dtype)
        if float(total.min()) > limits.tiny / limits.eps:
            return total.log2_(), x_label
        # Neighbouring nodes so sure of different classes that between them all exponentials vanish.
        pixels = by.up(x, band)
    largest = pixels.amax(1)
    return (pixels - largest.unsqueeze(1)).exp2_().sum(1).log2_().add_(largest), x_label


def logits_gradient(logits: Tensor, pixels: PixelLosses, weights: Tensor, cross_entropy: CrossEntropy) -> Tensor:
    """See `types.Backend`; logits (N, C, h, w), weights (N, L): w*·grad_output."""
    labels, log_totals = pixels.saved
    by = upsampling(logits, tuple(labels.shape[1:]), cross_entropy.align_corners)
    x, _ = _relative(logits)
    weights = weights.view(labels.shape)
    smoothing = cross_entropy.label_smoothing
    share = class_weights(cross_entropy, x).mul(smoothing / x.shape[1]) if smoothing else None

    grad = torch.zeros_like(x)
    for band in by.bands:
        place = band.images, band.pixels
        label, weight = labels[place].long(), weights[place]
        hit = weight * (1 - smoothing)
        if cross_entropy.weight is not None:
            hit *= cross_entropy.weight.to(x.dtype)[label]
        spread = hit if share is None else hit + weight * share.sum()
        d = by.up(x, band).sub_(log_totals[place].unsqueeze(1)).exp2_().mul_(spread.unsqueeze(1))
        d.scatter_add_(1, label.unsqueeze(1), -hit.unsqueeze(1))
        if share is not None:
            d -= weight.unsqueeze(1) * share[:, None, None]
        grad[band.images, :, band.nodes] += by.down(d, band)
    out = torch.empty_like(logits)
    return out.copy_(grad)
