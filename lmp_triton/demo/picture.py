"""The picture: one held-out image seen by both networks, and how they did on all of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from .scene import Scene

__all__ = ["View", "draw", "part_of"]


class View(NamedTuple):
    """What is shown of the image `scene.shown`, H by W pixels."""

    predictions: dict[str, NDArray[np.int64]]
    """For each loss the classes that the network trained with it sees."""
    losses: NDArray[np.float32]
    """Cross-entropy of every pixel, by the network trained with loss max-pooling."""
    weights: NDArray[np.float32]
    """w* of these losses, as multiples of 1/n, which is the weight of every pixel in the mean."""


def draw(path: Path, scene: Scene, view: View, ious: dict[str, NDArray[np.float64]], caption: str) -> None:
    """Save the picture.

    Args:
        path: where to; its suffix says the type.
        scene: the scene.
        view: what to show of it.
        ious: for each loss the IoU of every class over all held-out images, 0 to 1 or NaN, shape (classes,).
        caption: how it was made, in a line.

    Raises:
        OSError: it could not be written, and what was there before still is.
    """
    figure = Figure(figsize=(18, 9.2), dpi=120, layout="constrained")
    figure.suptitle("Cross-entropy and loss max-pooling, side by side", x=0.004, ha="left", fontsize=19, weight="bold")
    figure.supxlabel(caption, x=0.004, ha="left", fontsize=12, color="0.35")
    left, right = figure.subfigures(1, 2, width_ratios=(2.45, 1), squeeze=False)[0]
    _draw_view(left, scene, view)
    if scene.has_overview:
        upper, right = right.subfigures(2, 1, height_ratios=(1, 2.7), squeeze=False)[:, 0]
        overview = upper.subplots()
        overview.set(xticks=[], yticks=[])
        scene.draw_overview(overview)
    _draw_ious(right, scene, ious)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix(".").lower())
    _write(path, picture.getvalue())


def part_of(path: Path) -> Path:
    """Where a picture is until it is whole."""
    return path.with_name(path.name + ".part")


def _write(path: Path, content: bytes) -> None:
    """All of it, or nothing."""
    part = part_of(path)
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _draw_view(figure: SubFigure, scene: Scene, view: View) -> None:
    (image, first, losses), (truth, second, weights) = figure.subplots(2, 3)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])

    images, labels = scene.shown
    _title(image, f"image: {scene.shown_name}")
    image.imshow(scene.photograph(images[0]), interpolation="nearest")
    _title(truth, "the label")
    _draw_classes(truth, scene, labels[0].numpy())
    for axes, (name, prediction) in zip((first, second), view.predictions.items(), strict=True):
        _title(axes, f"prediction after {name}")
        _draw_classes(axes, scene, prediction)

    _title(losses, "loss ℓ of every pixel (nats)")
    _draw_values(losses, view.losses, "magma", Normalize(0, float(np.quantile(view.losses, 0.995))))
    _title(weights, "weight w* of every pixel (the mean gives each 1)")
    _draw_values(weights, view.weights, "RdBu_r", TwoSlopeNorm(1, 0, max(view.weights.max(), 1.01)))


def _draw_classes(axes: Axes, scene: Scene, classes: NDArray[np.integer]) -> None:
    last = len(scene.classes) - 1
    axes.imshow(classes, cmap=ListedColormap(scene.colours), vmin=0, vmax=last, interpolation="nearest")


def _draw_values(axes: Axes, values: NDArray[np.floating], colours: str, norm: Normalize) -> None:
    image = axes.imshow(values, cmap=colours, norm=norm, interpolation="nearest")
    axes.figure.colorbar(image, ax=axes, shrink=0.9, pad=0.02)


def _draw_ious(figure: SubFigure, scene: Scene, ious: dict[str, NDArray[np.float64]]) -> None:
    """Bars, the commonest class first; the swatches beside the names are the legend of the maps."""
    figure.suptitle(f"classes, with their share of the {scene.shares_of}", x=0.01, ha="left", fontsize=11.5)
    axes = figure.subplots()
    order = np.argsort(-scene.shares)
    places = np.arange(len(order))
    for offset, (name, iou), tone in zip((-0.2, 0.2), ious.items(), ("0.65", "0.2"), strict=True):
        label = f"{name} (mean {100 * np.nanmean(iou):.1f})"
        axes.barh(places + offset, 100 * iou[order], height=0.38, color=tone, label=label)
    for position, c in zip(places, order, strict=True):
        colour = scene.colours[c]
        swatch = Rectangle((-0.11, position - 0.38), 0.08, 0.76, facecolor=colour, edgecolor="0.4", linewidth=0.6)
        swatch.set(transform=axes.get_yaxis_transform(), clip_on=False)
        axes.add_patch(swatch)
    axes.set_yticks(places, [f"{scene.classes[c]}  {100 * scene.shares[c]:.2g} %" for c in order])
    axes.tick_params(axis="y", length=0, pad=26)
    axes.set(xlim=(0, 100), ylim=(len(order) - 0.4, -0.6), xlabel="IoU over all that is held out (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, handlelength=1)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5)
