"""A small U-Net."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNet"]


class UNet(nn.Module):
    """Logits for every pixel: uint8 (N, channels, H, W) to float32 (N, classes, H, W), for any H and W of at least 8.

    Bytes go in and are brought to [-1, 1] here, so that crops travel to the GPU at a quarter of their size.
    """

    def __init__(self, channels: int, classes: int, width: int = 16, depth: int = 3):
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.entry = _convolutions(channels, width)
        self.down = nn.ModuleList(_convolutions(wide, wider) for wide, wider in pairwise(widths))
        self.up = nn.ModuleList(_convolutions(wide + wider, wide) for wide, wider in pairwise(widths))
        self.head = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        x = self.entry(image.float() / 127.5 - 1)
        skipped = []
        for stage in self.down:
            skipped.append(x)
            x = stage(F.max_pool2d(x, 2))
        for stage in reversed(self.up):
            skip = skipped.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
            x = stage(torch.cat([skip, x], dim=1))
        return self.head(x)


def _convolutions(channels: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for incoming in (channels, width):
        layers += [nn.Conv2d(incoming, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
