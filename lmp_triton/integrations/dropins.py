"""The pooling behind interfaces that existing code already speaks, so that one line of it changes.

    MaxPoolingLoss            mpl.pytorch's loss on pixel losses
    MaxPoolingPixelSampler    a pixel sampler of mmsegmentation, beside OHEMPixelSampler; OpenVINO's of this name
    DecodeHeadLoss            a loss of an mmsegmentation decode head, to be registered under any name

None of these packages is imported. For a module with code of its own there is `lmp_triton.obstacle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..api import loss_max_pooling, optimal_weights, pool_losses, upsampled_loss_max_pooling
from ..types import CrossEntropy, Pool


class MaxPoolingLoss(nn.Module):
    """Max-pool pixel losses, with the signature of mpl.pytorch's class of this name.

        criterion = MaxPoolingLoss(ratio=0.3, p=1.7, reduce=True)
        loss = criterion(F.cross_entropy(logits, target, reduction="none"))

    What differs: losses stay on their device; zero losses are counted like any other (there they are left out of n, and
    with them m and τ change); no weight exceeds τ; a loss may have any shape and strides, and need not be contiguous.

    Args:
        ratio: m/n, in (0, 1]. Default 0.3, as there.
        p: in [1, ∞]. Default 1.7, as there.
        reduce: True: the pooled loss, a scalar; False: w*·loss, elementwise, w* a constant: its sum is the pooled loss.
        scope: "batch": all values are one segment, as there; "image": each loss[i] is, and the result is the mean over
            these with reduce, and without it each sums up to its own pooled loss.
        group, backend: as in `lmp_triton.pool_losses`.
    """

    def __init__(
        self,
        ratio: float = 0.3,
        p: float = 1.7,
        reduce: bool = True,
        *,
        scope: str = "batch",
        group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        checks.pool(Pool(p, ratio, scope, group=group), None)
        self.ratio = ratio
        self.p = p
        self.reduce = reduce
        self.scope = scope
        self.group = group
        self.backend = backend

    def forward(self, loss: Tensor, mask: Tensor | None = None) -> Tensor:
        """The pooled loss, or w*·loss in the shape of loss; mask: bool, True where valid, by default everywhere.

        mpl.pytorch has no mask: a pixel that is to be ignored must not be passed to it with a loss of 0, as
        `F.cross_entropy(ignore_index=...)` gives it, or it counts in n.
        """
        options: dict[str, Any] = {
            "p": self.p,
            "ratio": self.ratio,
            "scope": self.scope,
            "group": self.group,
            "backend": self.backend,
        }
        if self.reduce:
            pooled = pool_losses(loss, mask, **options)
            assert isinstance(pooled, Tensor)  # without return_stats
            return pooled
        weights, _ = optimal_weights(loss, mask, **options)
        # Not 0·loss: where the mask is False the loss may be infinite or NaN.
        return weights * loss if mask is None else weights * loss.masked_fill(~mask, 0.0)

    def extra_repr(self) -> str:
        """The options, in the order of the constructor."""
        return f"ratio={self.ratio:g}, p={self.p:g}, reduce={self.reduce}, scope={self.scope!r}"


class MaxPoolingPixelSampler:
    """Pixel weights for a loss that is then averaged: a pixel sampler in the sense of mmsegmentation.

        decode_head = dict(..., sampler=dict(type="MaxPoolingPixelSampler", ratio=0.25, p=1.7))

    The weights are n·w*, n the number of pixels that the loss is averaged over, so that mean(weight·loss) is the pooled
    loss. To have it by name: `PIXEL_SAMPLERS.register_module(module=MaxPoolingPixelSampler)`, in newer versions the
    registry TASK_UTILS.

    Args:
        context: the decode head; its `ignore_index` and `loss_decode` are used. None: `sample` needs losses, or takes
            the cross-entropy of the logits.
        ratio: m/n, in (0, 1]. Default 0.3.
        p: in [1, ∞]. Default 1.7.
        ignore_index: of the labels, where there is no context.
        avg_non_ignore: as in the loss that gets the weights: False: its mean is over all pixels, mmsegmentation's
            default; True: over those not ignored.
        scope: "batch": all pixels of the batch together; "image": each image on its own.
        backend: as in `lmp_triton.optimal_weights`.
    """

    def __init__(
        self,
        context: Any = None,
        ratio: float = 0.3,
        p: float = 1.7,
        *,
        ignore_index: int = 255,
        avg_non_ignore: bool = False,
        scope: str = "batch",
        backend: str = "auto",
    ) -> None:
        checks.pool(Pool(p, ratio, scope), None)
        self.context = context
        self.ratio = ratio
        self.p = p
        self.ignore_index = getattr(context, "ignore_index", ignore_index)
        self.avg_non_ignore = avg_non_ignore
        self.scope = scope
        self.backend = backend

    @torch.no_grad()
    def sample(
        self,
        seg_logit: Tensor | None = None,
        seg_label: Tensor | None = None,
        losses: Tensor | None = None,
        valid_mask: Tensor | None = None,
    ) -> Tensor:
        """Weights (N, *spatial), float32 (float64 for float64), 0 on ignored pixels.

        Args:
            seg_logit: (N, C, *spatial).
            seg_label: (N, 1, *spatial) or (N, *spatial), class indices.
            losses: (N, *spatial), in place of the logits.
            valid_mask: bool, the shape of the losses; by default seg_label != ignore_index.

        Raises:
            ValueError: neither losses, nor logits and labels; or neither a mask nor labels.
        """
        if losses is None:
            if seg_logit is None or seg_label is None:
                raise ValueError("sample needs losses, or seg_logit and seg_label")
            seg_label = _without_channel(seg_label, seg_logit.ndim - 1)
            losses = self._losses(seg_logit, seg_label.long())
        elif seg_label is not None:
            seg_label = _without_channel(seg_label, losses.ndim)
        if valid_mask is None:
            if seg_label is None:
                raise ValueError("sample needs valid_mask or seg_label: without them ignored pixels would count")
            valid_mask = seg_label != self.ignore_index
        weights, stats = optimal_weights(
            losses, valid_mask, p=self.p, ratio=self.ratio, scope=self.scope, backend=self.backend
        )
        averaged = stats.valid.sum() if self.avg_non_ignore else losses.numel()
        return weights * (averaged / (stats.valid > 0).sum().clamp_min(1)).to(weights.dtype)

    def _losses(self, seg_logit: Tensor, seg_label: Tensor) -> Tensor:
        """The pixel losses of the decode head, summed, as OHEMPixelSampler takes them; without one cross-entropy."""
        modules = getattr(self.context, "loss_decode", None)
        if modules is None:
            return F.cross_entropy(seg_logit, seg_label, ignore_index=self.ignore_index, reduction="none")
        modules = modules if isinstance(modules, nn.ModuleList) else [modules]
        options = {"weight": None, "ignore_index": self.ignore_index, "reduction_override": "none"}
        parts: list[Tensor] = [module(seg_logit, seg_label, **options) for module in modules]
        return torch.stack(parts).sum(0)


def _without_channel(seg_label: Tensor, ndim: int) -> Tensor:
    return seg_label.squeeze(1) if seg_label.ndim > ndim else seg_label


class DecodeHeadLoss(nn.Module):
    """Loss max-pooling as a loss of an mmsegmentation decode head: its arguments, its call, its `loss_name`.

        MODELS.register_module(name="LossMaxPooling", module=DecodeHeadLoss)     # mmseg.registry.MODELS
        decode_head = dict(..., loss_decode=dict(type="LossMaxPooling", p=1.3, ratio=0.25, loss_weight=1.0))

    Args:
        p, ratio, scope, backend: as in `lmp_triton.loss_max_pooling`.
        reduction: "mean" or "sum" over segments, or "none": the pixel losses, not pooled, as pixel samplers ask for.
        class_weight: one number a class.
        loss_weight: a factor of the result.
        loss_name: the key in the log; to be part of the total loss it must start with "loss_".
        align_corners: None: cls_score has the size of the label, as mmsegmentation's heads make it. A bool: it is
            smaller, as the head's layers leave it, and upsampled on the way by `lmp_triton.upsampled_loss_max_pooling`;
            for a head whose `loss_by_feat` leaves the resizing out:

                def loss_by_feat(self, seg_logits, batch_data_samples):
                    label = self._stack_batch_gt(batch_data_samples).squeeze(1)
                    loss = self.loss_decode
                    return {loss.loss_name: loss(seg_logits, label, ignore_index=self.ignore_index)}
    """

    class_weight: Tensor | None

    def __init__(
        self,
        p: float = 1.3,
        ratio: float = 0.25,
        reduction: str = "mean",
        class_weight: Sequence[float] | None = None,
        loss_weight: float = 1.0,
        loss_name: str = "loss_lmp",
        scope: str = "image",
        backend: str = "auto",
        align_corners: bool | None = None,
    ) -> None:
        super().__init__()
        if align_corners is not None:
            checks.align_corners(align_corners)
        self.align_corners = align_corners
        checks.pool(Pool(p, ratio, scope, reduction), None)
        weight = None if class_weight is None else torch.as_tensor(class_weight, dtype=torch.float32)
        checks.cross_entropy(CrossEntropy(weight))
        self.register_buffer("class_weight", weight, persistent=False)  # a checkpoint of mmsegmentation has no such key
        self.p = p
        self.ratio = ratio
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.scope = scope
        self.backend = backend
        self._loss_name = loss_name

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int = -100,
        **unused: Any,
    ) -> Tensor:
        """The loss of cls_score (N, C, *spatial) and label (N, *spatial).

        Args:
            weight: (N, *spatial), a factor of every pixel loss, not negative, or None.
            avg_factor: None: a pooled loss has nothing to be averaged over.
            reduction_override: in place of `reduction`, or None.
            ignore_index: of the labels.

        Raises:
            ValueError: an avg_factor, or an unknown reduction.
        """
        if avg_factor is not None:
            raise ValueError(f"avg_factor must be None, got {avg_factor}: the weights are normalised by the pooling")
        reduction = reduction_override or self.reduction
        options: dict[str, Any] = {
            "p": self.p,
            "ratio": self.ratio,
            "scope": self.scope,
            "backend": self.backend,
            "reduction": reduction,
        }
        pooled = weight is None and reduction != "none"
        if pooled:
            options |= {"weight": self.class_weight, "ignore_index": ignore_index}
        if pooled and self.align_corners is not None:
            loss = upsampled_loss_max_pooling(cls_score, label, align_corners=self.align_corners, **options)
        elif pooled:
            loss = loss_max_pooling(cls_score, label, **options)
        else:
            if self.align_corners is not None:
                cls_score = F.interpolate(cls_score, label.shape[1:], None, "bilinear", self.align_corners)
            losses = F.cross_entropy(
                cls_score.to(torch.promote_types(cls_score.dtype, torch.float32)),
                label.long(),
                self.class_weight,
                ignore_index=ignore_index,
                reduction="none",
            )
            losses = losses if weight is None else losses * weight
            loss = losses if reduction == "none" else pool_losses(losses, label != ignore_index, **options)
        assert isinstance(loss, Tensor)  # without return_stats
        return self.loss_weight * loss

    @property
    def loss_name(self) -> str:
        """The key of this loss in the log."""
        return self._loss_name
