"""The loss on a model of segmentation_models_pytorch: `python -m lmp_triton.examples.segmentation_models`."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch

import lmp_triton


def main(steps: int = 10) -> list[float]:
    """Train on made-up images; returns the loss of every step."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    target = images.argmax(1)  # the brightest channel
    target[:, :4] = 255

    model = smp.Unet("resnet18", encoder_weights=None, classes=3)
    criterion = lmp_triton.LossMaxPooling(ignore_index=255)  # in place of smp.losses.SoftCrossEntropyLoss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    history = []
    for step in range(steps):
        loss = criterion(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        print(f"step {step}: loss {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    main()
