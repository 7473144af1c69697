"""The demo itself: train with both losses from the same start on the same crops, print a table, draw a picture."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from lmp_triton import LossMaxPooling, dispatch, optimal_weights
from lmp_triton.segmentation.unet import UNet

from .picture import View, draw
from .scene import (
    BLOCK,
    CHANNELS,
    CLASSES,
    CROP,
    IGNORE_INDEX,
    Scene,
    class_shares,
    cut,
    held_out_corners,
    training_corners,
)
from .training import draw_crops, evaluate, train

__all__ = ["compare"]

PROGRESS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
SHOWN = (150, 4200)
"""The held-out block of the picture, around Lake Baikal: many classes, the rarest (deciduous needleleaf) among them."""


def compare(scene: Scene, pooling: LossMaxPooling, *, steps: int, seeds: Sequence[int], output: Path) -> None:
    """Train with each seed and each loss, print the IoU on the held-out blocks, save a picture of the first seed."""
    console = Console()
    output.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = f"p = {pooling.p}, ratio = {pooling.ratio}"
    console.print(f"Loss max-pooling with {setting} by the [bold]{backend_name(device)}[/] backend on {device}.")

    criteria = {"cross-entropy": nn.CrossEntropyLoss(ignore_index=IGNORE_INDEX), "loss max-pooling": pooling}
    allowed, blocks = training_corners(scene), held_out_corners(scene)
    networks: dict[str, nn.Module] = {}
    runs: dict[str, list[Tensor]] = {name: [] for name in criteria}
    with Progress(*PROGRESS, console=console) as progress:
        for seed in seeds:
            torch.manual_seed(seed)
            start = UNet(CHANNELS, len(CLASSES))
            crops = draw_crops(allowed, steps, seed)
            for name, criterion in criteria.items():
                # With the channels last, the convolutions take half the time on a CPU.
                network = copy.deepcopy(start).to(device).to(memory_format=torch.channels_last)
                bar = progress.add_task(f"{name}, seed {seed}", total=steps)
                train(network, criterion, scene, crops, device, on_step=partial(progress.advance, bar))
                runs[name].append(evaluate(network, scene, blocks, device))
                networks.setdefault(name, network)

    ious = {name: torch.stack(values).double().numpy() for name, values in runs.items()}
    console.print(_table(class_shares(scene), ious))
    console.print(_caution(len(seeds)))
    caption = (
        f"A small U-Net, {steps} steps with each loss from the same start on the same crops; {setting}, seed {seeds[0]}"
    )
    draw(output, scene, _view(networks, scene, pooling, device), {name: iou[0] for name, iou in ious.items()}, caption)
    console.print(f"Picture: [bold]{output.resolve()}[/]", soft_wrap=True)


def backend_name(device: torch.device) -> str:
    """The backend that serves loss max-pooling on batches like those of the training."""
    return dispatch.choose(torch.empty(1, len(CLASSES), CROP * CROP, device=device))


def _table(shares: NDArray[np.float64], ious: dict[str, NDArray[np.float64]]) -> Table:
    """IoU in percent, the commonest class first: `ious` holds (seeds, classes) for each loss."""
    table = Table(title="Held-out blocks: intersection over union, %", title_justify="left")
    table.add_column("class")
    table.add_column("pixels, %", justify="right")
    for name in ious:
        table.add_column(name, justify="right")
    for c in np.argsort(-shares):
        table.add_row(CLASSES[c], f"{100 * shares[c]:.2f}", *(percent(iou[:, c]) for iou in ious.values()))
    table.add_section()
    table.add_row("mean", "", *(percent(np.nanmean(iou, axis=1)) for iou in ious.values()), style="bold")
    return table


def percent(values: NDArray[np.float64]) -> str:
    """One value of each seed as "12.3", "12.3 ± 0.4" for several (sample standard deviation), "–" for no value."""
    if np.isnan(values).any():
        return "–"
    mean = f"{100 * values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * values.std(ddof=1):.1f}"


def _caution(seeds: int) -> str:
    if seeds == 1:
        return "One run with one seed shows nothing about which loss is better; --seeds 3 shows how much seeds differ."
    return (
        f"Mean ± standard deviation over {seeds} seeds, each with its own start and crops, on one split of one scene: "
        "a difference within the spread shows nothing about which loss is better."
    )


@torch.inference_mode()
def _view(networks: dict[str, nn.Module], scene: Scene, pooling: LossMaxPooling, device: torch.device) -> View:
    """What both networks make of the block at SHOWN, and how loss max-pooling weights the losses of its network."""
    inputs, labels = (tensor.to(device) for tensor in cut(scene, np.array([SHOWN]), BLOCK))
    logits = {name: network.eval()(inputs) for name, network in networks.items()}
    losses = F.cross_entropy(logits["loss max-pooling"], labels, ignore_index=IGNORE_INDEX, reduction="none")
    weights, stats = optimal_weights(losses, labels != IGNORE_INDEX, p=pooling.p, ratio=pooling.ratio)
    return View(
        corner=SHOWN,
        predictions={name: values.argmax(dim=1)[0].cpu().numpy() for name, values in logits.items()},
        losses=losses[0].cpu().numpy(),
        weights=(weights[0] * stats.valid).cpu().numpy(),
    )
