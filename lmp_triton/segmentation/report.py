"""The results page: `python -m lmp_triton.segmentation.report` writes RESULTS.md and its figures.

Figures 1 and 2 of the paper come from the oracle (`lmp_triton.reference`), all else from the rows and predictions that
`python -m lmp_triton.segmentation.experiments` and `….land_cover` have left in results/. What is said about them by
hand is in results/reading.md and goes into the page as it is.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lmp_triton import reference
from lmp_triton.demo import land_cover as demo

from . import digits, experiments, land_cover
from .experiments import CROSS_ENTROPY, POOLING, RESULTS

PAGE = Path(__file__).with_name("RESULTS.md")


# --- figures 1 and 2: the weights themselves ----------------------------------------------------------------------


def boundary(p: float, tau: float, points: int = 201) -> NDArray[np.float64]:
    """The boundary of W for n = 2 in the first quadrant, (points, 2): w* for losses in all directions."""
    gamma = 2.0 ** -(1 / reference.conjugate(p))
    m = min(max((gamma / tau) ** p, 1.0), 2.0)
    angles = np.linspace(0, math.pi / 2, points)
    return np.array([reference.solve([math.cos(a), math.sin(a)], m, p).weights for a in angles])


def figure_1() -> Figure:
    """Left: ‖w‖_p = 1. Right: W for n = 2, p = 1.4, τ = 0.6."""
    figure = Figure(figsize=(8, 4), dpi=80, layout="constrained")
    balls, space = figure.subplots(1, 2)
    angles = np.linspace(0, 2 * math.pi, 801)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    for p in (1, 1.4, 2, 4, math.inf):
        balls.plot(*(directions / np.linalg.norm(directions, ord=p, axis=0)), label=f"p = {p}".replace("inf", "∞"))
    balls.set_title("‖w‖ₚ = 1", loc="left")
    balls.legend(loc="center", frameon=False)

    quadrant = boundary(1.4, 0.6)
    corners = np.array([[0.6, 0], *quadrant, [0, 0.6]])
    for x in (1, -1):
        for y in (1, -1):
            space.fill(*np.vstack([corners, [0, 0]]).T * [[x], [y]], color="#c9d8e8")
    space.plot(*quadrant.T, ".", color="#1f4e79", markersize=3, label="w*, by the oracle, for losses in all directions")
    space.set_title("W for n = 2, p = 1.4, τ = 0.6", loc="left")
    space.legend(loc="lower center", frameon=False, fontsize=8)
    for axes in (balls, space):
        axes.set(aspect="equal", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xlabel="w₁", ylabel="w₂")
    return figure


def figure_2() -> Figure:
    """w* for 100 losses: left for m = n/3 and several p, right for p = 1.7 and several m."""
    n = 100
    losses = np.sort(np.random.default_rng(0).exponential(size=n))
    figure = Figure(figsize=(10, 4), dpi=80, layout="constrained")
    by_p, by_m, shown = figure.subplots(1, 3)
    for p in (1, 1.2, 1.4, 1.7, 2, 3, 4, 10, math.inf):
        by_p.plot(reference.solve(losses, n / 3, p).weights, label=f"p = {p}".replace("inf", "∞"))
    by_p.set_title("w*, m = n/3", loc="left")
    for ratio in (0.0, 0.1, 0.2, 0.4, 0.8, 1.0):
        m = max(ratio * n, 1.0)
        by_m.plot(reference.solve(losses, m, 1.7).weights, label=f"m = {ratio:g} n" if ratio else "m = 1")
    by_m.set_title("w*, p = 1.7", loc="left")
    shown.plot(losses, color="black")
    shown.set_title("the losses", loc="left")
    for axes in (by_p, by_m, shown):
        axes.set_xlabel("pixel, by its loss")
    for axes in (by_p, by_m):
        axes.legend(frameon=False, fontsize=8)
    return figure


# --- figures 3 and 4: what was trained ----------------------------------------------------------------------------


def figure_3(rows: pd.DataFrame) -> Figure:
    """What loss max-pooling gains over cross-entropy, by class, against the training pixels of the class."""
    ours, theirs = select(rows, POOLING), select(rows, CROSS_ENTROPY)
    seeds = sorted(set(ours.seed) & set(theirs.seed))
    columns = [f"iou_{c}" for c in range(len(digits.CLASSES))]
    gains = ours.set_index("seed").loc[seeds, columns] - theirs.set_index("seed").loc[seeds, columns]
    counts = [np.bincount(experiments.canvases(seed)[0].labels.numpy().ravel(), minlength=11) for seed in seeds]
    figure = Figure(figsize=(7, 4), dpi=80, layout="constrained")
    axes = figure.subplots()
    spread = gains.std(ddof=1).to_numpy() if len(seeds) > 1 else None
    pixels = np.mean(counts, axis=0)
    axes.errorbar(pixels, gains.mean().to_numpy(), yerr=spread, fmt="o", color="#1f4e79", capsize=3)
    for c, name in enumerate(digits.CLASSES):
        axes.annotate(name, (pixels[c], gains.mean().iloc[c]), textcoords="offset points", xytext=(6, 4))
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xscale="log", xlabel="training pixels of the class", ylabel="gain in IoU, percentage points")
    return figure


def figure_4() -> Figure:
    """Predictions for two test canvases as the training goes on."""
    kept = np.load(experiments.EVOLUTION)
    losses = sorted({key.rsplit(" ", 1)[0] for key in kept if " " in key})
    steps = sorted({int(key.rsplit(" ", 1)[1]) for key in kept if " " in key})
    canvases = len(kept["images"])
    figure = Figure(figsize=(1.3 * (len(steps) + 1), 1.45 * 2 * canvases), dpi=80, layout="constrained")
    grid = figure.subplots(len(losses) * canvases, len(steps) + 1, squeeze=False)
    for canvas in range(canvases):
        for which, loss in enumerate(losses):
            row = grid[canvas * len(losses) + which]
            if which == 0:
                row[0].imshow(kept["images"][canvas, 0], cmap="gray", interpolation="nearest")
            else:
                _classes(row[0], kept["labels"][canvas])
            row[0].set_ylabel(loss, fontsize=8)
            for axes, step in zip(row[1:], steps, strict=True):
                _classes(axes, kept[f"{loss} {step}"][canvas])
                if canvas == which == 0:
                    axes.set_title(f"{step} steps", fontsize=8)
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
    return figure


def _classes(axes: Axes, classes: NDArray[np.integer]) -> None:
    axes.imshow(
        classes, cmap=ListedColormap(digits.COLOURS), vmin=0, vmax=len(digits.CLASSES) - 1, interpolation="nearest"
    )


# --- tables -------------------------------------------------------------------------------------------------------


def read(rows: Path) -> pd.DataFrame:
    """The rows of a file; none of a file that is not there."""
    if rows.exists():
        return pd.read_csv(rows)
    return pd.DataFrame(columns=[*(f.name for f in dataclasses.fields(experiments.Setting)), "seed", "miou", "rare"])


def select(rows: pd.DataFrame, setting: experiments.Setting) -> pd.DataFrame:
    """The rows of a setting, one a seed."""
    same = rows.loss == setting.loss
    for name in ("p", "ratio", "sampling", "lr"):
        value = getattr(setting, name)
        same &= rows[name].isna() if value is None else rows[name] == value
    return rows[same]


def table(
    rows: pd.DataFrame, settings: dict[str, experiments.Setting], base: experiments.Setting = CROSS_ENTROPY
) -> str:
    """A line for each setting that has rows: mean ± standard deviation over seeds, and the gain, seed by seed."""
    compared = select(rows, base).set_index("seed")
    lines = [
        "| | seeds | mIoU | mean IoU of the five rarest | mIoU less that of cross-entropy, same seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, setting in settings.items():
        chosen = select(rows, setting).set_index("seed")
        if chosen.empty:
            continue
        common = chosen.index.intersection(compared.index)
        gain = chosen.miou.loc[common] - compared.miou.loc[common]
        gained = "" if setting == base else spread(gain, signed=True)
        lines.append(f"| {name} | {len(chosen)} | {spread(chosen.miou)} | {spread(chosen.rare)} | {gained} |")
    return "\n".join(lines)


def spread(values: pd.Series, signed: bool = False) -> str:
    """Mean ± sample standard deviation; of one value the value."""
    if values.empty:
        return "–"
    mean = f"{values.mean():{'+' if signed else ''}.1f}"
    return mean if len(values) == 1 else f"{mean} ± {values.std(ddof=1):.1f}"


def on_land_cover(rows: pd.DataFrame) -> str:
    """What the runs on the land-cover scene gave, and how they were made."""
    names = (
        "cross-entropy",
        "top-k: mean of the hardest 25 % (p = 1)",
        "loss max-pooling (p = 1.3, ratio 0.25)",
        "loss max-pooling (p = 1.3, ratio 0.1)",
    )
    settings = dict(zip(names, land_cover.SETTINGS, strict=True))
    made = f"{rows.cpu_seconds.median():.0f} CPU seconds a training (median)" if len(rows) else "none was made yet"
    return f"""{table(rows, settings, land_cover.CROSS_ENTROPY)}

