"""The values that stages hand to each other, and the stages that make up a backend.

Shapes: N images, C classes, L pixels an image (all spatial dimensions flattened), S segments; S = N with
scope "image" and 1 with scope "batch".
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

IGNORED = -1.0
"""The loss written for a pixel that takes no part. Losses are never negative, so no mask travels with them."""

UNIFORM_PIVOT = -0.5
"""A pivot below every loss and above `IGNORED`: all valid pixels, zero losses included, get the weight τ."""

SOLUTION_ROWS = ("alpha", "tau", "pivot", "drop", "step", "exponent")
"""alpha: α*; tau: τ; pivot: see `Pooling`; drop: (q−1)·log2(α*/pivot) ≥ 0; step: τ·∂value/∂loss_s, what grad_output is
multiplied by; exponent: q − 1, capped (see `eager.Q_CAP`)."""

ALPHA, TAU, PIVOT, DROP, STEP, EXPONENT = range(len(SOLUTION_ROWS))

COUNT_ROWS = ("valid", "saturated")
"""valid: n; saturated: the number of pixels whose weight is τ."""

VALID, SATURATED = range(len(COUNT_ROWS))


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


# --- what a call asks for -----------------------------------------------------------------------------------------


class CrossEntropy(NamedTuple):
    """How pixel losses come of logits and target."""

    weight: Tensor | None = None
    """(C,), as in `F.cross_entropy`."""
    ignore_index: int = -100
    label_smoothing: float = 0.0
    align_corners: bool | None = None
    """None: there is a label for every pixel of the logits. A bool: the logits are smaller than the target and are
    upsampled bilinearly to its size, with this `align_corners` of `F.interpolate`."""


class Pool(NamedTuple):
    """How pixel losses are pooled."""

    p: float | Tensor
    ratio: float | Tensor
    scope: str = "image"
    """"image": a segment an image; "batch": one segment. Not the number of segments, which may be a symbol while a
    graph is made and is then not to be passed around."""
    reduction: str = "mean"
    solver: str = "auto"
    group: Any = None
    """The process group whose ranks are pooled together, or None."""


def segments_of(images: int, scope: str) -> int:
    """S."""
    return images if scope == "image" else 1


# --- what the stages find -----------------------------------------------------------------------------------------


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

    value: Tensor
    """The reduced loss, in the type of the losses: () for "mean" and "sum", (S,) for "none"."""
    solution: Tensor
    """(6, S), in the type of the losses: the rows named in `SOLUTION_ROWS`."""
    counts: Tensor
    """(2, S), int64: the rows named in `COUNT_ROWS`."""


class Backend(Protocol):
    """The stages, alike in `eager`, `fused` and, for a graph that is being made, `operators`.

    None has a derivative: `autograd` strings them together. All that is checked was checked before.
    """

    def softmax_losses(self, logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, scope: str) -> PixelLosses:
        """Stage one: ℓ = cross-entropy of each pixel, as `F.cross_entropy(reduction="none")` with the same options.

        Args:
            logits: (N, C, *spatial), floating.
            target: (N, *spatial), integer. A label outside [0, C) that is not `ignore_index` gives a NaN loss.
            cross_entropy: the options.
            scope: of the pooling that follows.
        """

    def marked_losses(self, losses: Tensor, mask: Tensor | None, scope: str) -> PixelLosses:
        """Stage one: a user's own losses (N, L) in the form the solver takes; mask (N, L): True where valid."""

    def pool_logits(
        self, logits: Tensor, target: Tensor, cross_entropy: CrossEntropy, pool: Pool
    ) -> tuple[PixelLosses, Pooling]:
        """Stages one and two, `softmax_losses` and the solution, without a group."""

    def pool_losses(self, losses: Tensor, mask: Tensor | None, pool: Pool) -> tuple[PixelLosses, Pooling]:
        """Stages one and two, `marked_losses` and the solution, without a group."""

    def total_weight(self, pixels: PixelLosses, solution: Tensor) -> Tensor:
        """Σ w* of every segment, (S,)."""

    def pixel_weights(self, pixels: PixelLosses, solution: Tensor, grad_output: Tensor, dtype: torch.dtype) -> Tensor:
        """Stage three: w*·∂value/∂loss_s·grad_output of every pixel, (N, L), rounded once to `dtype`.

        NaN on the valid pixels of a poisoned segment, 0 on ignored pixels.

        Args:
            pixels: of stage one; its losses alone are read.
            solution: (6, S), see `SOLUTION_ROWS`.
            grad_output: (S,) or ().
            dtype: of the weights.
        """

    def logits_gradient(
        self, logits: Tensor, pixels: PixelLosses, solution: Tensor, grad_output: Tensor, cross_entropy: CrossEntropy
    ) -> Tensor:
        """Stage three: ∂value/∂logits·grad_output, of the shape, layout and type of the logits, rounded once.

        ∂ℓ/∂x_c = a·softmax_c − (1−ε)·v_y·[c = y] − (ε/C)·v_c with a = (1−ε)·v_y + (ε/C)·Σ_k v_k.

        Args:
            logits, pixels, cross_entropy: of stage one.
            solution, grad_output: as in `pixel_weights`.
        """
