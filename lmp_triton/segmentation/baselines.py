"""What the loss is compared with, and the loss, behind one interface.

A criterion is a module: criterion(logits, target) is a scalar to minimise. The target is (N, H, W); the logits are
(N, C, h, w), and where they are coarser than the target they are upsampled bilinearly (align_corners=False), fused into
the loss where there is a kernel for that. Ignored pixels take no part. A target without a valid pixel gives 0, never
NaN, and losses are computed in float32 whatever the precision of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

import lmp_triton

__all__ = ["CRITERIA", "Criterion", "build_criterion", "median_frequency_weights"]

Statistics = dict[str, Tensor]


class Criterion(nn.Module):
    """The interface; a subclass has `_loss`.

    Args:
        ignore_index: pixels with this label take no part.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, target: Tensor, return_stats: bool = False) -> Tensor | tuple[Tensor, Statistics]:
        """The loss, or with return_stats (loss, what there is to log: 0-dim tensors without a graph)."""
        loss, statistics = self._loss(logits, target)
        return (loss, statistics) if return_stats else loss

    def _loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Statistics]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The numbers among the options."""
        options = {name: value for name, value in vars(self).items() if isinstance(value, int | float | str)}
        return ", ".join(f"{name}={value}" for name, value in options.items() if name not in ("training",))


class CrossEntropy(Criterion):
    """Uniform cross-entropy: the mean over the valid pixels of the batch; with class weights, of weight·loss.

    Args:
        weight: (C,). The sum is divided by the number of valid pixels, not by the sum of their weights as in
            F.cross_entropy, which would cancel the weight of a crop with a single class.
        ignore_index: see `Criterion`.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, ignore_index: int = 255) -> None:
        super().__init__(ignore_index)
        self.register_buffer("weight", weight)

    def _loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Statistics]:
        if _coarse(logits, target):  # with ratio=1 nothing is pooled: the mean, with the upsampling fused in
            loss = lmp_triton.upsampled_loss_max_pooling(
                logits, target, ratio=1.0, scope="batch", weight=self.weight, ignore_index=self.ignore_index
            )
            assert isinstance(loss, Tensor)
            return loss, {}
        total = F.cross_entropy(
            logits.float(), target, weight=self.weight, ignore_index=self.ignore_index, reduction="sum"
        )
        return total / (target != self.ignore_index).sum().clamp(min=1), {}


class Pooling(Criterion):
    """Loss max-pooling, image by image, with p and ratio as in `lmp_triton.loss_max_pooling`.

    p = 1 is online bootstrapping by top-k: the mean of the share `ratio` of the pixels with the largest losses.
    Logged: `alpha` (the largest of the images, the threshold on the losses) and `saturated`, the share of the valid
    pixels that have the largest weight. `ratio` may be changed between steps, by `lmp_triton.RatioSchedule` for one.
    """

    def __init__(self, p: float = 1.3, ratio: float = 0.25, ignore_index: int = 255) -> None:
        super().__init__(ignore_index)
        lmp_triton.LossMaxPooling(p, ratio)  # complains of a bad value now, not in the first step
        self.p, self.ratio = p, ratio

    def _loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Statistics]:
        pool = lmp_triton.upsampled_loss_max_pooling if _coarse(logits, target) else lmp_triton.loss_max_pooling
        loss, stats = pool(
            logits, target, p=self.p, ratio=self.ratio, ignore_index=self.ignore_index, return_stats=True
        )
        saturated = stats.saturated.sum() / stats.valid.sum().clamp(min=1)
        return loss, {"alpha": stats.alpha.max(), "saturated": saturated}


class Threshold(Criterion):
    """Online bootstrapping by a threshold: the mean over the pixels whose true class has a probability below it.

    Args:
        probability: the threshold, in (0, 1].
        least: at least this share of all pixels is taken, the hardest, in (0, 1].
        ignore_index: see `Criterion`.
    """

    def __init__(self, probability: float = 0.7, least: float = 0.0625, ignore_index: int = 255) -> None:
        super().__init__(ignore_index)
        for name, value in (("probability", probability), ("least", least)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {value}")
        self.probability, self.least = probability, least

    def _loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Statistics]:
        logits = _upsampled(logits, target)
        losses = F.cross_entropy(logits, target, ignore_index=self.ignore_index, reduction="none").flatten()
        valid = (target != self.ignore_index).flatten()
        ranked = losses.detach().masked_fill(~valid, -1.0)
        least = ranked.topk(max(1, int(self.least * ranked.numel())), sorted=True).values[-1]
        threshold = -torch.tensor(self.probability, device=losses.device).log()
        kept = valid & (ranked >= torch.minimum(least, threshold))
        number = kept.sum()
        loss = torch.where(kept, losses, 0.0).sum() / number.clamp(min=1)
        return loss, {"kept": number / valid.sum().clamp(min=1)}


