"""Composed digits: real handwritten digits pasted on noisy canvases, with an imbalance that is planted.

What a loss makes of rare classes shows within minutes on a CPU, on data that pip installs: the 1797 scans of
scikit-learn's `load_digits` (8 by 8 pixels). The background is class 0 and covers about 90 % of the pixels, digit k is
class k + 1. In training digit k is drawn with a frequency ∝ (k + 1)^-1.5, a nine 32 times as rarely as a nought; in the
test set all digits are equally frequent, so that each class is measured equally well. No scan is in both.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["CLASSES", "COLOURS", "TRAINING_SCANS", "ComposedDigits"]

CLASSES = ("background", *"0123456789")
COLOURS = (
    "#20242c",
    "#e6e6e6",
    "#f2c14e",
    "#f78154",
    "#c94f7c",
    "#7b5ea7",
    "#4d7ea8",
    "#3fa7d6",
    "#59cd90",
    "#a3c93a",
    "#ee3d3d",
)
"""Of the classes on pictures."""
TRAINING_SCANS = 1100
"""The training canvases are made from so many scans, the test canvases from the other 697."""
INK = 6.0
"""A pixel of a scan, 0 to 16, is the digit's from here on."""


class ComposedDigits(Dataset[tuple[Tensor, Tensor]]):
    """Canvases with digits: item i is the pair (image uint8 (1, size, size), label int64 (size, size)).

    Everything is drawn when it is made, about 0.3 ms a digit; `images` and `labels` hold it.

    Args:
        train: training canvases (planted imbalance), or test canvases (digits equally frequent).
        canvases: how many.
        size: of a canvas, in pixels.
        digits: how many on a canvas; later ones may cover earlier ones.
        extent: the smallest and the largest side of a digit in pixels, drawn uniformly.
        exponent: in training digit k has a frequency ∝ (k + 1)^-exponent.
        noise: standard deviation of the noise of a pixel; the ink of a digit is 0.5 to 1 above a background of 0.
        seed: fixes the split of the scans and the canvases. The split is the same for train and test.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        train: bool = True,
        *,
        canvases: int = 1200,
        size: int = 64,
        digits: int = 5,
        extent: tuple[int, int] = (10, 18),
        exponent: float = 1.5,
        noise: float = 0.1,
        seed: int = 0,
    ) -> None:
        if canvases < 1 or digits < 0:
            raise ValueError(f"canvases must be at least 1 and digits not negative, got {canvases} and {digits}")
        if not 1 <= extent[0] <= extent[1] <= size:
            raise ValueError(f"extent must be two sides with 1 <= first <= second <= size = {size}, got {extent}")
        scans, digit_of = _scans()
        shuffled = np.random.default_rng(seed).permutation(len(scans))
        chosen = shuffled[:TRAINING_SCANS] if train else shuffled[TRAINING_SCANS:]
        of_digit = [chosen[digit_of[chosen] == digit] for digit in range(10)]
        frequency = np.arange(1, 11) ** -float(exponent) if train else np.ones(10)

        draw = np.random.default_rng([seed, int(train)])
        images = draw.normal(0, noise, (canvases, size, size)).astype(np.float32)
        labels = np.zeros((canvases, size, size), np.uint8)
        for image, label in zip(images, labels, strict=True):
            for digit in draw.choice(10, digits, p=frequency / frequency.sum()):
                side = int(draw.integers(extent[0], extent[1] + 1))
                scan = _resize(scans[draw.choice(of_digit[digit])], side)
                row, column = draw.integers(0, size - side + 1, 2)
                place = slice(row, row + side), slice(column, column + side)
                ink = scan >= INK
                image[place] += np.where(ink, scan / 16 * draw.uniform(0.5, 1), 0)
                label[place][ink] = digit + 1
        # 0 and 1 lie at 64 and 192: the noise around both fits into a byte.
        self.images = torch.from_numpy(np.clip(64 + 128 * images, 0, 255).astype(np.uint8))[:, None]
        self.labels = torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index].long()


def _resize(scan: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """A scan brought to side by side pixels, bilinearly."""
    return F.interpolate(torch.from_numpy(scan)[None, None], size=(side, side), mode="bilinear")[0, 0].numpy()


def _scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The scans, float32 (1797, 8, 8) from 0 to 16, and which digit each shows."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.float32), data.target.astype(np.int64)
