"""A small U-Net, for CPUs and small data."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNet"]


class UNet(nn.Module):
    """Logits for every pixel: (N, channels, H, W) to float32 (N, classes, H, W), for any H and W of at least 8.

    Bytes (uint8) are brought to [-1, 1] here, so that crops travel to the GPU at a quarter of their size; floating
    images are taken as they are.

    Args:
        channels: of the image.
        classes: of the logits.
        width: channels of the finest level; each coarser level has twice as many.
        depth: levels below the finest.
        stride: 1, or 2 to work at half the resolution, at a quarter of the cost; the logits are brought back to the
            size of the image bilinearly.
    """

    def __init__(self, channels: int, classes: int, width: int = 16, depth: int = 3, stride: int = 1):
        super().__init__()
        self.stride = stride
        widths = [width * 2**level for level in range(depth + 1)]
        self.entry = nn.Sequential(*_convolution(channels, width, stride), *_convolution(width, width))
        self.down = nn.ModuleList(_stage(wide, wider) for wide, wider in pairwise(widths))
        self.up = nn.ModuleList(_stage(wide + wider, wide) for wide, wider in pairwise(widths))
        self.head = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        x = self.entry(image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image)
        skipped = []
        for stage in self.down:
            skipped.append(x)
            x = stage(F.max_pool2d(x, 2))
        for stage in reversed(self.up):
            skip = skipped.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear")
            x = stage(torch.cat([skip, x], dim=1))
        logits = self.head(x).float()
        return logits if self.stride == 1 else F.interpolate(logits, size=image.shape[-2:], mode="bilinear")


def _stage(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(*_convolution(channels, width), *_convolution(width, width))


def _convolution(channels: int, width: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