By `python -m lmp_triton.segmentation.land_cover`, each run with a row in results/land-cover.csv: {made}.
The scene of `lmp-triton demo --scene land-cover`: the Earth from 70°N to 60°S, 17 classes; red, green, blue, latitude
and relief; every fifth block of 10° by 10° held out. A U-Net of width 16 that works at half the resolution,
{land_cover.STEPS} steps of {demo.BATCH} crops of {demo.CROP} pixels, AdamW, one cycle up to {demo.LEARNING_RATE:g}."""


def page(rows: pd.DataFrame, scene: pd.DataFrame) -> str:
    """The text of RESULTS.md, from the runs on digits and those on the land-cover scene."""
    setting = experiments.Setting
    by_p = sorted(rows[(rows.loss == "pooling") & (rows.ratio == 0.1)].p.unique())
    by_ratio = sorted(rows[(rows.loss == "pooling") & (rows.p == 1.3)].ratio.unique())
    main = {
        "BASE: cross-entropy, uniform sampling": CROSS_ENTROPY,
        "BASE+: cross-entropy, complementary sampling": setting("cross-entropy", sampling="inverse-iou"),
        "inverse median frequency": setting("inverse-median-frequency"),
        "focal (γ = 2, each class against the others)": setting("focal"),
        "top-k: mean of the hardest 5 % (p = 1)": setting(p=1.0, ratio=0.05),
        "top-k: mean of the hardest 10 %": setting(p=1.0, ratio=0.1),
        "top-k: mean of the hardest 25 %": setting(p=1.0, ratio=0.25),
        "loss max-pooling alone (p = 1.3, ratio 0.05)": POOLING,
        "LMP: the same with complementary sampling": setting(p=1.3, ratio=0.05, sampling="inverse-iou"),
    }
    rates = {
        f"{name}, learning rate {lr:g}": setting(loss, p, ratio, lr=lr)
        for name, loss, p, ratio in (
            ("cross-entropy", "cross-entropy", None, None),
            ("loss max-pooling (p = 1.3, ratio 0.1)", "pooling", 1.3, 0.1),
            ("focal", "focal", None, None),
        )
        for lr in sorted(rows.lr.unique())
    }
    reading = RESULTS / "reading.md"
    versions = rows[["machine", "python", "torch"]].drop_duplicates().itertuples(index=False)
    where = "; ".join(f"{row.machine}, Python {row.python}, torch {row.torch}" for row in versions)
    seconds = rows.groupby("loss").cpu_seconds.median()
    took = ", ".join(f"{loss} {value:.0f}" for loss, value in seconds.items())
    return f"""# Results

