"""The values that stages hand to each other, the same for every backend.

Shapes: N images, C classes, L pixels an image (all spatial dimensions flattened), S segments; S = N with
scope "image" and 1 with scope "batch".
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORED = -1.0
"""The loss written for a pixel that takes no part. Losses are never negative, so no mask travels with them."""

UNIFORM_PIVOT = -0.5
"""A pivot below every loss and above `IGNORED`: all valid pixels, zero losses included, get the weight τ."""


class PoolingStats(NamedTuple):
    """What the pooling found, one entry a segment. Tensors on the device of the input, shape (S,)."""

    alpha: Tensor
    """α*, the largest root of η (equation 9 of the paper); below it a pixel's weight falls off. float32."""
    tau: Tensor
    """τ, the largest weight a pixel can get (equation 5). float32."""
    valid: Tensor
    """n, the number of valid pixels. int64."""
    saturated: Tensor
    """The number of pixels whose weight is τ. int64."""
    total_weight: Tensor
    """Σ w*, at most 1. float32."""


class PixelLosses(NamedTuple):
    """Stage one: what a backend keeps about the pixels."""

    losses: Tensor
    """(N, L), float32 (float64 for float64 input): ℓ, `IGNORED`, or NaN where the loss is not a number ≥ 0."""
    saved: tuple[Tensor, ...] = ()
    """What the gradient stage of the same backend needs besides."""
    statistics: Tensor | None = None
    """What the solver of the same backend starts from."""


class Pooling(NamedTuple):
    """Stage two: the solution.

    The weight of a pixel is τ where ℓ > pivot and τ·2^((q−1)·log2(ℓ/pivot) − drop) elsewhere. The pivot is a number
    of the type of the losses, and no loss lies strictly between it and α*, so that w* = τ·(ℓ/α*)^(q−1) is right
    however large q is; α* itself, rounded, would lose (q−1) times its rounding.
    """

    loss: Tensor
    """(S,): the pooled loss of each segment, in the type of the losses."""
    value: Tensor
    """The reduced loss: () for "mean" and "sum", `loss` for "none"."""
    solution: Tensor
    """(6, S), in the type of the losses: the rows named in `SOLUTION_ROWS`."""
    counts: Tensor
    """(2, S), int64: n, and the number of saturated pixels."""


SOLUTION_ROWS = ("alpha", "tau", "pivot", "drop", "step", "exponent")
"""alpha: α*; tau: τ; pivot: see `Pooling`; drop: (q−1)·log2(α*/pivot) ≥ 0; step: τ·∂value/∂loss_s, what grad_output is
multiplied by; exponent: q − 1, capped (see `eager.Q_CAP`)."""
