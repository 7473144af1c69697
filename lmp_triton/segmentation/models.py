"""The paper's network, and a small one, behind one interface.

A model maps images (N, channels, H, W) to logits (N, classes, h, w). They may be coarser than the images, and the loss
then takes in the bilinear upsampling (`baselines`), so that logits at full resolution never lie in memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from .unet import UNet

__all__ = ["MODELS", "DeepLabV2", "UNet", "build"]


class DeepLabV2(nn.Module):
    """DeepLabV2 on a ResNet (section 5.1): images (N, 3, H, W) to logits (N, classes, ⌈H/8⌉, ⌈W/8⌉).

    torchvision's ResNet, its last two stages dilated in place of strided, then the atrous spatial pyramid: four
    parallel 3 by 3 convolutions at different dilations, summed.

    Args:
        classes: of the logits.
        backbone: "resnet50", "resnet101" (the paper's) or "resnet152".
        weights: None: random, nothing is downloaded. A name of torchvision's, such as
            "ResNet101_Weights.IMAGENET1K_V2" or, whose ResNet was trained on MS-COCO as the paper's was,
            "DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1": downloaded once. Or the path of a state_dict of the
            ResNet.
        rates: the dilations of the pyramid.
        freeze_norm: fix the statistics and factors of batch normalisation, as is usual when fine-tuning with the
            paper's 2 or 4 crops a batch. Default: if there are weights.
    """

    stride = 8

    def __init__(
        self,
        classes: int,
        *,
        backbone: str = "resnet101",
        weights: str | None = None,
        rates: tuple[int, ...] = (6, 12, 18, 24),
        freeze_norm: bool | None = None,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {BACKBONES}, got {backbone!r}")
        if not rates or min(rates) < 1:
            raise ValueError(f"rates must be at least one dilation, each at least 1, got {rates}")
        freeze_norm = weights is not None if freeze_norm is None else freeze_norm
        resnet = torchvision.models.get_model(
            backbone,
            weights=None,
            replace_stride_with_dilation=[False, True, True],
            norm_layer=torchvision.ops.FrozenBatchNorm2d if freeze_norm else nn.BatchNorm2d,
        )
        if weights is not None:
            _load(resnet, weights)
        channels = resnet.fc.in_features
        layers = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.backbone = nn.Sequential(OrderedDict((name, getattr(resnet, name)) for name in layers))
        self.pyramid = nn.ModuleList(_branch(channels, classes, rate) for rate in rates)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        features = self.backbone(images)
        logits = self.pyramid[0](features)
        for branch in self.pyramid[1:]:
            logits = logits + branch(features)
        return logits


def _branch(channels: int, classes: int, rate: int) -> nn.Conv2d:
    branch = nn.Conv2d(channels, classes, 3, padding=rate, dilation=rate)
    nn.init.normal_(branch.weight, std=0.01)  # as DeepLabV2
    branch.bias.data.zero_()  # type: ignore[union-attr]
    return branch


BACKBONES = ("resnet50", "resnet101", "resnet152")


def _load(resnet: nn.Module, weights: str) -> None:
    """Fill a ResNet, which may have a classifier that the weights lack."""
    if "_Weights." in weights:
        try:
            known = torchvision.models.get_weight(weights)
        except (KeyError, ValueError):
            raise ValueError(f"weights must be a file or a name of torchvision's, got {weights}") from None
        try:
            state = known.get_state_dict(progress=True, check_hash=True)
        except OSError as error:
            raise OSError(f"weights {weights} could not be fetched from {known.url}: {error}") from error
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    whole = any(key.startswith("backbone.") for key in state)  # of a segmentation network
    state = {
        key.removeprefix("backbone."): value for key, value in state.items() if not whole or key.startswith("backbone.")
    }
    own = resnet.state_dict()
    state = {key: value for key, value in state.items() if key in own}  # batch norm's counters, a classifier
    missing = [key for key in own if key not in state and not key.startswith("fc.")]
    if missing:
        raise ValueError(f"weights {weights} are not of this ResNet: it lacks {missing[0]} and {len(missing) - 1} more")
    resnet.load_state_dict(state, strict=False)


def _unet(classes: int, *, channels: int = 3, **options: Any) -> UNet:
    return UNet(channels, classes, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {"deeplabv2": DeepLabV2, "unet": _unet}


def build(name: str, classes: int, **options: Any) -> nn.Module:
    """A model by its name.

    Args:
        name: "deeplabv2" (see `DeepLabV2`) or "unet" (`UNet`; `channels` is 3 unless given).
        classes: of the logits.
        options: of that model.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {tuple(MODELS)}, got {name!r}")
    return MODELS[name](classes, **options)
