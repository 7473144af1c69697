"""Cityscapes, Pascal VOC, folders of images and masks, arrays: items (image, target) for training and measuring.

A dataset finds its files when it is made and says which is missing. That every file is whole, every image as large as
its label map and every label known is seen when the file is read: `sampling.ClassIndex.build(dataset)` reads them all,
once, before a training starts.
"""

from __future__ import annotations

import hashlib
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from . import transforms
from .sampling import Draw

__all__ = ["Arrays", "Cityscapes", "DatasetError", "Folder", "PascalVOC", "SegmentationDataset"]

IGNORE_INDEX = 255
UNKNOWN = np.iinfo(np.int32).min
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class DatasetError(ValueError):
    """The data are not as they must be; the message begins with the file or folder."""


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]], ABC):
    """What the datasets have in common: items (image, target).

    `dataset[3]` is item 3, and `dataset[draw]` the item that a `Draw` names, cropped at its place and augmented with
    its seed, if `transform` does such things. The image is float32 (channels, H, W), the target int64 (H, W).

    Args:
        classes: names, in the order of their indices.
        transform: of torchvision.transforms.v2, see `transforms.training`. Default: `transforms.evaluation()`.
        ignore_index: the label of pixels that take no part.
    """

    def __init__(
        self, classes: Sequence[str], transform: Callable[..., Any] | None, ignore_index: int = IGNORE_INDEX
    ) -> None:
        self.classes = tuple(classes)
        self.transform = transforms.evaluation() if transform is None else transform
        self.ignore_index = ignore_index

    @abstractmethod
    def __len__(self) -> int:
        """How many images."""

    @abstractmethod
    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (channels, H, W) and target (H, W), integers, as stored but for the labels' names.

        Raises:
            DatasetError: a file cannot be read, has an unknown label, or is not of the other's size.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A name for the state of the data: for files their paths, sizes and times; not what is in them."""

    def __getitem__(self, key: int | Draw) -> tuple[Tensor, Tensor]:
        """Return the item of a number, or of a draw."""
        draw = key if isinstance(key, Draw) else None
        image, target = self.read(key if draw is None else draw.image)  # type: ignore[arg-type]
        if draw is None:
            return transforms.apply(self.transform, image, target)
        return transforms.apply(self.transform, image, target, draw.pixel(target), draw.seed)


class Files(SegmentationDataset):
    """A dataset of pairs of files.

    Args:
        pairs: image and label map of each item.
        labels: what is stored → index of the class, or ignore_index. Any other label is an error.
        classes, transform, ignore_index: see `SegmentationDataset`.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        labels: Mapping[int, int],
        classes: Sequence[str],
        transform: Callable[..., Any] | None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(classes, transform, ignore_index)
        self.pairs = list(pairs)
        self.labels = dict(labels)
        if not self.pairs:
            raise DatasetError("no image at all")
        for path in (path for pair in self.pairs for path in pair):
            if not path.is_file():
                raise DatasetError(f"{path}: no such file")
        for label, index in self.labels.items():
            if label < 0 or not (0 <= index < len(self.classes) or index == ignore_index):
                raise ValueError(
                    f"labels must map integers from 0 on to [0, {len(self.classes)}) or ignore_index = {ignore_index}, "
                    f"got {label} → {index}"
                )
        # One entry more, for all labels beyond the largest known and, as entry -1, below 0.
        self._table = np.full(max(self.labels, default=0) + 2, UNKNOWN, np.int32)
        self._table[list(self.labels)] = list(self.labels.values())
        bytes_do = all(0 <= index <= 255 for index in self.labels.values())
        self._dtype = np.dtype(np.uint8 if bytes_do else np.int32)

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """See `SegmentationDataset.read`."""
        image_file, target_file = self.pairs[index]
        image = torch.from_numpy(_read_image(image_file)).permute(2, 0, 1)
        stored = self._read_labels(target_file)
        if image.shape[1:] != stored.shape:
            raise DatasetError(
                f"{target_file}: the label map has {_size(stored.shape)} pixels (width × height), "
                f"but its image {image_file} has {_size(tuple(image.shape[1:]))}"
            )
        return image, torch.from_numpy(self._translate(stored, target_file))

    def _read_labels(self, file: Path) -> NDArray[Any]:
        return _read_labels(file)

    def _translate(self, stored: NDArray[Any], file: Path) -> NDArray[Any]:
        """Stored labels to classes."""
        indices = self._table[np.clip(stored.astype(np.int32), -1, len(self._table) - 1)]
        unknown = indices == UNKNOWN
        if unknown.any():
            row, column = (int(x) for x in np.argwhere(unknown)[0])
            raise DatasetError(
                f"{file}: unknown label {stored[row, column]} at row {row}, column {column}; known are "
                f"{_ranges(sorted(self.labels))}"
            )
        return indices.astype(self._dtype)

    def fingerprint(self) -> str:
        """See `SegmentationDataset.fingerprint`."""
        digest = hashlib.sha256()
        digest.update(repr((self.classes, sorted(self.labels.items()), self.ignore_index)).encode())
        for path in (path for pair in self.pairs for path in pair):
            status = path.stat()
            digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:32]


class Cityscapes(Files):
    """Cityscapes as its archives unpack: 19 classes, the others ignored.

        root/leftImg8bit/{split}/{city}/*_leftImg8bit.png
        root/gtFine/{split}/{city}/*_gtFine_labelIds.png

    Args:
        root: the folder that holds these.
        split: "train" or "val" ("test" has no public labels), with mode "coarse" also "train_extra".
        mode: "fine" or "coarse" (gtCoarse).
        transform: see `SegmentationDataset`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        mode: str = "fine",
        transform: Callable[..., Any] | None = None,
    ) -> None:
        from torchvision.datasets import Cityscapes as Torchvision

        splits = {"fine": ("train", "val"), "coarse": ("train", "train_extra", "val")}
        if mode not in splits:
            raise ValueError(f"mode must be one of {tuple(splits)}, got {mode!r}")
        if split not in splits[mode]:
            raise ValueError(f"split must be one of {splits[mode]}, got {split!r}")
        kind = "gtFine" if mode == "fine" else "gtCoarse"
        folder = _folder(Path(root) / "leftImg8bit" / split)
        targets = _folder(Path(root) / kind / split)
        images = sorted(folder.glob("*/*_leftImg8bit.png"))
        if not images:
            raise DatasetError(f"{folder}: no file */*_leftImg8bit.png")
        pairs = [
            (image, targets / image.parent.name / image.name.replace("_leftImg8bit.png", f"_{kind}_labelIds.png"))
            for image in images
        ]
        known = [entry for entry in Torchvision.classes if entry.id >= 0]
        names = {entry.train_id: entry.name for entry in known if entry.train_id != IGNORE_INDEX}
        labels = {entry.id: entry.train_id for entry in known}
        super().__init__(pairs, labels, [names[index] for index in range(len(names))], transform)


