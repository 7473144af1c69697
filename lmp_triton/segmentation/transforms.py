"""The paper's augmentation (section 5.1), on torchvision.transforms.v2.

Scale by 0.5 to 1.5, crop at the place that the sampler chose, flip. The place travels with the image as a key point, so
that any transform of torchvision put before the crop carries it along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

__all__ = ["MEAN", "STD", "ScaledCrop", "apply", "evaluation", "training"]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet, which torchvision's weights expect."""


class ScaledCrop(v2.Transform):
    """A square crop of an image at a random scale, around a key point if one is given, else anywhere.

    To scale by s and crop `size` pixels is to crop size/s pixels and bring them to `size`, at a fraction of the cost:
    that is what happens. The point is in the middle of the crop, but for a shift that keeps the crop inside the image.
    Where the image is smaller than the crop, it is padded.

    Args:
        size: of the crop in pixels: the paper has 550 (Cityscapes) and 321 (Pascal VOC).
        scale: the least and the largest s, drawn uniformly; 0.5 to 1.5 in section 5.1.
        fill: the padding of the image, a byte for each channel or one for all.
        ignore_index: the padding of the label map.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float] = (0.5, 1.5),
        *,
        fill: int | Sequence[int] = 0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be two factors with 0 < first <= second, got {scale}")
        self.size, self.scale, self.ignore_index = size, scale, ignore_index
        self.fill = fill if isinstance(fill, int) else list(fill)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the scale, and the place where no key point gives it."""
        image = next(x for x in flat_inputs if isinstance(x, tv_tensors.Image))
        points = [x for x in flat_inputs if isinstance(x, tv_tensors.KeyPoints) and len(x)]
        window = max(1, round(self.size / float(torch.empty(()).uniform_(*self.scale))))
        corner = []
        for axis, length in enumerate(F.get_size(image)):
            first, last = sorted((0, length - window))  # an image smaller than the window lies inside it
            if points:
                corner.append(min(max(int(points[0][0, 1 - axis]) - window // 2, first), last))
            else:
                corner.append(int(torch.randint(first, last + 1, ())))
        return {"corner": corner, "window": window, "lengths": F.get_size(image)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad if need be, crop, resize."""
        (top, left), window, (height, width) = params["corner"], params["window"], params["lengths"]
        before = [max(0, -left), max(0, -top)]
        padding = [*before, max(0, left + window - width), max(0, top + window - height)]
        if any(padding):
            fill = self.ignore_index if isinstance(inpt, tv_tensors.Mask) else self.fill
            inpt = F.pad(inpt, padding, fill=fill)
        inpt = F.crop(inpt, top + before[1], left + before[0], window, window)
        return F.resize(inpt, [self.size, self.size])


def training(
    size: int,
    *,
    scale: tuple[float, float] = (0.5, 1.5),
    flip: float = 0.5,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    ignore_index: int = 255,
) -> v2.Compose:
    """The paper's augmentation: `ScaledCrop`, a horizontal flip with probability `flip`, and `evaluation`.

    Padding has the mean colour: zeros after normalisation.
    """
    fill = [round(255 * value) for value in mean]
    crop = ScaledCrop(size, scale, fill=fill if len(fill) > 1 else fill[0], ignore_index=ignore_index)
    return v2.Compose([crop, v2.RandomHorizontalFlip(flip), *evaluation(mean=mean, std=std).transforms])


def evaluation(*, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> v2.Compose:
    """Bytes to floats in [0, 1], then (x − mean)/std for each channel. Nothing random."""
    to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
    return v2.Compose([to_float, v2.Normalize(list(mean), list(std))])


def apply(
    transform: Callable[..., Any],
    image: Tensor,
    target: Tensor,
    pixel: tuple[int, int] | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Put an image (channels, H, W) and its label map (H, W) through a transform of torchvision.transforms.v2.

    Args:
        transform: of (tv_tensors.Image, tv_tensors.Mask, tv_tensors.KeyPoints).
        image, target: as read; they stay as they are.
        pixel: row and column of the place to look at: one key point. None: no key point.
        seed: of what is random in the transform, whose draws then leave torch's generator as it was. None: it draws
            from that.

    Returns:
        image, whatever type the transform gives, and target int64 (H', W').
    """
    points = torch.tensor([] if pixel is None else [[pixel[1], pixel[0]]], dtype=torch.float32).reshape(-1, 2)
    inputs = (
        tv_tensors.Image(image),
        tv_tensors.Mask(target[None]),
        tv_tensors.KeyPoints(points, canvas_size=tuple(target.shape)),
    )
    if seed is None:
        image, target, _ = transform(*inputs)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPUs too
            image, target, _ = transform(*inputs)
    return image.as_subclass(Tensor), target.as_subclass(Tensor)[0].long()
