"""The training of the paper (section 5) as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from . import baselines, loop, models, tiling
from .metrics import IoU
from .sampling import ComplementarySampler

__all__ = ["SegmentationTask"]


class SegmentationTask(lightning.LightningModule):
    """Trains any model with any criterion: SGD with momentum and the "poly" schedule, IoU on the validation images.

    Logged each step: `loss`, the learning rate `lr`, and what the criterion has to say; of loss max-pooling that is
    `alpha`, the largest α* of the batch, and `saturated`, the share of the valid pixels at the largest weight. Logged
    each validation: `miou`, and `iou/NAME` for each class. A sampler that follows the training (section 4) is told the
    predictions.

    Args:
        classes: their names, in the order of their indices; the command line takes them from the data.
        ignore_index: pixels with this label take no part; likewise.
        model: a name of `models.MODELS`, or a module: images (N, channels, H, W) to logits (N, classes, h, w).
        model_options: for `models.build`.
        criterion: a name of `baselines.CRITERIA`, or a module: logits, target (N, H, W) to a loss.
        criterion_options: for `baselines.build_criterion`. p = 1.3 and ratio = 0.25 if loss max-pooling gets none.
        lr: at the first step (section 5.2: 2.5e-4).
        momentum, power: of SGD, and of the decay (section 5.1: both 0.9).
        weight_decay: DeepLabV2's; the paper names none.
        tiles: validation images are cut into so many (rows, columns), (1, 5) in the paper; None: whole.
        overlap: of neighbouring tiles in pixels: 0, "efficient", or 200, "optimised" (section 5.2).
    """

    def __init__(
        self,
        classes: list[str],
        ignore_index: int = 255,
        model: nn.Module | str = "deeplabv2",
        model_options: dict[str, Any] | None = None,
        criterion: nn.Module | str = "pooling",
        criterion_options: dict[str, Any] | None = None,
        lr: float = 2.5e-4,
        momentum: float = loop.MOMENTUM,
        power: float = loop.POWER,
        weight_decay: float = 5e-4,
        tiles: tuple[int, int] | None = None,
        overlap: int = 0,
    ) -> None:
        super().__init__()
        self.classes, self.ignore_index = classes, ignore_index
        if isinstance(model, str):
            model = _build("model", models.build, model, model_options, classes=len(classes))
        self.model = model
        if isinstance(criterion, str) and criterion not in baselines.CRITERIA:
            raise ValueError(f"criterion must be one of {tuple(baselines.CRITERIA)}, got {criterion!r}")
        self.criterion: nn.Module | None = None  # until `setup`, if it waits for counts
        self._criterion_options = criterion_options
        if not isinstance(criterion, str):
            self.criterion = criterion
        elif criterion != "inverse-median-frequency":
            self.criterion = self._build_criterion(criterion)
        self.lr, self.momentum, self.power, self.weight_decay = lr, momentum, power, weight_decay
        self.tiling = None if tiles is None else tiling.Tiling(count=tiles, overlap=(0, overlap))
        self.iou = IoU(len(classes), ignore_index)

    def setup(self, stage: str) -> None:
        """Inverse median frequency wants the counts of the training set."""
        if self.criterion is None:
            counts = self.trainer.datamodule.index.counts
            self.criterion = self._build_criterion("inverse-median-frequency", counts=counts)

    def _build_criterion(self, name: str, **given: Any) -> nn.Module:
        given["ignore_index"] = self.ignore_index
        return _build("criterion", baselines.build_criterion, name, self._criterion_options, **given)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, as the model gives them."""
        return self.model(images)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, target = batch
        logits = self.model(images)
        if isinstance(self.criterion, baselines.Criterion):
            loss, statistics = self.criterion(logits, target, return_stats=True)
        else:
            assert self.criterion is not None
            loss, statistics = self.criterion(logits, target), {}
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if isinstance(sampler, ComplementarySampler):
            sampler.observe(logits.detach().argmax(dim=1), target)
        self.log_dict({"loss": loss.detach(), **statistics}, prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Count hits and misses."""
        images, target = batch
        self.iou.update(tiling.predict(self.model, images, self.tiling), target)

    def on_validation_epoch_end(self) -> None:
        """Log the IoU."""
        iou = self.iou.compute()
        self.log("miou", iou["mean"].float(), prog_bar=True)
        self.log_dict(
            {f"iou/{name}": value for name, value in zip(self.classes, iou["per_class"].float(), strict=True)}
        )
        self.iou.reset()

    def configure_optimizers(self) -> Any:
        """SGD and the poly schedule over all steps of the run."""
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = loop.poly_sgd(
            self.parameters(),
            steps,
            self.lr,
            momentum=self.momentum,
            power=self.power,
            weight_decay=self.weight_decay,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the random generator of the CPU, for models that draw from it."""
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again when the training starts."""
        self._random_state = checkpoint.get("random_state")

    def on_train_start(self) -> None:
        """See `on_load_checkpoint`."""
        state = getattr(self, "_random_state", None)
        if state is not None:
            torch.set_rng_state(state)


def _build(
    kind: str, build: Callable[..., nn.Module], name: str, options: dict[str, Any] | None, **given: Any
) -> nn.Module:
    """What goes by a name; a recipe's options may be left over from another."""
    try:
        return build(name, **{**given, **(options or {})})
    except TypeError as error:
        raise TypeError(f"{kind}_options are not of {name!r} (null takes a recipe's away): {error}") from None
