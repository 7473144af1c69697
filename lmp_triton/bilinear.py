"""Where a pixel lies among the logits it is interpolated from: `F.interpolate(mode="bilinear")`, in integers.

Logits lie at 0, 1, …, nodes − 1 along each of two axes; a pixel lies between two of them, or at the border on one. All
of it follows from sizes, so it is exact: (slope·i + offset) / denominator is the place of pixel i, clamped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """One axis. Cell j lies between nodes j and j + 1; those before the first node and after the last one are outside,
    and their pixels take the value at the border."""

    nodes: int
    """Logits along the axis."""
    pixels: int
    slope: int
    offset: int
    denominator: int
    first_cell: int
    """−1, or 0 where no pixel lies before the first node."""

    @property
    def cells(self) -> int:
        """From first_cell to the one after the last node."""
        return self.nodes - self.first_cell

    def cell_of(self, pixel: int) -> int:
        """The cell of a pixel."""
        return (self.slope * pixel + self.offset) // self.denominator

    def first_pixel(self, cell: int) -> int:
        """The first pixel that is not before a cell: `pixels` if there is none."""
        return min(max(-((self.offset - self.denominator * cell) // self.slope), 0), self.pixels)

    @property
    def longest_cell(self) -> int:
        """The most pixels that a cell can have."""
        return min(-(-self.denominator // self.slope), self.pixels)


def axis(nodes: int, pixels: int, align_corners: bool) -> Axis:
    """The axis of `pixels` pixels interpolated from `nodes` logits.

    Without align_corners pixels and logits are squares that fill the same length, and pixel i is the point
    (i + ½)·nodes/pixels − ½; with it their first and last centres coincide: i·(nodes − 1)/(pixels − 1).
    """
    if not align_corners:
        return Axis(nodes, pixels, 2 * nodes, nodes - pixels, 2 * pixels, -1)
    if nodes == 1 or pixels == 1:  # all pixels are at the first node; a slope of 0 would have no inverse
        return Axis(nodes, pixels, 1, 0, pixels, 0)
    return Axis(nodes, pixels, nodes - 1, 0, pixels - 1, 0)


def weights(along: Axis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(pixels, nodes): what each node contributes to each pixel, two entries a row at most: 1 − distance."""
    place = torch.arange(along.pixels, device=device) * along.slope + along.offset
    place = place.clamp(0, (along.nodes - 1) * along.denominator)
    node = torch.arange(along.nodes, device=device) * along.denominator
    near = (along.denominator - (place.unsqueeze(1) - node).abs()).clamp_min(0)
    return near.to(dtype) / along.denominator
