"""The runs on the land-cover scene behind RESULTS.md: `python -m lmp_triton.segmentation.land_cover`.

The scene, the network, the solver and the crops are those of `lmp-triton demo --scene land-cover`, whose data packages
it needs. A seed fixes start and crops, whatever the loss; the rows go to results/land-cover.csv as in `experiments`.
"""

from __future__ import annotations

import argparse
import functools
import time

import numpy as np
import torch
from torch import nn

from lmp_triton.demo import land_cover as demo

from . import experiments, loop
from .experiments import Setting

ROWS = experiments.RESULTS / "land-cover.csv"
STEPS = 1000
CROSS_ENTROPY = Setting("cross-entropy", lr=demo.LEARNING_RATE)
SETTINGS = [
    CROSS_ENTROPY,
    Setting(p=1.0, ratio=0.25, lr=demo.LEARNING_RATE),
    Setting(p=1.3, ratio=0.25, lr=demo.LEARNING_RATE),
    Setting(p=1.3, ratio=0.1, lr=demo.LEARNING_RATE),
]


@functools.cache
def scene() -> demo.LandCover:
    """The scene, read once."""
    return demo.LandCover()


def train(setting: Setting, seed: int, *, steps: int) -> tuple[nn.Module, dict[str, float]]:
    """One run, on one thread; returns the network and what was measured on the held-out blocks, as in `experiments`."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = scene().network().to(memory_format=torch.channels_last)
    optimizer, schedule = scene().solver(model, steps)
    started, cpu = time.perf_counter(), time.process_time()
    loop.fit(model, experiments.criterion(setting), scene().batches(steps, seed), optimizer, schedule)
    measured = {"wall_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}

    iou = 100 * loop.iou(model, scene().held_out(), len(demo.CLASSES), demo.IGNORE_INDEX).double().numpy()
    rarest = np.argsort(scene().shares)[:5]
    measured |= {"miou": iou.mean(), "rare": iou[rarest].mean()}
    return model, measured | {f"iou_{c}": value for c, value in enumerate(iou)}


def run(setting: Setting, seed: int) -> dict[str, object]:
    """One run as a row of the table."""
    _, measured = train(setting, seed, steps=STEPS)
    return experiments.row_of(setting, seed, measured, steps=STEPS, batch=demo.BATCH)


def main() -> None:
    """Do the runs that are missing."""
    parser = argparse.ArgumentParser(description="Train on the land-cover scene; a row of results/land-cover.csv each.")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this, exclusive (%(default)s)")
    experiments.complete(ROWS, SETTINGS, parser.parse_args().seeds, run)


if __name__ == "__main__":
    main()
