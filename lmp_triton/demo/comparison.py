"""The demo itself: train with both losses from the same start on the same batches, print a table, draw a picture."""

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
from lmp_triton.segmentation import loop

from .picture import View, draw, part_of
from .scene import Scene

__all__ = ["check_output", "compare"]

PROGRESS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
TYPES = (".png", ".jpg", ".webp", ".pdf", ".svg")


def check_output(output: Path) -> None:
    """Make the folder of the picture; ValueError if the picture could not be written, which is known only at the end.

    Args:
        output: where it shall go.
    """
    if output.is_dir():
        raise ValueError(f"--output must be a file, and {output} is a folder")
    if output.suffix.lower() not in TYPES:
        raise ValueError(f"--output must end in one of {', '.join(TYPES)}, got {output}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part_of(output).touch()
        part_of(output).unlink()
    except OSError as error:
        raise ValueError(f"--output cannot be written: {error}") from None


def compare(scene: Scene, pooling: LossMaxPooling, *, steps: int, seeds: Sequence[int], output: Path) -> None:
    """Train with each seed and each loss, print the IoU on what is held out, save a picture of the first seed."""
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = f"p = {pooling.p}, ratio = {pooling.ratio}"
    console.print(f"Loss max-pooling with {setting} by the [bold]{backend_name(scene, device)}[/] backend on {device}.")

    criteria = {"cross-entropy": nn.CrossEntropyLoss(ignore_index=scene.ignore_index), "loss max-pooling": pooling}
    networks: dict[str, nn.Module] = {}
    runs: dict[str, list[Tensor]] = {name: [] for name in criteria}
    with Progress(*PROGRESS, console=console) as progress:
        for seed in seeds:
            torch.manual_seed(seed)
            start = scene.network()
            for name, criterion in criteria.items():
                # With the channels last, the convolutions take half the time on a CPU.
                network = copy.deepcopy(start).to(device).to(memory_format=torch.channels_last)
                bar = progress.add_task(f"{name}, seed {seed}", total=steps)
                optimizer, schedule = scene.solver(network, steps)
                batches = scene.batches(steps, seed)
                advance = partial(progress.advance, bar)
                loop.fit(network, criterion, batches, optimizer, schedule, device, advance)
                iou = loop.iou(network, scene.held_out(), len(scene.classes), scene.ignore_index, device)
                runs[name].append(iou)
                networks.setdefault(name, network)

    ious = {name: torch.stack(values).double().numpy() for name, values in runs.items()}
    console.print(_table(scene, ious))
    console.print(_caution(len(seeds)))
    caption = (
        f"A small U-Net, {steps} steps with each loss from the same start {scene.training_note}; {setting}, "
        f"seed {seeds[0]}"
    )
    draw(output, scene, _view(networks, scene, pooling, device), {name: iou[0] for name, iou in ious.items()}, caption)
    console.print(f"Picture: [bold]{output.resolve()}[/]", soft_wrap=True)


def backend_name(scene: Scene, device: torch.device) -> str:
    """The backend that serves loss max-pooling on batches like those of the training."""
    _, labels = next(scene.batches(1, 0))
    return dispatch.choose(torch.empty(1, len(scene.classes), labels[0].numel(), device=device))


def _table(scene: Scene, ious: dict[str, NDArray[np.float64]]) -> Table:
    """IoU in percent, the commonest class first: `ious` holds (seeds, classes) for each loss."""
    title = f"Intersection over union, %, on {scene.held_out_name} (pixels: share of the {scene.shares_of})"
    table = Table(title=title, title_justify="left")
    table.add_column("class", no_wrap=True)
    table.add_column("pixels, %", justify="right")
    for name in ious:
        table.add_column(name, justify="right")
    order = np.argsort(-scene.shares)
    for c in order:
        table.add_row(scene.classes[c], f"{100 * scene.shares[c]:.2f}", *(percent(iou[:, c]) for iou in ious.values()))
    table.add_section()
    rare = order[-5:]
    for name, chosen in (("mean", order), ("mean of the five rarest", rare)):
        means = (percent(np.nanmean(iou[:, chosen], axis=1)) for iou in ious.values())
        table.add_row(name, "", *means, style="bold")
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
        f"Mean ± standard deviation over {seeds} seeds, each with its own start and batches, on one split of the data: "
        "a difference within the spread shows nothing about which loss is better."
    )


@torch.inference_mode()
def _view(networks: dict[str, nn.Module], scene: Scene, pooling: LossMaxPooling, device: torch.device) -> View:
    """What both networks make of the shown image, and how loss max-pooling weights the losses of its network."""
    inputs, labels = (tensor.to(device) for tensor in scene.shown)
    logits = {name: network.eval()(inputs) for name, network in networks.items()}
    losses = F.cross_entropy(logits["loss max-pooling"], labels, ignore_index=scene.ignore_index, reduction="none")
    weights, stats = optimal_weights(losses, labels != scene.ignore_index, p=pooling.p, ratio=pooling.ratio)
    return View(
        predictions={name: values.argmax(dim=1)[0].cpu().numpy() for name, values in logits.items()},
        losses=losses[0].cpu().numpy(),
        weights=(weights[0] * stats.valid).cpu().numpy(),
    )
