"""What the eager backend does on the CPU once a pixel, or once a loss: in NumPy, by the calling thread alone.

There an operation starts no threads, so that beside busy processes none is waited for, and takes half to a tenth of
what PyTorch takes for as many numbers: comparisons, powers, counts, picking out a few (perf/NOTES.md). The passes go by
blocks that stay in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from .settings import on_host
from .types import IGNORED

try:
    import numpy as np

    PRESENT = True
    Array: TypeAlias = np.ndarray[Any, Any]
except ImportError:  # a kernel of the Hub may count on torch alone
    PRESENT = False
    np = Array = None  # type: ignore[assignment]

P = ParamSpec("P")
T = TypeVar("T")

BLOCK = 1 << 15
"""Numbers of a block."""

LARGE = 16.0
"""A power up to which the logarithm of a ratio near 1 may be that of the rounded ratio."""

COUNTED = 1 << 20
"""Losses counted at a time: `numpy.bincount` makes integers of 8 bytes of them."""


def quiet(function: Callable[P, T]) -> Callable[P, T]:
    """Zeros, NaN, powers too small and what is computed of an ignored loss are no errors, whatever NumPy is told."""

    @functools.wraps(function)
    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        with np.errstate(all="ignore"):  # a new one: several threads may be here
            return function(*args, **kwargs)

    return within


def serves(x: Tensor) -> bool:
    """Whether NumPy can do what is done to x."""
    return PRESENT and on_host(x)


def alone(x: Tensor) -> bool:
    """Whether NumPy does what is done once a pixel: with more than two threads PyTorch does."""
    return serves(x) and torch.get_num_threads() <= 2


def array(x: Tensor) -> Array:
    """The same memory."""
    return x.detach().numpy()


def blocks(*arrays: Array) -> Iterator[tuple[slice, tuple[Array, ...]]]:
    """The same blocks of all arrays, (N, L), parts of a row or several rows; before them which rows."""
    count, length = arrays[0].shape
    together = max(1, BLOCK // max(1, length))
    for row in range(0, count, together):
        rows = slice(row, row + together)
        for start in range(0, length, BLOCK):
            yield rows, tuple(x[rows, start : start + BLOCK] for x in arrays)


@quiet
def mark(losses: Tensor, target: Tensor, labels: Tensor, ignore_index: int) -> None:
    """NaN where there is no loss (bad label, negative or infinite loss), `IGNORED` where so labelled; in place.

    Args:
        labels: the target inside [0, C).
    """
    for _, (ell, y, label) in blocks(array(losses), array(target), array(labels)):
        bad = y != label
        if not (ell.min() >= 0 and ell.max() < np.inf):
            bad |= ~((ell >= 0) & (ell < np.inf))
        np.copyto(ell, np.nan, where=bad)
        np.copyto(ell, IGNORED, where=y == ignore_index)


def histogram(bits: Array, shift: int) -> Array:
    """How often each value of 16 bits is there among integers (n,), from bit `shift` on; (2^16,) int64."""
    counts = np.zeros(1 << 16, np.int64)
    for some in np.split(bits, range(COUNTED, len(bits), COUNTED)):
        counts += np.bincount((some >> shift) & 0xFFFF, minlength=1 << 16)
    return counts


@quiet
def powers(losses: Array, t: float, high: float, q: float) -> tuple[float, int, Array]:
    """Of losses (n,): Σ (min(ℓ, t)/t)^q over the positive ones, how many are above `high`, and those in (t, high].

    Args:
        q: of a large one only the powers of losses close to t count, and their logarithms must be exact.
    """
    total, beyond, inside = 0.0, 0, []
    for _, (ell,) in blocks(losses[None]):
        x = np.clip(ell, 0, t)
        if q <= LARGE:
            x /= t
            np.log2(x, out=x)
            x *= q
        else:
            x -= t
            x /= t
            np.log1p(x, out=x)
            x *= q / math.log(2)
        total += float(np.exp2(x, out=x).sum(dtype=np.float64))
        near, over = ell > t, ell > high
        beyond += int(np.count_nonzero(over))
        inside.append(ell[near ^ over])
    return total, beyond, np.concatenate(inside)


@quiet
def sum_above(losses: Tensor, least: Tensor) -> Tensor:
    """Σ max(ℓ, least) of each row of losses (S, n), for least (S,); (S,) float64."""
    total, least_ = np.zeros(len(losses)), array(least)[:, None]
    for rows, (ell,) in blocks(array(losses)):
        total[rows] += np.maximum(ell, least_[rows]).sum(1, dtype=np.float64)
    return torch.from_numpy(total)


@quiet
def weights(losses: Tensor, pivot: Tensor, drop: Tensor, scale: Tensor, exponent: float, out: Tensor) -> None:
    """scale·w*/τ of losses (S, n) into `out`: see `eager.relative_weights`; 0 of an ignored one.

    Args:
        pivot, drop, scale: (S,), in the type of the losses.
        exponent: q − 1, above 0 and at most `LARGE`.
    """
    pivots, drops, scales = (array(x)[:, None] for x in (pivot, drop, scale))
    bases = np.where(pivots > 0, pivots, pivots.dtype.type(1))
    for rows, (ell, w) in blocks(array(losses), array(out)):
        np.divide(ell, bases[rows], out=w)
        np.log2(w, out=w)
        w *= exponent
        w -= drops[rows]
        np.exp2(w, out=w)
        np.copyto(w, 1.0, where=ell > pivots[rows])
        w *= scales[rows]
        np.copyto(w, 0.0, where=ell == IGNORED)
