"""The default scene: digits on noisy canvases, the rare ones planted (`lmp_triton.segmentation.digits`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LRScheduler

from lmp_triton.segmentation import loop
from lmp_triton.segmentation.digits import CLASSES, COLOURS, ComposedDigits
from lmp_triton.segmentation.unet import UNet

from .scene import Batch, Scene

__all__ = ["Digits"]

BATCH = 4
LEARNING_RATE = 0.1


class Digits(Scene):
    """The setting of segmentation/RESULTS.md, with its network and its solver."""

    classes = tuple(name if name == "background" else f"digit {name}" for name in CLASSES)
    colours = COLOURS
    ignore_index = 255  # no pixel is ignored
    shares_of = "training pixels"
    held_out_name = "test canvases, all digits equally frequent"
    shown_name = "a test canvas, four times as large"
    training_note = "on the same batches of 4 canvases, SGD"

    def __init__(self) -> None:
        self.training = ComposedDigits(train=True)
        self.test = ComposedDigits(train=False, canvases=300)
        counts = np.bincount(self.training.labels.numpy().ravel(), minlength=len(CLASSES))
        self.shares = counts / counts.sum()
        shown = ComposedDigits(train=False, canvases=1, size=128, digits=24, seed=0)
        self.shown = shown.images, shown.labels.long()

    def network(self) -> nn.Module:
        """See `Scene`."""
        return UNet(1, len(CLASSES), width=16, depth=2, stride=2)

    def solver(self, network: nn.Module, steps: int) -> tuple[optim.Optimizer, LRScheduler]:
        """See `Scene`."""
        return loop.poly_sgd(network.parameters(), steps, LEARNING_RATE)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """See `Scene`."""
        for drawn in np.random.default_rng(seed).integers(len(self.training), size=(steps, BATCH)):
            yield self.training.images[drawn], self.training.labels[drawn].long()

    def held_out(self) -> Iterator[Batch]:
        """See `Scene`."""
        return zip(self.test.images.split(50), self.test.labels.long().split(50), strict=True)

    def photograph(self, image: Tensor) -> NDArray[np.floating]:
        """See `Scene`."""
        return np.repeat(image[0].numpy()[..., None] / 255, 3, axis=2)
