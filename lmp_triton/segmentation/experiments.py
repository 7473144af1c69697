"""The runs behind RESULTS.md, on composed digits: `python -m lmp_triton.segmentation.experiments`.

Each run trains the same small U-Net on the same canvases from a seed that fixes start, canvases and batches, whatever
the loss. Its row is appended whole to results/digits.csv; a run that has a row is left out, so that the command can be
stopped and started at will. The page is written from the rows by `python -m lmp_triton.segmentation.report`.
Those on the land-cover scene are in `land_cover`.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils.data import default_collate

from . import digits, loop
from .baselines import build_criterion
from .sampling import ClassIndex, ComplementarySampler
from .unet import UNet

Observer = Callable[[Tensor, Tensor], object]

RESULTS = Path(__file__).with_name("results")
ROWS = RESULTS / "digits.csv"
EVOLUTION = RESULTS / "evolution.npz"

STEPS = 2000
BATCH = 4
TEST_CANVASES = 300
SHOWN = (0, 1)
"""Test canvases whose predictions are kept as training goes on (figure 4), by seed 0 …"""
SHOWN_AT = (100, 250, 500, 750, 1000, 1500, 2000)
"""… after so many steps."""


@dataclass(frozen=True)
class Setting:
    """What is varied; the rest is the same for all runs."""

    loss: str = "pooling"
    """A name of `baselines.CRITERIA`."""
    p: float | None = None
    ratio: float | None = None
    sampling: str = "uniform"
    """Which canvases a batch holds: uniform, or inverse-iou (`ComplementarySampler` with its defaults)."""
    lr: float = 0.1


CROSS_ENTROPY = Setting("cross-entropy")
POOLING = Setting(p=1.3, ratio=0.05)
KEPT = (CROSS_ENTROPY, Setting(p=1.3, ratio=0.1))
"""The two that figure 4 compares."""
SETTINGS = {
    "main": [
        CROSS_ENTROPY,
        POOLING,
        Setting("cross-entropy", sampling="inverse-iou"),
        Setting(p=1.3, ratio=0.05, sampling="inverse-iou"),
        Setting(p=1.0, ratio=0.05),
        Setting("inverse-median-frequency"),
        Setting("focal"),
    ],
    "ratio": [Setting(p=1.3, ratio=ratio) for ratio in (0.1, 0.25, 0.5)],
    "p": [Setting(p=p, ratio=0.1) for p in (1.0, 2.0, 1.1, 1.5, 2.3)],
    "top-k": [Setting(p=1.0, ratio=0.25)],
    "lr": [Setting("cross-entropy", lr=0.3), Setting(p=1.3, ratio=0.1, lr=0.3), Setting("cross-entropy", lr=0.03)],
    "focal": [Setting("focal", lr=lr) for lr in (1.0, 3.0)],
}
"""Groups of runs, by what they are for. What one group needs of another is not listed twice."""


@functools.cache
def canvases(seed: int) -> tuple[digits.ComposedDigits, digits.ComposedDigits]:
    """The training and the test canvases of a seed."""
    return digits.ComposedDigits(True, seed=seed), digits.ComposedDigits(False, canvases=TEST_CANVASES, seed=seed)


def train(setting: Setting, seed: int, *, steps: int, keep: bool = False) -> tuple[nn.Module, dict[str, float]]:
    """One run, on one thread; with `keep` the predictions for figure 4 go into results/evolution.npz.

    Returns the network and what was measured: IoU of each class on the test canvases (`iou_0` …), their mean, the
    mean of the five rarest, and seconds.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = UNet(1, len(digits.CLASSES), width=16, depth=2, stride=2).to(memory_format=torch.channels_last)
    training, test = canvases(seed)
    kept: dict[int, Tensor] = {}
    count = 0

    def on_step() -> None:
        nonlocal count
        count += 1
        if keep and count in SHOWN_AT:
            model.eval()
            with torch.inference_mode():
                kept[count] = model(test.images[list(SHOWN)]).argmax(dim=1).to(torch.uint8)
            model.train()

    optimizer, schedule = loop.poly_sgd(model.parameters(), steps, setting.lr)
    index = ClassIndex.of(training.labels, len(digits.CLASSES))
    draws, observe = _draws(setting, index, seed, steps)
    batches = (default_collate([training[next(draws)] for _ in range(BATCH)]) for _ in range(steps))
    started, cpu = time.perf_counter(), time.process_time()
    loss = criterion(setting, index.counts)
    loop.fit(model, loss, batches, optimizer, schedule, on_step=on_step, observe=observe)
    measured = {"wall_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}

    pairs = zip(test.images.split(50), test.labels.long().split(50), strict=True)
    iou = 100 * loop.iou(model, pairs, len(digits.CLASSES)).double().numpy()
    measured |= {"miou": iou.mean(), "rare": iou[-5:].mean()}
    measured |= {f"iou_{c}": value for c, value in enumerate(iou)}
    if keep:
        _keep(setting, {step: classes.numpy() for step, classes in kept.items()}, test)
    return model, measured


def criterion(setting: Setting, counts: ArrayLike | None = None) -> nn.Module:
    """The loss of a setting; `counts` are those of the training set, for the losses that want them."""
    options: dict[str, Any] = {}
    if setting.loss == "pooling":
        options = {"p": setting.p, "ratio": setting.ratio}
    if setting.loss == "inverse-median-frequency":
        options = {"counts": counts}
    return build_criterion(setting.loss, **options)


def _draws(setting: Setting, index: ClassIndex, seed: int, steps: int) -> tuple[Iterator[int], Observer | None]:
    """The numbers of the canvases of a run, and what wants to see the predictions for them."""
    if setting.sampling == "uniform":
        return iter(np.random.default_rng(seed).integers(len(index.counts), size=steps * BATCH)), None
    sampler = ComplementarySampler(index, mode=setting.sampling, length=steps * BATCH, seed=seed)
    return (draw.image for draw in sampler), sampler.observe


def _keep(setting: Setting, kept: dict[int, np.ndarray], test: digits.ComposedDigits) -> None:
    """Add the predictions of a run to those of the others."""
    arrays = dict(np.load(EVOLUTION)) if EVOLUTION.exists() else {}
    arrays |= {"images": test.images[list(SHOWN)].numpy(), "labels": test.labels[list(SHOWN)].numpy()}
    arrays |= {f"{setting.loss} {step}": classes for step, classes in kept.items()}
    np.savez_compressed(EVOLUTION, **arrays)


def run(setting: Setting, seed: int) -> dict[str, object]:
    """One run as a row of the table."""
    keep = seed == 0 and setting in KEPT
    _, measured = train(setting, seed, steps=STEPS, keep=keep)
    return row_of(setting, seed, measured, steps=STEPS, batch=BATCH)


def row_of(setting: Setting, seed: int, measured: dict[str, float], **size: int) -> dict[str, object]:
    """What was done, what was measured, and where."""
    where = {
        "machine": _machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    rounded = {name: round(value, 3) for name, value in measured.items()}
    return {**asdict(setting), "seed": seed, **size, **rounded, **where}


def done(rows: Path) -> set[tuple[str, ...]]:
    """Settings and seeds that have a row."""
    if not rows.exists():
        return set()
    with rows.open(newline="") as file:
        return {_key(row) for row in csv.DictReader(file)}


def complete(
    rows: Path, settings: Iterable[Setting], seeds: int, run: Callable[[Setting, int], dict[str, object]]
) -> None:
    """Do the runs that have no row yet, the first seed of all settings first; append a row after each."""
    settings = list(settings)
    for seed in range(seeds):
        for setting in settings:
            if _key({**asdict(setting), "seed": seed}) in done(rows):
                continue
            row = run(setting, seed)
            rows.parent.mkdir(exist_ok=True)
            new = not rows.exists()
            with rows.open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(f"{setting}, seed {seed}: mIoU {row['miou']}, five rarest {row['rare']}", flush=True)


def _key(row: dict[str, object]) -> tuple[str, ...]:
    return tuple("" if row[name] is None else str(row[name]) for name in (*(f.name for f in fields(Setting)), "seed"))


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def main() -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(description="Train on composed digits; a row of results/digits.csv each run.")
    parser.add_argument("--groups", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which settings (all)")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this, exclusive (%(default)s)")
    options = parser.parse_args()
    complete(ROWS, (setting for group in options.groups for setting in SETTINGS[group]), options.seeds, run)


if __name__ == "__main__":
    main()
