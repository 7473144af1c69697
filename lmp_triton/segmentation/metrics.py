"""Intersection over union, from one confusion matrix over all pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

__all__ = ["IoU"]


class IoU(MulticlassConfusionMatrix):
    """IoU of every class and their mean, over all updates and, in `compute`, all ranks.

        metric = IoU(19)
        metric.update(logits, target)          # for each batch
        metric.compute()["mean"]

    What torchmetrics promises of a Metric holds: `reset`, `to`, sums over the ranks of torch.distributed in `compute`,
    a checkpoint after `persistent(True)`.

    Args:
        classes: how many.
        ignore_index: pixels with this label take no part.
        decay: the counts are multiplied by it before each update, 1 (never forget) or less: what lies k updates back
            counts decay^k, so that about the last 1/(1 − decay) updates speak. In (0, 1].
        options: of `torchmetrics.Metric`. validate_args=True checks the labels, at the price of a host sync.
    """

    confmat: Tensor

    def __init__(self, classes: int, ignore_index: int | None = 255, *, decay: float = 1.0, **options: Any) -> None:
        super().__init__(classes, ignore_index=ignore_index, **{"validate_args": False, **options})
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        self.decay = decay
        if decay < 1:
            self.add_state("confmat", torch.zeros(classes, classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch: predictions (N, *spatial), integers, or logits (N, C, *spatial), and target (N, *spatial)."""
        if self.decay < 1:
            self.confmat = self.confmat * self.decay
        super().update(preds, target)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]  # the matrix itself is in `confmat`
        """Return {"per_class": float64 (C,), "mean": float64 ()}.

        As in the benchmarks' own scripts: NaN for a class that is neither in the target nor predicted, which the mean
        leaves out; 0 for one that is only predicted. The mean is NaN before the first valid pixel.
        """
        counts = self.confmat.double()
        hits = counts.diagonal()
        per_class = hits / (counts.sum(dim=0) + counts.sum(dim=1) - hits)
        return {"per_class": per_class, "mean": per_class.nanmean()}