Written by `python -m lmp_triton.segmentation.report`; do not edit. {len(rows)} runs, each with a row in
[results/digits.csv](results/digits.csv), by `python -m lmp_triton.segmentation.experiments` (`--groups`, `--seeds`;
runs that have a row are left out, so it may be stopped and started). One thread of: {where}. Median CPU seconds of a
training: {took}; the machine was busy with other work.

## The setting

Composed digits (`digits.py`): canvases of 64 pixels with 5 handwritten digits of 10 to 18 pixels, about 90 %
background, digit k drawn ∝ (k + 1)^-1.5 in 1200 training canvases from 1100 scans; {experiments.TEST_CANVASES} test
canvases from the other 697 scans, all digits equally frequent. A U-Net of width 16 that works at half the resolution,
{experiments.STEPS} steps of {experiments.BATCH} canvases, SGD with momentum 0.9, learning rate 0.1 with poly decay 0.9.
A seed fixes canvases, start and batches, whatever the loss. IoU in percent on the test canvases after the last step,
over 11 classes; mean ± standard deviation over seeds. Single seeds differ by up to ten points: the last column, which
compares seed by seed, says most, and with one seed little.

{reading.read_text().strip() if reading.exists() else ""}

## Methods (the shape of table 2)

{table(rows, main)}

## p (the shape of table 1), at ratio 0.1

{table(rows, {**{f"p = {p:g}": setting(p=p, ratio=0.1) for p in by_p}, "cross-entropy (p = ∞)": CROSS_ENTROPY})}

## m, as a share of the pixels, at p = 1.3

{table(rows, {**{f"ratio {r:g}": setting(p=1.3, ratio=r) for r in by_ratio}, "cross-entropy (ratio 1)": CROSS_ENTROPY})}

## The learning rate

{table(rows, rates)}

## The land-cover scene

{on_land_cover(scene)}

## Gain against frequency (figure 3)

![gain by class](results/figure_3.png)

Loss max-pooling (p = {POOLING.p}, ratio {POOLING.ratio}) less cross-entropy, mean and standard deviation over seeds.

## Predictions over iterations (figure 4)

![predictions](results/figure_4.png)

Two test canvases, seed 0. Of each: the image beside the predictions after cross-entropy, the label beside those after
loss max-pooling (p = 1.3, ratio 0.1).

## The weights (figures 1 and 2), by the oracle

![figure 1](results/figure_1.png)

![figure 2](results/figure_2.png)

The paper's losses for figure 2 are not given: 100 exponential draws, sorted. Its curve for m = 0 lies outside of
1 ≤ m ≤ n; drawn is m = 1.
"""


def main() -> None:
    """Write the page and the figures for which there is something to show."""
    rows, scene = read(experiments.ROWS), read(land_cover.ROWS)
    figures = {"figure_1": figure_1(), "figure_2": figure_2(), "figure_3": figure_3(rows), "figure_4": figure_4()}
    for name, figure in figures.items():
        figure.savefig(RESULTS / f"{name}.png")
    PAGE.write_text(page(rows, scene))
    print(PAGE)


if __name__ == "__main__":
    main()