class Library(Criterion):
    """A loss of segmentation_models_pytorch; one host sync a call, for whether there is a valid pixel at all.

    Args:
        loss: of (logits, target).
        ignore_index: see `Criterion`.
    """

    def __init__(self, loss: nn.Module, ignore_index: int = 255) -> None:
        super().__init__(ignore_index)
        self.loss = loss

    def _loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Statistics]:
        if not bool((target != self.ignore_index).any()):
            return logits.float().sum() * 0.0, {}
        return self.loss(_upsampled(logits, target), target), {}


def median_frequency_weights(counts: ArrayLike) -> Tensor:
    """Inverse median frequency (Eigen and Fergus, the paper's [12]): float32 (classes,).

    The frequency of a class is its share of the labelled pixels of those images that hold it; its weight is the median
    of the frequencies divided by its own. A class that no image holds has weight 1.

    Args:
        counts: (images, classes), `sampling.ClassIndex.counts`.
    """
    pixels = torch.as_tensor(counts).double()
    held = pixels > 0
    frequency = pixels.sum(dim=0) / (held * pixels.sum(dim=1, keepdim=True)).sum(dim=0)
    weights = frequency.nanmedian() / frequency
    return weights.where(held.any(dim=0), 1.0).float()


def _median_frequency(counts: ArrayLike | None = None, ignore_index: int = 255) -> Criterion:
    if counts is None:
        raise ValueError("inverse-median-frequency needs counts=ClassIndex.counts, (images, classes)")
    return CrossEntropy(median_frequency_weights(counts), ignore_index)


def _top_k(ratio: float = 0.25, ignore_index: int = 255) -> Criterion:
    return Pooling(1.0, ratio, ignore_index)


def _focal(gamma: float = 2.0, ignore_index: int = 255) -> Criterion:
    from segmentation_models_pytorch.losses import FocalLoss

    if gamma != 0 and gamma < 1:
        raise ValueError(f"gamma must be 0 or at least 1, got {gamma}: between, the gradient of a sure pixel is NaN")
    return Library(FocalLoss("multiclass", gamma=gamma, ignore_index=ignore_index), ignore_index)


def _lovasz(per_image: bool = False, ignore_index: int = 255) -> Criterion:
    from segmentation_models_pytorch.losses import LovaszLoss

    return Library(LovaszLoss("multiclass", per_image=per_image, ignore_index=ignore_index), ignore_index)


def _dice(smooth: float = 0.0, ignore_index: int = 255) -> Criterion:
    from segmentation_models_pytorch.losses import DiceLoss

    return Library(DiceLoss("multiclass", smooth=smooth, ignore_index=ignore_index), ignore_index)


CRITERIA: dict[str, Callable[..., Criterion]] = {
    "pooling": Pooling,
    "cross-entropy": CrossEntropy,
    "inverse-median-frequency": _median_frequency,
    "top-k": _top_k,
    "threshold": Threshold,
    "focal": _focal,
    "lovasz": _lovasz,
    "dice": _dice,
}


def build_criterion(name: str, *, ignore_index: int = 255, **options: Any) -> Criterion:
    """A criterion by its name.

    Args:
        name: "pooling" (p, ratio), "cross-entropy" (weight), "inverse-median-frequency" (counts), "top-k" (ratio),
            "threshold" (probability, least), or of segmentation_models_pytorch: "focal" (gamma; each class against the
            others), "lovasz" (per_image), "dice" (smooth).
        ignore_index: pixels with this label take no part.
        options: those in parentheses.

    Raises:
        ValueError: no such name, or an option out of range.
    """
    if name not in CRITERIA:
        raise ValueError(f"name must be one of {tuple(CRITERIA)}, got {name!r}")
    return CRITERIA[name](ignore_index=ignore_index, **options)


def _coarse(logits: Tensor, target: Tensor) -> bool:
    return logits.shape[-2:] != target.shape[-2:]


def _upsampled(logits: Tensor, target: Tensor) -> Tensor:
    """Logits in float32 at the resolution of the target."""
    if _coarse(logits, target):
        return F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
    return logits.float()
