"""The losses as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import checks
from .api import loss_max_pooling, upsampled_loss_max_pooling
from .types import CrossEntropy, Pool, PoolingStats


class _Group:
    """Holds a process group, which belongs to the process: copies of a module share it, and nothing takes it along."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Group:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a LossMaxPooling with a process group can't be pickled: save the state_dict, or set its group to None"
        )


class LossMaxPooling(nn.Module):
    """Loss max-pooling over softmax cross-entropy; the arguments of `lmp_triton.loss_max_pooling`, fixed once.

    `weight` is a buffer, as in `torch.nn.CrossEntropyLoss`: it moves with the module and is in its state_dict. A
    negative class weight is refused here, where looking at a GPU costs nothing yet.

    `p` and `ratio` are plain attributes and may be changed between calls, a float for a float or a tensor. A tensor is
    kept as it is, not copied: fill it in place to change the value under torch.compile or in a CUDA graph (see
    `RatioSchedule`). It moves with the module from device to device, but keeps its type where `half()` or
    `to(torch.bfloat16)` would round it, and is an option, not a state: not in the state_dict.
    On the meta device, where `from_pretrained` for one builds models, a tensor loses its value; `to_empty` makes it
    NaN, which the next call refuses. There give a float, or `torch.tensor(0.25, device="cpu")`, or set it afterwards.

    A copy of a module with a `group` has the same group. Such a module can't be pickled; its state_dict can.
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
        checks.pool(Pool(checks.plain(p), checks.plain(ratio), scope, reduction, solver, group), None)
        here = weight
        if isinstance(weight, Tensor):
            weight = weight.detach()
            here = weight if weight.is_meta else weight.cpu()
        checks.cross_entropy(CrossEntropy(here, checks.plain(ignore_index), checks.plain(label_smoothing)))
        self.register_buffer("weight", weight)
        self.p = p
        self.ratio = ratio
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.scope = scope
        self.reduction = reduction
        self._group = None if group is None else _Group(group)
        self.backend = backend
        self.solver = solver
        self.return_stats = return_stats
        self.check_targets = check_targets

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossMaxPooling:
        """What `to`, `cuda`, `half` … go through: p and ratio follow to the device, but not to the type."""
        super()._apply(fn, recurse)
        for name in ("p", "ratio"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                continue
            if value.is_meta:  # it lost its value: what replaces it must not pass for one
                device = fn(torch.zeros((), device="cpu")).device
                setattr(self, name, torch.full_like(value, torch.nan, device=device))
            else:
                setattr(self, name, value.to(fn(value).device))
        return self

    @property
    def group(self) -> Any:
        """The process group whose ranks are pooled together, or None."""
        return None if self._group is None else self._group.group

    @group.setter
    def group(self, group: Any) -> None:
        self._group = None if group is None else _Group(group)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, PoolingStats]:
        """The loss of logits (N, C, *spatial) and target (N, *spatial)."""
        return loss_max_pooling(logits, target, **self.options())

    def options(self) -> dict[str, Any]:
        """The keywords of `lmp_triton.loss_max_pooling`, as they are now."""
        return {
            "p": self.p,
            "ratio": self.ratio,
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "scope": self.scope,
            "reduction": self.reduction,
            "group": self.group,
            "backend": self.backend,
            "solver": self.solver,
            "return_stats": self.return_stats,
            "check_targets": self.check_targets,
        }

    def extra_repr(self) -> str:
        """The options, in the order of the constructor."""
        p, ratio = ("tensor" if isinstance(x, Tensor) and x.is_meta else f"{float(x):g}" for x in (self.p, self.ratio))
        weight = None if self.weight is None else f"tensor{tuple(self.weight.shape)}"
        return (
            f"p={p}, ratio={ratio}, weight={weight}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing:g}, scope={self.scope!r}, reduction={self.reduction!r}, "
            f"backend={self.backend!r}, solver={self.solver!r}"
        )


class UpsampledLossMaxPooling(LossMaxPooling):
    """`lmp_triton.upsampled_loss_max_pooling` as a module: `LossMaxPooling`, and `align_corners`."""

    def __init__(
        self,
        p: float | Tensor = 1.3,
        ratio: float | Tensor = 0.25,
        *,
        align_corners: bool = False,
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
        super().__init__(
            p,
            ratio,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            scope=scope,
            reduction=reduction,
            group=group,
            backend=backend,
            solver=solver,
            return_stats=return_stats,
            check_targets=check_targets,
        )
        checks.align_corners(align_corners)
        self.align_corners = align_corners

    def forward(self, logits: Tensor, target: Tensor) -> Tensor | tuple[Tensor, PoolingStats]:
        """The loss of logits (N, C, h, w) and target (N, H, W)."""
        return upsampled_loss_max_pooling(logits, target, align_corners=self.align_corners, **self.options())

    def extra_repr(self) -> str:
        """As of `LossMaxPooling`."""
        return f"{super().extra_repr()}, align_corners={self.align_corners}"
