"""Train a network with one loss, and measure it on the held-out blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex

from .scene import BLOCK, CLASSES, CROP, IGNORE_INDEX, Scene, cut

__all__ = ["draw_crops", "evaluate", "train"]

BATCH = 8
LEARNING_RATE = 0.02  # the peak of the schedule; over three seeds better than 0.01, more so for cross-entropy


def draw_crops(corners: NDArray[np.int64], steps: int, seed: int) -> NDArray[np.int64]:
    """Draw the crops of a whole run from the allowed ones: int64 (steps, BATCH, 2)."""
    return np.random.default_rng(seed).choice(corners, size=(steps, BATCH))


def train(
    network: nn.Module,
    criterion: nn.Module,
    scene: Scene,
    crops: NDArray[np.int64],
    device: torch.device,
    on_step: Callable[[], object],
) -> None:
    """Train the network in place: one step for each batch of crops, int64 (steps, BATCH, 2).

    AdamW on purpose: its steps do not change with the scale of the gradient, which differs between the losses, so
    one learning rate is fair to both.
    """
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=len(crops))
    for corners in crops:
        inputs, labels = cut(scene, corners, CROP)
        loss = criterion(network(inputs.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step()


@torch.inference_mode()
def evaluate(network: nn.Module, scene: Scene, corners: NDArray[np.int64], device: torch.device) -> Tensor:
    """Intersection over union of every class over all the blocks at `corners`: float32 (classes,) on the CPU.

    From one confusion matrix over all pixels; NaN for a class that no pixel of these blocks is labelled with.
    """
    network.eval()
    metric = MulticlassJaccardIndex(len(CLASSES), average="none", ignore_index=IGNORE_INDEX).to(device)
    for batch in np.array_split(corners, math.ceil(len(corners) / BATCH)):
        inputs, labels = cut(scene, batch, BLOCK)
        metric.update(network(inputs.to(device)).argmax(dim=1), labels.to(device))
    labelled = metric.confmat.sum(dim=1) > 0
    return metric.compute().where(labelled, math.nan).cpu()
