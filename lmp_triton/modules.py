"""The loss as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .api import loss_max_pooling
from .types import PoolingStats


class LossMaxPooling(nn.Module):
    """Loss max-pooling over softmax cross-entropy; the arguments of `lmp_triton.loss_max_pooling`, fixed once.

    `p` and `ratio` are plain attributes and may be changed between calls. `weight` is a buffer: it moves with the
    module and is in its state_dict. A negative class weight is refused here, where looking at a GPU costs nothing yet.
    """

    weight: Tensor | None

    def __init__(
        self,
        p: float | Tensor = 1.3,
        ratio: float | Tensor = 0.25,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        scope: str = "image",
        reduction: str = "mean",
        group: Any = None,
        backend: str = "auto",
        solver: str = "auto",
        return_stats: bool = False,
        check_targets: bool = False,
    ) -> None:
        super().__init__()
        checks.options(p, ratio, scope, reduction, group, None)
        checks.cross_entropy_options(weight if weight is None else weight.detach().cpu(), ignore_index, label_smoothing)
        self.register_buffer("weight", weight if weight is None else torch.as_tensor(weight).detach())
        self.p = p
        self.ratio = ratio
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.scope = scope
        self.reduction = reduction
        self.group = group
        self.backend = backend
        self.solver = solver
        self.return_stats = return_stats
        self.check_targets = check_targets

    def forward(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, PoolingStats]:
        """The loss of logits (N, C, *spatial) and target (N, *spatial)."""
        return loss_max_pooling(
            logits,
            target,
            p=self.p,
            ratio=self.ratio,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            scope=self.scope,
            reduction=self.reduction,
            group=self.group,
            backend=self.backend,
            solver=self.solver,
            return_stats=self.return_stats,
            check_targets=self.check_targets,
        )

    def extra_repr(self) -> str:
        """The options, in the order of the constructor."""
        weight = None if self.weight is None else f"tensor{tuple(self.weight.shape)}"
        return (
            f"p={float(self.p):g}, ratio={float(self.ratio):g}, weight={weight}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing:g}, scope={self.scope!r}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}, solver={self.solver!r}"
        )
