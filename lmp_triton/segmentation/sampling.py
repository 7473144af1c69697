"""Complementary sampling (section 4 of the paper): train more often where a class does badly.

The paper blends uniform sampling with "inverse sampling" by the IoU of the classes on the training data, and gives
neither the blend nor a formula. Here each draw is, with probability `blend`, made for a class: class c with a
probability ∝ 1/max(IoU_c, floor), then an image that holds it, then a pixel of that class in it, each uniformly; the
crop is laid around that pixel. Nothing is drawn twice to be rejected. The other draws are images in a shuffled order,
cropped anywhere.
"""

from __future__ import annotations

import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import DistributedSampler

from .metrics import IoU

__all__ = ["MODES", "ClassIndex", "ComplementarySampler", "Draw"]

MODES = ("uniform", "class-uniform", "inverse-iou")


class Draw(NamedTuple):
    """What a sampler yields in place of an index, and a dataset takes: an image, a place in it, a seed.

    The place is named by its class and its rank: with `label` 11 and `ordinal` 7 it is pixel 7, in reading order from
    0, of the pixels of class 11. So every pixel can be drawn while an index holds one number an image and class, not a
    list of all pixels (6·10⁹ in Cityscapes).
    """

    image: int
    """Its number in the dataset."""
    label: int = -1
    """The class that the draw is made for, or -1: any place will do."""
    ordinal: int = 0
    """Which pixel of that class, from 0, in reading order."""
    seed: int = 0
    """Of what is random in preparing the item: the same draw gives the same item in any process."""

    def pixel(self, target: ArrayLike) -> tuple[int, int] | None:
        """The row and column of the place in target (H, W); None if any will do.

        Raises:
            IndexError: target has too few pixels of the class: it is not the one that the index was built on.
        """
        if self.label < 0:
            return None
        array = np.asarray(target)
        places = np.flatnonzero(array == self.label)
        if self.ordinal >= len(places):
            raise IndexError(
                f"image {self.image} has {len(places)} pixels of class {self.label}, but pixel {self.ordinal} was "
                "drawn: the ClassIndex was built on other data"
            )
        row, column = divmod(int(places[self.ordinal]), array.shape[1])
        return row, column


class Readable(Protocol):
    """What an index is built on; the classes of `lmp_triton.segmentation.datasets` are such."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names, in the order of their indices."""

    @property
    def ignore_index(self) -> int:
        """The label of pixels that take no part."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and target (H, W) as stored; an error that names the file if they are bad."""

    def fingerprint(self) -> str:
        """Changes when the data do; hexadecimal digits."""


@dataclass(frozen=True)
class ClassIndex:
    """Which images hold which class, and how often."""

    counts: NDArray[np.int64]
    """(images, classes): the number of pixels of each class in each image."""

    @classmethod
    def of(cls, targets: Iterable[ArrayLike], classes: int, ignore_index: int = 255) -> ClassIndex:
        """Count label maps (H, W) that are at hand, integers in [0, classes) or ignore_index.

        Raises:
            ValueError: a label is neither, or there are no targets.
        """
        return cls._of_rows([_count(target, classes, ignore_index, f"target {i}") for i, target in enumerate(targets)])

    @classmethod
    def build(
        cls, dataset: Readable, *, cache: str | Path | None = None, progress: bool = True, threads: int | None = None
    ) -> ClassIndex:
        """Read a dataset once, every image and label map wholly, and count.

        So a bad file stops a training before it starts. With a cache that happens once for the same files. Warns of
        classes that no pixel has: masks of 0 and 255, say, whose 255 is taken for ignored.

        Args:
            dataset: one of `lmp_triton.segmentation.datasets`, or like it.
            cache: a folder, made if missing; in it a file named after the dataset's fingerprint. None: no cache.
            progress: show a bar on standard error.
            threads: that read and decode. Default: one a core, at most 16.

        Raises:
            DatasetError, or what else the dataset raises for a bad file; the first one in its order.
            ValueError: the dataset is empty.
        """
        shape = (len(dataset), len(dataset.classes))
        file = None
        if cache is not None:
            file = Path(cache) / f"classes-{dataset.fingerprint()}.npz"
            counts = _load(file, shape)
            if counts is not None:
                return cls(counts)._warned(dataset.classes)

        def count(index: int) -> NDArray[np.int64]:
            _, target = dataset.read(index)
            return _count(target, shape[1], dataset.ignore_index, f"target {index}")

        executor = ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1))
        try:
            index = cls._of_rows(list(_track(executor.map(count, range(shape[0])), shape[0], progress)))
        finally:
            executor.shutdown(cancel_futures=True)
        if file is not None:
            _save(file, index.counts)
        return index._warned(dataset.classes)

    @classmethod
    def _of_rows(cls, rows: list[NDArray[np.int64]]) -> ClassIndex:
        if not rows:
            raise ValueError("the dataset is empty")
        return cls(np.stack(rows))

    def _warned(self, classes: tuple[str, ...]) -> ClassIndex:
        lacking = [name for name, pixels in zip(classes, self.pixels, strict=True) if not pixels]
        if lacking:
            warnings.warn(f"no image holds a pixel of {', '.join(lacking)}: are the labels right?", stacklevel=3)
        return self

    @property
    def pixels(self) -> NDArray[np.int64]:
        """(classes,): the number of pixels of each class in the whole set."""
        return self.counts.sum(axis=0)

    def images(self, label: int) -> NDArray[np.int64]:
        """The images that hold a class, in ascending order."""
        return np.flatnonzero(self.counts[:, label])


