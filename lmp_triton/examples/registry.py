"""The loss in a framework built from a registry and configurations, as mmsegmentation is.

With mmsegmentation itself the registry is `mmseg.registry.MODELS`, and three lines in a file that the configuration
names under `custom_imports` do it:

    from mmseg.registry import MODELS
    from lmp_triton.integrations.dropins import DecodeHeadLoss
    MODELS.register_module(name="LossMaxPooling", module=DecodeHeadLoss)

`python -m lmp_triton.examples.registry` does the same with a registry of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmp_triton.integrations.dropins import DecodeHeadLoss, MaxPoolingPixelSampler


class Registry:
    """Names to classes, and configurations to objects: what such a framework brings."""

    def __init__(self) -> None:
        self.modules: dict[str, type] = {}

    def register_module(self, name: str, module: type) -> None:
        """Make a class known."""
        self.modules[name] = module

    def build(self, config: dict[str, Any], **default: Any) -> Any:
        """An object of the class named under "type"."""
        arguments = {**default, **config}
        return self.modules[arguments.pop("type")](**arguments)


class DecodeHead(nn.Module):
    """A head that builds its losses and its sampler from configurations, and adds up what they give."""

    def __init__(
        self,
        registry: Registry,
        channels: int,
        num_classes: int,
        loss_decode: list[dict[str, Any]],
        sampler: dict[str, Any] | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.loss_decode = nn.ModuleList(registry.build(config) for config in loss_decode)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.sampler = None if sampler is None else registry.build(sampler, context=self)

    def loss(self, features: Tensor, seg_label: Tensor) -> dict[str, Tensor]:
        """Each loss under its name; features (N, channels, h, w), seg_label (N, 1, H, W), for losses that upsample."""
        seg_logit = self.conv_seg(features)
        seg_weight = None if self.sampler is None else self.sampler.sample(seg_logit, seg_label)
        losses: dict[str, Tensor] = {}
        for module in self.loss_decode:
            loss = module(seg_logit, seg_label.squeeze(1), weight=seg_weight, ignore_index=self.ignore_index)
            name = str(module.loss_name)
            losses[name] = losses[name] + loss if name in losses else loss
        return losses


def registry() -> Registry:
    """One that knows loss max-pooling."""
    out = Registry()
    out.register_module(name="LossMaxPooling", module=DecodeHeadLoss)
    out.register_module(name="MaxPoolingPixelSampler", module=MaxPoolingPixelSampler)
    return out


def main(steps: int = 10) -> list[float]:
    """Train a head on made-up features; returns the loss of every step."""
    torch.manual_seed(0)
    features = torch.randn(2, 3, 8, 8)
    seg_label = F.interpolate(features, (32, 32), mode="bilinear").argmax(1, keepdim=True)
    seg_label[:, :, :4] = 255
    # With align_corners the loss takes the logits as they are, and upsamples them on the way; without, at full size.
    loss_decode = [{"type": "LossMaxPooling", "p": 1.3, "ratio": 0.25, "loss_weight": 1.0, "align_corners": False}]
    head = DecodeHead(registry(), 3, 3, loss_decode)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    history = []
    for step in range(steps):
        losses = head.loss(features, seg_label)
        total = torch.stack([value for key, value in losses.items() if key.startswith("loss_")]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        history.append(total.item())
        print(f"step {step}: " + ", ".join(f"{key} {value.item():.4f}" for key, value in losses.items()))
    return history


if __name__ == "__main__":
    main()
