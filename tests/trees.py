"""Tiny data sets in the folders and files of the real ones."""

from pathlib import Path

import numpy as np
from PIL import Image


def image(file: Path, size=(24, 16), seed=0):
    """Noise, size = (width, height); PNG or JPEG by the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)


def mask(file: Path, labels, mode="L"):
    """Labels (H, W) of 8 bits; mode P has a palette, as Pascal VOC's have."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(labels, np.uint8))
    if mode == "P":
        picture.putpalette([7 * i % 256 for i in range(768)])
    picture.save(file)


def stripes(values, size=(24, 16)):
    """A label map of vertical stripes, one for each value, equally wide."""
    columns = np.repeat(np.asarray(values), -(-size[0] // len(values)))[: size[0]]
    return np.tile(columns, (size[1], 1))


def cityscapes(root: Path, split="train", ids=((7, 8, 4, 33), (7, 26, 24, 31)), size=(24, 16)):
    """A city with two scenes and another with one; `ids` are the labels' ids of scene i modulo its length."""
    for i, scene in enumerate(("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "bochum/bochum_000000_0")):
        image(root / "leftImg8bit" / split / f"{scene}_leftImg8bit.png", size, i)
        mask(root / "gtFine" / split / f"{scene}_gtFine_labelIds.png", stripes(ids[i % len(ids)], size))
    return root


def voc(root: Path, train=("2007_000032", "2007_000039"), val=("2007_000033",), size=(24, 16)):
    """Pascal VOC 2012: background, a class that differs from image to image, the outline (255)."""
    devkit = root / "VOCdevkit" / "VOC2012"
    for i, name in enumerate((*train, *val)):
        image(devkit / "JPEGImages" / f"{name}.jpg", size, i)
        mask(devkit / "SegmentationClass" / f"{name}.png", stripes((0, 255, 1 + i), size), "P")
    lists = devkit / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    for split, names in (("train", train), ("val", val), ("trainval", (*train, *val))):
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def sbd(root: Path, train=("2008_000002", "2007_000032"), val=("2007_000033", "2008_000008"), size=(24, 16)):
    """The Semantic Boundaries Dataset: .mat files; two of its images are Pascal VOC's as well."""
    from scipy.io import savemat

    (root / "cls").mkdir(parents=True, exist_ok=True)
    for i, name in enumerate((*train, *val)):
        image(root / "img" / f"{name}.jpg", size, 10 + i)
        labels = stripes((0, 15 + i), size).astype(np.uint8)
        savemat(root / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels, "CategoriesPresent": 15 + i}})
    for split, names in (("train", train), ("val", val)):
        (root / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def folder(root: Path, labels=((0, 1, 2), (0, 255, 1), (2, 0, 0)), size=(24, 16)):
    """root/images/*.jpg and root/masks/*.png."""
    for i, values in enumerate(labels):
        image(root / "images" / f"scene {i}.jpg", size, i)
        mask(root / "masks" / f"scene {i}.png", stripes(values, size))
    return root