class PascalVOC(Files):
    """Pascal VOC 2012, extended as usual by the Semantic Boundaries Dataset: 10582 images to train on, 1449 to test.

        root/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}
        sbd/{img,cls,train.txt,val.txt}

    The extended training set is VOC's with all of SBD's images that are not in VOC's validation set; where both have
    labels, VOC's are taken. 21 classes with the background; 255, the outlines, is ignored.

    Args:
        root: the folder that holds VOCdevkit.
        split: "train" or "val".
        sbd: the folder of SBD; None: VOC alone (1464 images to train on).
        download: let torchvision fetch what is not there.
        transform: see `SegmentationDataset`.
    """

    CLASSES = (
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "dining table",
        "dog",
        "horse",
        "motorbike",
        "person",
        "potted plant",
        "sheep",
        "sofa",
        "train",
        "tv monitor",
    )

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        sbd: str | Path | None = None,
        download: bool = False,
        transform: Callable[..., Any] | None = None,
    ) -> None:
        from torchvision.datasets import SBDataset, VOCSegmentation

        if split not in ("train", "val"):
            raise ValueError(f"split must be 'train' or 'val', got {split!r}")

        def voc(image_set: str) -> dict[str, tuple[Path, Path]]:
            lists = Path(root) / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
            if not download:
                _file(lists / f"{image_set}.txt")
            found = VOCSegmentation(root, "2012", image_set, download=download and not lists.is_dir())
            return _by_name(found.images, found.masks)

        pairs = voc(split)
        if split == "train" and sbd is not None:
            extension: dict[str, tuple[Path, Path]] = {}
            for image_set in ("train", "val"):
                if not download:
                    _file(Path(sbd) / f"{image_set}.txt")
                fetch = download and not (Path(sbd) / "cls").is_dir()
                found = SBDataset(sbd, image_set, mode="segmentation", download=fetch)
                extension |= _by_name(found.images, found.masks)
            held_out = voc("val").keys()
            pairs = {name: pair for name, pair in extension.items() if name not in held_out} | pairs
        labels = {**{index: index for index in range(len(self.CLASSES))}, IGNORE_INDEX: IGNORE_INDEX}
        super().__init__([pairs[name] for name in sorted(pairs)], labels, self.CLASSES, transform)

    def _read_labels(self, file: Path) -> NDArray[Any]:
        if file.suffix != ".mat":
            return _read_labels(file)
        from scipy.io import loadmat

        try:
            return np.asarray(loadmat(file)["GTcls"]["Segmentation"][0, 0])
        except Exception as error:  # scipy raises what the broken bytes lead it to
            raise DatasetError(f"{file}: not a label file of SBD: {error}") from error


