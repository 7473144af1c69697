"""What the eager backend does on the CPU once a pixel, or once a loss: in NumPy, by the calling thread alone.

There an operation starts no threads, so that beside busy processes none is waited for, and takes half to a tenth of
what PyTorch takes for as many numbers: comparisons, powers, counts, picking out a few (perf/NOTES.md). The passes go by
blocks that stay in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from .powers import LOG2E
from .settings import on_host
from .types import DROP, EXPONENT, IGNORED, PIVOT, STEP

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


def exp2(x: Array) -> None:
    """2^x of at most `BLOCK` numbers, in place: PyTorch's, whose vector code needs no AVX-512, by this thread alone."""
    torch.exp2(y := torch.from_numpy(x), out=y)


def histogram(bits: Array, shift: int) -> Array:
    """How often each value of 16 bits is there among integers (n,), from bit `shift` on; (2^16,) int64."""
    pieces = (bits[start : start + COUNTED] for start in range(0, len(bits), COUNTED))
    counts = (np.bincount((some >> shift) & 0xFFFF, minlength=1 << 16) for some in pieces)
    return functools.reduce(np.add, counts)


@quiet
def weights(losses: Tensor, solution: Tensor, grad_output: Tensor, out: Tensor) -> None:
    """w*·∂value/∂loss_s·grad_output of losses (S, n) into `out`, of their type, where q − 1 is at most `LARGE`.

    Args:
        solution, grad_output: see `types.Backend.pixel_weights`.
    """
    rows_ = array(solution)[:, :, None]
    pivots, drops, exponent = rows_[PIVOT], rows_[DROP], float(rows_[EXPONENT, 0, 0])
    scales = rows_[STEP] * array(grad_output).reshape(-1, 1)
    bases = np.where(pivots > 0, pivots, pivots.dtype.type(1))
    for rows, (ell, w) in blocks(array(losses), array(out)):
        np.clip(ell, 0, bases[rows], out=w)
        w /= bases[rows]
        np.log(w, out=w)
        w *= exponent * LOG2E
        w -= (ell <= pivots[rows]) * drops[rows]
        exp2(w)
        if not (pivots[rows] > 0).all():
            np.copyto(w, 1.0, where=ell > pivots[rows])
        w *= scales[rows]
        if not np.isfinite(scales[rows]).all():  # elsewhere they are 0 already
            np.copyto(w, 0.0, where=ell == IGNORED)