class ComplementarySampler(DistributedSampler[Draw]):
    """Yields `Draw`s: for a DataLoader, with any number of workers, on one rank or several.

        index = ClassIndex.build(dataset, cache=".cache")
        sampler = ComplementarySampler(index, blend=0.5)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=4)
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for images, target in loader:
                logits = model(images)
                ...
                sampler.observe(logits.argmax(dim=1), target)

    It is a DistributedSampler (so Lightning leaves it in place): the ranks take turns in one sequence, which wraps
    around, or is cut with drop_last, to be the same length for all. With blend = 0 or mode "uniform" an epoch is every
    image once. Draw k of an epoch depends on seed, epoch, k and the IoU known when it is made, on nothing else: worker
    processes, ranks and a restart change nothing, but workers draw some batches ahead, with the IoU of then.

    Args:
        index: of the dataset.
        mode: "inverse-iou" (the paper's): class c has a probability ∝ 1/max(IoU_c, floor); a class whose IoU is not
            known yet counts as one of 0. "class-uniform": every class the same. "uniform": all draws are uniform over
            images. Classes that no image holds are never drawn.
        blend: the share of the draws made for a class, in [0, 1]. The paper says "blending" and no more; 0.5 is ours.
        floor: in (0, 1]. No class is drawn more than 1/floor times as often as another. 0.1 is ours.
        length: draws an epoch, of all ranks together. Default: the number of images.
        decay, refresh: the IoU is that of about the last 1/(1 − decay) batches, and is looked at every `refresh`
            batches: one host sync and, over several ranks, one exchange then.
        num_replicas, rank: default: those of torch.distributed if it is initialised, else one.
        seed: of all draws.
        drop_last: see `torch.utils.data.DistributedSampler`.

    Raises:
        ValueError: an argument is out of range, or no image of the index holds any class.
    """

    def __init__(
        self,
        index: ClassIndex,
        *,
        mode: str = "inverse-iou",
        blend: float = 0.5,
        floor: float = 0.1,
        length: int | None = None,
        decay: float = 0.99,
        refresh: int = 50,
        ignore_index: int = 255,
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        images, classes = index.counts.shape
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        for name, value, fits, must in (
            ("blend", blend, 0 <= blend <= 1, "in [0, 1]"),
            ("floor", floor, 0 < floor <= 1, "in (0, 1]"),
            ("refresh", refresh, refresh >= 1, "at least 1"),
            ("seed", seed, seed >= 0, "at least 0"),
            ("length", length, length is None or length >= 1, "at least 1"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {must}, got {value}")
        if not index.counts.any():
            raise ValueError("no image of the index holds a pixel of any class: all pixels are ignored")
        distributed = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if distributed else 1
        if rank is None:
            rank = dist.get_rank() if distributed else 0
        self.length = images if length is None else length
        super().__init__(range(self.length), num_replicas, rank, True, seed, drop_last)  # type: ignore[arg-type]
        self.index, self.mode, self.floor, self.refresh = index, mode, floor, refresh
        self.blend = 0.0 if mode == "uniform" else blend
        self.position = 0
        self.iou = np.full(classes, np.nan)
        self._updates = 0
        self._metric = IoU(classes, ignore_index, decay=decay)
        self._held = [index.images(label) for label in range(classes)]
        self._order: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """The probability of each class at present, if a draw is made for a class: (classes,), sums to 1."""
        weights = np.ones(len(self.iou))
        if self.mode == "inverse-iou":
            weights = 1 / np.maximum(np.nan_to_num(self.iou, nan=0.0), self.floor)
        weights = np.where([len(images) > 0 for images in self._held], weights, 0.0)
        return weights / weights.sum()

    @torch.no_grad()
    def observe(self, predictions: Tensor, target: Tensor) -> None:
        """Tell the sampler how the network did on a batch; every rank calls it equally often.

        Args:
            predictions: (N, h, w), classes. May be coarser than the target, which is then read at the nearest pixels:
                no need to upsample logits for this.
            target: (N, H, W).
        """
        for dim in (1, 2):
            small, large = predictions.shape[dim], target.shape[dim]
            if small != large:
                nearest = (2 * torch.arange(small, device=target.device) + 1) * large // (2 * small)
                target = target.index_select(dim, nearest)
        if self._metric.device != predictions.device:
            self._metric.to(predictions.device)
        self._metric.update(predictions, target)
        self._updates += 1
        if self._updates % self.refresh == 0:
            self.iou = self._metric.compute()["per_class"].cpu().numpy()

    def __iter__(self) -> Iterator[Draw]:
        if self.position >= self.num_samples:
            self.position = 0
        while self.position < self.num_samples:
            place = self.position * self.num_replicas + self.rank
            self.position += 1
            yield self._draw(place % self.length)

    def _draw(self, place: int) -> Draw:
        random = np.random.default_rng([self.seed, self.epoch, place])
        seed = int(random.integers(2**62))
        if random.random() < self.blend:
            label = int(random.choice(len(self._held), p=self.probabilities))
            image = int(random.choice(self._held[label]))
            return Draw(image, label, int(random.integers(self.index.counts[image, label])), seed)
        round_, which = divmod(place, len(self.index.counts))
        return Draw(int(self._permutation(round_)[which]), seed=seed)

    def _permutation(self, round_: int) -> NDArray[np.int64]:
        """The order of the images in an epoch's round over them (one, unless `length` says otherwise)."""
        key = (self.epoch, round_)
        if self._order is None or self._order[0] != key:
            order = np.random.default_rng([self.seed, *key, len(self.index.counts)])
            self._order = key, order.permutation(len(self.index.counts))
        return self._order[1]

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch; does nothing if the sampler is in it already, so that a restored one goes on inside."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """What a checkpoint needs for a restored sampler to go on: numbers and tensors.

        Args:
            consumed: the draws of this epoch that this rank has trained on. Default: all that were made; a DataLoader
                with workers makes some batches ahead, which would then be left out after a restart.
        """
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position if consumed is None else consumed,
            "updates": self._updates,
            "iou": torch.from_numpy(self.iou).clone(),
            "confmat": self._metric.confmat.cpu().clone(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the sampler left off that saved this. Mode, blend and the like stay those of this one.

        Of several ranks one usually saves: the others then go on with its counts, which fade as any do.
        """
        if state_dict.keys() != self.state_dict().keys():
            wrong = sorted(state_dict.keys() ^ self.state_dict().keys())
            raise ValueError(f"not a state_dict of ComplementarySampler: missing or unknown keys {wrong}")
        if state_dict["confmat"].shape != self._metric.confmat.shape:
            raise ValueError(f"the state_dict is of {len(state_dict['iou'])} classes, the index of {len(self.iou)}")
        self.seed, self.epoch, self.position = (int(state_dict[key]) for key in ("seed", "epoch", "position"))
        self._updates = int(state_dict["updates"])
        self.iou = state_dict["iou"].double().cpu().numpy().copy()
        self._metric.confmat = state_dict["confmat"].to(self._metric.device, copy=True)
        self._order = None


def _count(target: ArrayLike, classes: int, ignore_index: int, name: str) -> NDArray[np.int64]:
    labels = np.asarray(target).ravel()
    labels = labels[labels != ignore_index].astype(np.int64, copy=False)
    if labels.size and not (labels.min() >= 0 and labels.max() < classes):
        bad = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"{name} has the label {bad}, not in [0, {classes}) and not ignore_index = {ignore_index}")
    return np.bincount(labels, minlength=classes)


def _track(rows: Iterator[NDArray[np.int64]], total: int, progress: bool) -> Iterable[NDArray[np.int64]]:
    if not progress:
        return rows
    from rich.console import Console
    from rich.progress import track

    return track(rows, "reading every image once", total=total, console=Console(stderr=True))


def _load(file: Path, shape: tuple[int, int]) -> NDArray[np.int64] | None:
    """The cached counts; None if there are none, or the file is not whole."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            counts = arrays["counts"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return counts if counts.shape == shape and counts.dtype == np.int64 else None


def _save(file: Path, counts: NDArray[np.int64]) -> None:
    """Write whole or not at all: other processes may be reading, or writing the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as stream:
            np.savez_compressed(stream, counts=counts)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
