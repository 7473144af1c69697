"""The picture: one held-out block seen by both networks, and how they did on all held-out blocks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from .scene import BLOCK, CLASSES, Scene, class_shares, place

__all__ = ["View", "draw"]

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


class View(NamedTuple):
    """One held-out block, BLOCK by BLOCK pixels."""

    corner: tuple[int, int]
    """Row and column of its upper left pixel in the scene."""
    predictions: dict[str, NDArray[np.int64]]
    """For each loss the classes that the network trained with it sees."""
    losses: NDArray[np.float32]
    """Cross-entropy of every pixel, by the network trained with loss max-pooling."""
    weights: NDArray[np.float32]
    """w* of these losses, as multiples of 1/n, which is the weight of every pixel in the mean."""


def draw(path: Path, scene: Scene, view: View, ious: dict[str, NDArray[np.float64]], caption: str) -> None:
    """Save the picture as a PNG.

    Args:
        path: where to.
        scene: the scene.
        view: what to show of it.
        ious: for each loss the IoU of every class over all held-out blocks, 0 to 1 or NaN, shape (classes,).
        caption: how it was made, in a line.
    """
    figure = Figure(figsize=(18, 9.2), dpi=120, layout="constrained")
    figure.suptitle("Cross-entropy and loss max-pooling, side by side", x=0.004, ha="left", fontsize=19, weight="bold")
    figure.supxlabel(caption, x=0.004, ha="left", fontsize=12, color="0.35")
    left, right = figure.subfigures(1, 2, width_ratios=(2.45, 1), squeeze=False)[0]
    upper, lower = right.subfigures(2, 1, height_ratios=(1, 2.7), squeeze=False)[:, 0]
    _draw_view(left, scene, view)
    _draw_world(upper.subplots(), scene, view.corner)
    _draw_ious(lower, scene, ious)
    figure.savefig(path)


def _draw_view(figure: SubFigure, scene: Scene, view: View) -> None:
    (image, first, losses), (truth, second, weights) = figure.subplots(2, 3)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    block = tuple(slice(start, start + BLOCK) for start in view.corner)

    _title(image, f"image: 10° by 10° around {place(view.corner)}")
    image.imshow(_photograph(scene.inputs[:, *block]))
    _title(truth, "land cover (the label)")
    _draw_classes(truth, scene.labels[block].numpy())
    for axes, (name, prediction) in zip((first, second), view.predictions.items(), strict=True):
        _title(axes, f"prediction after {name}")
        _draw_classes(axes, prediction)

    _title(losses, "loss ℓ of every pixel (nats)")
    _draw_values(losses, view.losses, "magma", Normalize(0, float(np.quantile(view.losses, 0.995))))
    _title(weights, "weight w* of every pixel (the mean gives each 1)")
    _draw_values(weights, view.weights, "RdBu_r", TwoSlopeNorm(1, 0, max(view.weights.max(), 1.01)))


def _draw_classes(axes: Axes, classes: NDArray[np.integer]) -> None:
    axes.imshow(classes, cmap=ListedColormap(COLOURS), vmin=0, vmax=len(CLASSES) - 1, interpolation="nearest")


def _draw_values(axes: Axes, values: NDArray[np.floating], colours: str, norm: Normalize) -> None:
    image = axes.imshow(values, cmap=colours, norm=norm, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)


def _draw_world(axes: Axes, scene: Scene, corner: tuple[int, int]) -> None:
    _title(axes, "the scene: held-out blocks bright, this one red")
    axes.set(xticks=[], yticks=[])
    step = 5  # the map is some 500 pixels wide
    brightness = np.where(scene.held_out[::step, ::step, None].numpy(), 1.0, 0.4)
    axes.imshow(_photograph(scene.inputs[:, ::step, ::step]) * brightness)
    row, column = (start / step for start in corner)
    axes.add_patch(Rectangle((column, row), BLOCK / step, BLOCK / step, fill=False, color="red", linewidth=2))


def _draw_ious(figure: SubFigure, scene: Scene, ious: dict[str, NDArray[np.float64]]) -> None:
    """Bars, the commonest class first; the swatches beside the names are the legend of the maps."""
    figure.suptitle("classes, with their share of the held-out pixels", x=0.01, ha="left", fontsize=11.5)
    axes = figure.subplots()
    shares = class_shares(scene)
    order = np.argsort(-shares)
    places = np.arange(len(order))
    for offset, (name, iou), tone in zip((-0.2, 0.2), ious.items(), ("0.65", "0.2"), strict=True):
        label = f"{name} (mean {100 * np.nanmean(iou):.1f})"
        axes.barh(places + offset, 100 * iou[order], height=0.38, color=tone, label=label)
    for position, c in zip(places, order, strict=True):
        swatch = Rectangle((-0.11, position - 0.38), 0.08, 0.76, facecolor=COLOURS[c], edgecolor="0.4", linewidth=0.6)
        swatch.set(transform=axes.get_yaxis_transform(), clip_on=False)
        axes.add_patch(swatch)
    axes.set_yticks(places, [f"{CLASSES[c]}  {100 * shares[c]:.2g} %" for c in order])
    axes.tick_params(axis="y", length=0, pad=26)
    axes.set(xlim=(0, 100), ylim=(len(order) - 0.4, -0.6), xlabel="IoU over all held-out blocks (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, handlelength=1)


def _photograph(inputs: Tensor) -> NDArray[np.floating]:
    """The image among the channels of the scene, (H, W, 3) from 0 to 1, brightened: Blue Marble is dark on paper."""
    return (inputs[:3].permute(1, 2, 0).numpy() / 255) ** 0.7


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5)
