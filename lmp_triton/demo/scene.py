"""What the demo asks of a scene, so that training, table and picture know nothing of digits or land cover."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor, nn, optim

__all__ = ["Batch", "Scene"]

Batch = tuple[Tensor, Tensor]
"""Images uint8 (N, channels, H, W) and labels int64 (N, H, W)."""


class Scene(ABC):
    """Data to train and to measure on, and how to show it."""

    classes: tuple[str, ...]
    colours: tuple[str, ...]
    """Of the classes on the maps."""
    ignore_index: int
    shares: NDArray[np.float64]
    """The share of every class among the pixels that `shares_of` names, (classes,), sums to 1."""
    shares_of: str
    held_out_name: str
    """What the networks are measured on, such as "test canvases"."""
    shown: Batch
    """One held-out image, the one of the picture."""
    shown_name: str
    training_note: str
    """How the two networks were trained, in a few words."""

    @abstractmethod
    def network(self) -> nn.Module:
        """A network with a random start."""

    @abstractmethod
    def solver(self, network: nn.Module, steps: int) -> tuple[optim.Optimizer, optim.lr_scheduler.LRScheduler]:
        """Optimiser and schedule for so many steps."""

    @abstractmethod
    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """The training batches of a seed."""

    @abstractmethod
    def held_out(self) -> Iterator[Batch]:
        """All that the networks are measured on."""

    @abstractmethod
    def photograph(self, image: Tensor) -> NDArray[np.floating]:
        """An image (channels, H, W) to look at: (H, W, 3) from 0 to 1."""

    has_overview = False
    """Whether there is a whole to show, in which the shown image lies."""

    def draw_overview(self, axes: Axes) -> None:
        """Draw that whole."""
        raise NotImplementedError
