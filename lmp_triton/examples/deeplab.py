"""The loss on torchvision's DeepLabV3, without its large logits: `python -m lmp_triton.examples.deeplab`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models import segmentation

import lmp_triton


def coarse_logits(model: Any, images: Tensor) -> Tensor:
    """What the classifier of a torchvision model makes; `model(images)["out"]` is that, upsampled."""
    logits = model.classifier(model.backbone(images)["out"])
    assert isinstance(logits, Tensor)
    return logits


def main(steps: int = 10) -> list[float]:
    """Train on made-up images; returns the loss of every step."""
    torch.manual_seed(0)
    patches = torch.randn(4, 3, 4, 4)
    images = patches.repeat_interleave(16, 2).repeat_interleave(16, 3)
    target = images.argmax(1)  # the brightest channel
    target[:, :4] = 255

    model = segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    criterion = lmp_triton.UpsampledLossMaxPooling(ignore_index=255)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    history = []
    for step in range(steps):
        loss = criterion(coarse_logits(model, images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        print(f"step {step}: loss {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    main()
