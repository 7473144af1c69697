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

P = ParamSpec("P")
T = TypeVar("T")

BLOCK = 1 << 15
"""Numbers of a block."""

LARGE = 16.0
"""A power up to which the logarithm of a ratio near 1 may be that of the rounded ratio."""

SHORT = 1 << 12
"""Numbers of a row up to which a loop over rows costs more than what is done to them."""

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
    """Whether NumPy can do what is done to the rows of x, (N, L), and they are long enough for it to be worth while."""
    return PRESENT and on_host(x) and x.shape[1] > SHORT


def alone(x: Tensor) -> bool:
    """Whether NumPy does what is done once a pixel, (N, L): with more than two threads, or short rows, PyTorch does."""
    return serves(x) and torch.get_num_threads() <= 2


def array(x: Tensor) -> Array:
    """The same memory."""
    return x.detach().numpy()


def blocks(*tensors: Tensor) -> Iterator[tuple[Array, ...]]:
    """The same blocks of all tensors, (N, L)."""
    for rows in zip(*map(array, tensors), strict=True):
        for start in range(0, len(rows[0]), BLOCK):
            yield tuple(row[start : start + BLOCK] for row in rows)


@quiet
def mark(losses: Tensor, target: Tensor, labels: Tensor, ignore_index: int) -> None:
    """NaN where there is no loss (bad label, negative or infinite loss), `IGNORED` where so labelled; in place.

    Args:
        labels: the target inside [0, C).
    """
    for ell, y, label in blocks(losses, target, labels):
        bad = y != label
        if not (ell.min() >= 0 and ell.max() < np.inf):
            bad |= ~((ell >= 0) & (ell < np.inf))
        np.copyto(ell, np.nan, where=bad)
        np.copyto(ell, IGNORED, where=y == ignore_index)


def histogram(bits: Tensor, shift: int) -> Tensor:
    """How often each value of 16 bits is there among integers (n,), from bit `shift` on; (2^16,) int64."""
    counts = np.zeros(1 << 16, np.int64)
    for some in np.split(array(bits), range(COUNTED, len(bits), COUNTED)):
        counts += np.bincount((some >> shift) & 0xFFFF, minlength=1 << 16)
    return torch.from_numpy(counts)


@quiet
def powers(losses: Tensor, t: float, high: float, q: float) -> tuple[float, int, Tensor]:
    """Of losses (1, n): Σ (min(ℓ, t)/t)^q over the positive ones, how many are above `high`, and those in (t, high].

    Args:
        q: of a large one only the powers of losses close to t count, and their logarithms must be exact.
    """
    total, beyond, inside = 0.0, 0, []
    for (ell,) in blocks(losses):
        x = np.clip(ell, 0, t)
        if q <= LARGE:
            x /= t
            np.log2(x, out=x)
            x *= q
        else:  # `search.log2_ratio_near`
            x -= t
            x /= t
            x /= x + 2
            np.arctanh(x, out=x)
            x *= 2 * math.log2(math.e) * q
        total += float(np.exp2(x, out=x).sum(dtype=np.float64))
        near, over = ell > t, ell > high
        beyond += int(np.count_nonzero(over))
        inside.append(ell[near ^ over])
    return total, beyond, torch.from_numpy(np.concatenate(inside))


@quiet
def sum_above(losses: Tensor, least: float) -> float:
    """Σ max(ℓ, least) of losses (1, n)."""
    return float(sum(np.clip(ell, least, None).sum(dtype=np.float64) for (ell,) in blocks(losses)))


@quiet
def weights(losses: Tensor, pivot: float, drop: float, exponent: float, scale: float, out: Tensor) -> None:
    """scale·w*/τ of losses (1, n) into `out`: see `eager.relative_weights`; 0 of an ignored one.

    Args:
        exponent: q − 1, above 0 and at most `LARGE`.
    """
    base = pivot if pivot > 0 else 1.0
    for ell, w in blocks(losses, out):
        x = ell / base
        np.log2(x, out=x)
        x *= exponent
        x -= drop
        np.exp2(x, out=x)
        np.copyto(x, 1.0, where=ell > pivot)
        np.multiply(x, scale, out=w, casting="same_kind")
        np.copyto(w, 0.0, where=ell == IGNORED)
