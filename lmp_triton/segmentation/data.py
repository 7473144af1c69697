"""Any of the datasets as data for PyTorch Lightning: augmentation, complementary sampling, loaders that resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning
from torch import Tensor
from torch.utils.data import DataLoader

from . import digits, transforms
from .datasets import Arrays, SegmentationDataset
from .sampling import MODES, ClassIndex, ComplementarySampler

__all__ = ["Digits", "LandCover", "ResumableLoader", "SegmentationData"]

Item = tuple[Tensor, Tensor]


class ResumableLoader(DataLoader[Item]):
    """A DataLoader over a `ComplementarySampler` whose state Lightning saves: a resumed epoch goes on inside.

    What worker processes made ahead does not count as done, so that no batch is left out or seen twice.
    """

    _first = 0
    _batches = 0

    def __iter__(self) -> Iterator[Item]:  # type: ignore[override]
        """The batches of the epoch that are still to come."""
        sampler = self.sampler
        assert isinstance(sampler, ComplementarySampler)
        self._first, self._batches = sampler.position % sampler.num_samples, 0
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The state of the sampler, as far as batches were handed out."""
        assert isinstance(self.sampler, ComplementarySampler)
        return self.sampler.state_dict(self._first + self._batches * (self.batch_size or 1))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there with the next `iter`."""
        assert isinstance(self.sampler, ComplementarySampler)
        self.sampler.load_state_dict(state_dict)


class SegmentationData(lightning.LightningDataModule):
    """Training crops, augmented and sampled as in the paper, and validation images.

    Before the first step every file, of `val` too, is read once (`ClassIndex.build`): a bad one is named then.

    Args:
        train: what to train on; its transform becomes `transforms.training(crop, …)`.
        val: what to measure on; its transform becomes `transforms.evaluation(…)`. None: nothing is measured.
        crop: side of a training crop in pixels (section 5.2: 550 for Cityscapes; 5.3: 321 for Pascal VOC).
        batch_size: crops a step and rank (2 and 4).
        scale: a crop is scaled by a factor between these (section 5.1).
        flip: probability of a horizontal flip.
        mean, std: of each channel of an image from 0 to 1; default those of ImageNet.
        sampling: "inverse-iou" (the paper's LMP and BASE+), "class-uniform", or "uniform" (BASE).
        blend: the share of the draws made for a class, see `ComplementarySampler`.
        val_batch_size: images a batch in validation; more than 1 only if all are of one size.
        num_workers: processes that read and augment.
        cache: a folder for the counts of the classes, so that the files are read once for several runs.
        seed: of sampling and augmentation.
    """

    def __init__(
        self,
        train: SegmentationDataset,
        val: SegmentationDataset | None = None,
        *,
        crop: int = 321,
        batch_size: int = 4,
        scale: tuple[float, float] = (0.5, 1.5),
        flip: float = 0.5,
        mean: Sequence[float] = transforms.MEAN,
        std: Sequence[float] = transforms.STD,
        sampling: str = "inverse-iou",
        blend: float = 0.5,
        val_batch_size: int = 1,
        num_workers: int = 4,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if val is not None and val.classes != train.classes:
            raise ValueError("train and val must have the same classes")
        if sampling not in MODES:
            raise ValueError(f"sampling must be one of {MODES}, got {sampling!r}")
        if not 0 <= blend <= 1:
            raise ValueError(f"blend must be in [0, 1], got {blend}")
        train.transform = transforms.training(
            crop, scale=scale, flip=flip, mean=mean, std=std, ignore_index=train.ignore_index
        )
        if val is not None:
            val.transform = transforms.evaluation(mean=mean, std=std)
        self.train, self.val = train, val
        self.classes, self.ignore_index = list(train.classes), train.ignore_index
        self.batch_size, self.val_batch_size, self.num_workers = batch_size, val_batch_size, num_workers
        self.sampling, self.blend, self.cache, self.seed = sampling, blend, cache, seed
        self._index: ClassIndex | None = None

    @property
    def index(self) -> ClassIndex:
        """Which training image holds which class; the first time, all of them are read."""
        if self._index is None:
            self._index = ClassIndex.build(self.train, cache=self.cache)
        return self._index

    def prepare_data(self) -> None:
        """Read everything once, on one process a machine; the others find the cache."""
        if self.cache is not None:
            self._read()

    def setup(self, stage: str) -> None:
        """The same where there is no cache."""
        if stage == "fit" and self.cache is None:
            self._read()

    def _read(self) -> None:
        self._index = ClassIndex.build(self.train, cache=self.cache)
        if self.val is not None:
            ClassIndex.build(self.val, cache=self.cache)

    def train_dataloader(self) -> ResumableLoader:
        """An epoch is as many draws as there are images, and at least a batch a rank."""
        ranks = self.trainer.world_size if self.trainer is not None else 1
        sampler = ComplementarySampler(
            self.index,
            mode=self.sampling,
            blend=self.blend,
            length=max(len(self.train), self.batch_size * ranks),
            ignore_index=self.ignore_index,
            seed=self.seed,
        )
        return ResumableLoader(
            self.train,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=True,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> DataLoader[Item] | list[Any]:
        """The validation images in their order."""
        if self.val is None:
            return []
        return DataLoader(self.val, self.val_batch_size, num_workers=self.num_workers)


class Digits(Arrays):
    """Composed digits (`ComposedDigits`, its arguments) as a dataset of this package."""

    def __init__(self, train: bool = True, *, canvases: int = 1200, size: int = 64, seed: int = 0) -> None:
        made = digits.ComposedDigits(train, canvases=canvases, size=size, seed=seed)
        super().__init__(made.images, made.labels, digits.CLASSES, transform=transforms.evaluation(mean=[0], std=[1]))


class LandCover(Arrays):
    """The land-cover scene of the demo as blocks of 10° by 10°, 150 by 150 pixels: 7 channels, 17 classes.

    It needs the two data packages that `lmp-triton demo --scene land-cover` names.

    Args:
        train: the training blocks, or the held-out ones.
        blocks: take the first so many only.
    """

    def __init__(self, train: bool = True, *, blocks: int | None = None) -> None:
        from lmp_triton.demo import land_cover

        world = land_cover.load_world()
        size = land_cover.BLOCK
        held_out = world.held_out[::size, ::size]
        corners = (held_out != train).nonzero().numpy()[:blocks] * size
        images, labels = land_cover.cut(world, corners, size)
        evaluation = transforms.evaluation(mean=[0] * land_cover.CHANNELS, std=[1] * land_cover.CHANNELS)
        super().__init__(images, labels.byte(), land_cover.CLASSES, transform=evaluation)