class Folder(Files):
    """A folder of images and one of label maps of the same names: images/a.jpg and masks/a.png.

    An image has 8 bits a channel and is read as RGB. A label map is an image with one channel or a palette (of 8, 16 or
    32 bits), whose values are the labels.

    Args:
        images, masks: the folders.
        classes: names, in the order of their indices.
        labels: stored label → index of the class or ignore_index. Default: classes are stored as their index, and
            ignore_index as itself. For masks of 0 and 255, say: {0: 0, 255: 1}.
        mask_suffix: what a mask's name has after the image's and before its extension, such as "_mask".
        transform, ignore_index: see `SegmentationDataset`.
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        classes: Sequence[str],
        *,
        labels: Mapping[int, int] | None = None,
        mask_suffix: str = "",
        transform: Callable[..., Any] | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        image_files, mask_files = _files(Path(images)), _files(Path(masks))
        for name, file in image_files.items():
            if name + mask_suffix not in mask_files:
                raise DatasetError(f"{file}: no mask {name}{mask_suffix}.png or the like in {masks}")
        for name, file in mask_files.items():
            if not name.endswith(mask_suffix) or name.removesuffix(mask_suffix) not in image_files:
                raise DatasetError(f"{file}: no image of that name in {images}")
        if labels is None:
            labels = {index: index for index in range(len(classes))}
            if ignore_index >= 0:
                labels = {ignore_index: ignore_index, **labels}
        pairs = [(file, mask_files[name + mask_suffix]) for name, file in image_files.items()]
        super().__init__(pairs, labels, classes, transform, ignore_index)


class Arrays(SegmentationDataset):
    """Images and targets in memory.

    Args:
        images: uint8 (N, channels, H, W).
        targets: (N, H, W), integers in [0, classes) or ignore_index.
        classes, transform, ignore_index: see `SegmentationDataset`; a transform for images that are not RGB needs its
            own mean and std.

    Raises:
        ValueError: shapes, types or labels are not these.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        classes: Sequence[str],
        *,
        transform: Callable[..., Any] | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(classes, transform, ignore_index)
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"images must be uint8 (N, channels, H, W), got {images.dtype} of shape {tuple(images.shape)}"
            )
        if targets.is_floating_point() or targets.shape != (len(images), *images.shape[2:]):
            raise ValueError(
                f"targets must be integers of shape {(len(images), *images.shape[2:])}, "
                f"got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        wide = targets.long()
        bad = (wide != ignore_index) & ((wide < 0) | (wide >= len(self.classes)))
        if bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            raise ValueError(f"targets{place} = {int(targets[tuple(place)])} is not in [0, {len(self.classes)})")
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """See `SegmentationDataset.read`."""
        return self.images[index], self.targets[index]

    def fingerprint(self) -> str:
        """Of the targets and the number of classes."""
        digest = hashlib.sha256(repr((self.classes, self.ignore_index, tuple(self.targets.shape))).encode())
        digest.update(np.ascontiguousarray(self.targets.numpy()).tobytes())
        return digest.hexdigest()[:32]


def _folder(path: Path) -> Path:
    if not path.is_dir():
        parent = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise DatasetError(f"{path}: no such folder ({parent} exists)")
    return path


def _file(path: Path) -> Path:
    _folder(path.parent)
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    return path


def _files(folder: Path) -> dict[str, Path]:
    """The images in a folder by their names without extension, in alphabetical order."""
    found: dict[str, Path] = {}
    for file in sorted(_folder(folder).iterdir()):
        if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith("."):
            continue
        if file.stem in found:
            raise DatasetError(f"{file}: {found[file.stem].name} has the same name")
        found[file.stem] = file
    if not found:
        raise DatasetError(f"{folder}: no image in it ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _by_name(images: Sequence[str], masks: Sequence[str]) -> dict[str, tuple[Path, Path]]:
    return {Path(image).stem: (Path(image), Path(mask)) for image, mask in zip(images, masks, strict=True)}


BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are cut off or not images."""


def _read_image(file: Path) -> NDArray[np.uint8]:
    """RGB, (H, W, 3)."""
    try:
        with Image.open(file) as image:
            mode, array = image.mode, np.array(image.convert("RGB"))
    except BROKEN as error:
        raise DatasetError(f"{file}: cannot be read as an image: {error}") from error
    if mode[0] in "IF":  # Pillow cuts such values off at 255: nearly all is white
        raise DatasetError(f"{file}: an image of mode {mode}; it must have 8 bits a channel")
    return array


def _read_labels(file: Path) -> NDArray[Any]:
    """One integer a pixel, (H, W)."""
    try:
        with Image.open(file) as image:
            mode, array = image.mode, np.array(image)
    except BROKEN as error:
        raise DatasetError(f"{file}: cannot be read as a label map: {error}") from error
    if array.ndim != 2 or array.dtype.kind not in "biu":
        raise DatasetError(f"{file}: an image of mode {mode}; a label map has one integer a pixel (mode L, P or I)")
    return array


def _size(shape: ArrayLike) -> str:
    height, width = np.asarray(shape)
    return f"{width} × {height}"


def _ranges(labels: Sequence[int]) -> str:
    """0-18, 255."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and runs[-1][1] == label - 1:
            runs[-1][1] = label
        else:
            runs.append([label, label])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
