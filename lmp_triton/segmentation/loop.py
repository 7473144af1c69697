"""Training and measuring in plain PyTorch: what the demo and the experiments on digits need, and no more.

For real training take `lmp-triton train` (PyTorch Lightning): devices, precision, checkpoints, resume, logging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR
from torchmetrics.classification import MulticlassJaccardIndex

__all__ = ["MOMENTUM", "POWER", "fit", "iou", "poly_sgd"]

MOMENTUM = 0.9
"""Section 5.1 of the paper: "setting both, decay rate and momentum to 0.9"."""
POWER = 0.9


def poly_sgd(
    parameters: Iterable[nn.Parameter],
    steps: int,
    lr: float,
    *,
    momentum: float = MOMENTUM,
    power: float = POWER,
    weight_decay: float = 5e-4,
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """The paper's solver (section 5.1): SGD with momentum; after k of `steps` steps lr·(1 − k/steps)^power.

    `weight_decay` is DeepLabV2's, whose network the paper fine-tunes; the paper names none.
    """
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    return optimizer, PolynomialLR(optimizer, total_iters=steps, power=power)


def fit(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    device: torch.device | str = "cpu",
    on_step: Callable[[], object] | None = None,
    observe: Callable[[Tensor, Tensor], object] | None = None,
) -> None:
    """Train the model in place, a step for each batch (images, labels).

    Args:
        model: gives logits.
        criterion: of logits and labels.
        batches: on the CPU or already on the device.
        optimizer: of the model's parameters.
        schedule: stepped after each batch.
        device: where the model is.
        on_step: called after each step.
        observe: called after each step with the predicted classes and the labels, for a sampler that follows them.
    """
    model.train()
    for images, labels in batches:
        labels = labels.to(device)
        logits = model(images.to(device))
        loss = criterion(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step()
        if observe is not None:
            observe(logits.detach().argmax(dim=1), labels)


@torch.inference_mode()
def iou(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    ignore_index: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Intersection over union of every class over all batches: float32 (classes,) on the CPU.

    From one confusion matrix over all pixels; NaN for a class that no pixel is labelled with.
    """
    model.eval()
    metric = MulticlassJaccardIndex(classes, average="none", ignore_index=ignore_index).to(device)
    for images, labels in batches:
        metric.update(model(images.to(device)).argmax(dim=1), labels.to(device))
    labelled = metric.confmat.sum(dim=1) > 0
    return metric.compute().where(labelled, math.nan).cpu()
