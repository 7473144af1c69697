"""Tiled inference (section 5.2 of the paper), for images that are too large, or larger than the training crops.

Tiles cover the image; of an overlap the first half is decided by the tile before it, the second by the one after.

    EFFICIENT = Tiling(count=(1, 5))                 # five tiles of full height that do not overlap
    OPTIMISED = Tiling(count=(1, 5), overlap=200)    # the same with 200 pixels of overlap
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EFFICIENT", "OPTIMISED", "Span", "Tiling", "predict", "tiled"]


class Span(NamedTuple):
    """A tile along one axis: the pixels [start, stop) go in, and it decides the pixels [first, last)."""

    start: int
    stop: int
    first: int
    last: int


class TooSmall(ValueError):
    """An image has too few pixels for the tiles asked for."""


@dataclass(frozen=True)
class Tiling:
    """How an image is cut: either into a number of tiles or into tiles of a size. Each is a pair (rows, columns).

    Args:
        count: the number of tiles. Neighbours overlap by exactly `overlap`, sizes differ by a pixel at most.
        size: of a tile in pixels; None along an axis: the whole image. As few tiles as overlap by at least `overlap`,
            spread evenly; an image smaller than that is one tile.
        overlap: pixels shared by neighbours, along both axes or (vertically, horizontally).

    Raises:
        ValueError: both or neither of count and size; a number out of range. The image's size is checked in `spans`.
    """

    count: tuple[int, int] | None = None
    size: tuple[int | None, int | None] | None = None
    overlap: int | tuple[int, int] = 0

    def __post_init__(self) -> None:
        if (self.count is None) == (self.size is None):
            raise ValueError("give either count or size of the tiles")
        if self.count is not None and min(self.count) < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")
        if min(self.overlaps) < 0:
            raise ValueError(f"overlap must be at least 0, got {self.overlap}")
        for length, overlap in zip(self.size or (), self.overlaps, strict=False):
            if length is not None and length <= overlap:
                raise ValueError(f"size must be larger than overlap, got {length} and {overlap}")

    @property
    def overlaps(self) -> tuple[int, int]:
        """Vertically and horizontally."""
        return (self.overlap, self.overlap) if isinstance(self.overlap, int) else self.overlap

    def spans(self, length: int, axis: int) -> list[Span]:
        """The tiles along an axis (0: rows, 1: columns) of so many pixels."""
        overlap = self.overlaps[axis]
        if self.count is not None:
            count = self.count[axis]
            if count > 1 and length - overlap < count:
                raise TooSmall(f"{length} pixels are too few for {count} tiles with an overlap of {overlap}")
            starts = [i * (length - overlap) // count for i in range(count)]
            stops = [start + overlap for start in starts[1:]] + [length]
        else:
            assert self.size is not None
            size = min(length, self.size[axis] or length)
            steps = -(-(length - size) // (size - overlap)) if length > size else 0
            starts = [i * (length - size) // max(steps, 1) for i in range(steps + 1)]
            stops = [start + size for start in starts]
        cuts = [0, *((start + stop) // 2 for start, stop in zip(starts[1:], stops[:-1], strict=True)), length]
        return [Span(*span) for span in zip(starts, stops, cuts[:-1], cuts[1:], strict=True)]

    def tiles(self, height: int, width: int) -> Iterator[tuple[Span, Span]]:
        """All tiles of an image, row by row."""
        return product(self.spans(height, 0), self.spans(width, 1))


EFFICIENT = Tiling(count=(1, 5))
"""The paper's "efficient tiling": "five non-overlapping, rectangular crops with full image height"."""
OPTIMISED = Tiling(count=(1, 5), overlap=(0, 200))
"""The paper's "optimized tiling": "a 200 pixel overlap between tiles"; their number is not given, five is ours."""


def tiled(function: Callable[[Tensor], Tensor], images: Tensor, tiling: Tiling) -> Tensor:
    """Apply a function to each tile and put the results together.

    Args:
        function: (N, channels, h, w) to (N, *any, h, w).
        images: (N, channels, H, W).
        tiling: how they are cut.

    Returns:
        (N, *any, H, W). If the function looks at each pixel alone, the same as function(images).

    Raises:
        ValueError: the function's result is not of the size of its tile, or the image too small for the tiling.
    """
    height, width = images.shape[-2:]
    whole: Tensor | None = None
    for rows, columns in tiling.tiles(height, width):
        tile = images[..., rows.start : rows.stop, columns.start : columns.stop]
        part = function(tile)
        if part.shape[-2:] != tile.shape[-2:]:
            raise ValueError(f"function made {tuple(part.shape[-2:])} of a tile of {tuple(tile.shape[-2:])} pixels")
        if whole is None:
            whole = part.new_empty(*part.shape[:-2], height, width)
        whole[..., rows.first : rows.last, columns.first : columns.last] = part[
            ...,
            rows.first - rows.start : rows.last - rows.start,
            columns.first - columns.start : columns.last - columns.start,
        ]
    assert whole is not None
    return whole


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, tiling: Tiling | None = None) -> Tensor:
    """The classes that a model sees in images (N, channels, H, W): int64 (N, H, W).

    Logits coarser than the tile are brought to its size bilinearly, as in training. The model stays in the mode, train
    or eval, that it is in.
    """

    def classes(tile: Tensor) -> Tensor:
        logits = model(tile)
        if logits.shape[-2:] != tile.shape[-2:]:
            logits = F.interpolate(logits, size=tile.shape[-2:], mode="bilinear", align_corners=False)
        return logits.argmax(dim=1)

    return classes(images) if tiling is None else tiled(classes, images, tiling)
