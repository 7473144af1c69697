"""Where the pixels of an image lie in memory: strides of any kind, without a copy."""

import functools
import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..settings import MAX_LEVELS


class Layout(NamedTuple):
    """The spatial dimensions of some tensors of the same shape (N, C, *spatial) or (N, *spatial), merged together."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    """One tuple a tensor, of the length of sizes."""


def layout_of(*tensors: Tensor) -> Layout:
    """Of tensors (N, C, *spatial), and (N, *spatial) for those with a dimension less than the first."""
    dims = tensors[0].ndim
    return merged(tensors[0].shape[2:], tuple(x.stride()[x.ndim - dims + 2 :] for x in tensors))


def merged(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Layout:
    """A dimension goes into the one after it where all tensors step over the latter as a whole."""
    try:
        return _merged(sizes, strides)
    except TypeError:  # symbols, where shapes are traced, have no hash
        return _merged.__wrapped__(sizes, strides)


@functools.lru_cache(maxsize=1024)
def _merged(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> Layout:
    merged: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]  # innermost first
    for dim in reversed(range(len(sizes))):
        if sizes[dim] == 1:
            continue
        if merged and all(s[dim] == step[-1] * merged[-1] for s, step in zip(strides, steps, strict=True)):
            merged[-1] *= sizes[dim]
            continue
        merged.append(sizes[dim])
        for s, step in zip(strides, steps, strict=True):
            step.append(s[dim])
    if not merged:
        return Layout((1,), tuple((1,) for _ in strides))
    return Layout(tuple(merged[::-1]), tuple(tuple(step[::-1]) for step in steps))


def padded(values: tuple[int, ...]) -> tuple[int, ...]:
    """Filled up in front to MAX_LEVELS entries, which no kernel reads."""
    return (0,) * (MAX_LEVELS - len(values)) + values


def unit_of(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all of them.

    Kernels get sizes and strides in units of it, multiplied back by a constant, so that the compiler knows what divides
    them and loads vectors. By itself it looks for divisibility by 16 only, and 550·550 is divisible by 4.
    """
    return math.gcd(16, *sizes)


class Sizes(NamedTuple):
    """Of an image, its dimensions merged as far as they go."""

    pixels: tl.int32
    size_1: tl.int32
    """Of the last dimension but one."""
    size_2: tl.int32


class Strides(NamedTuple):
    """Of a tensor (N, C, *spatial) or (N, *spatial), its spatial dimensions merged likewise."""

    image: tl.int64
    classes: tl.int64
    """0 where there are none."""
    step_0: tl.int64
    step_1: tl.int64
    step_2: tl.int64
    """1 where the kernel is told so."""


@triton.jit
def times_unit(sizes, UNIT: tl.constexpr):
    """Sizes in pixels, from those in units."""
    return Sizes(sizes.pixels * UNIT, sizes.size_1, sizes.size_2 * UNIT)


@triton.jit
def pixel_offsets(start, within, sizes, strides, UNIT: tl.constexpr, ADJACENT: tl.constexpr, LEVELS: tl.constexpr):
    """Where the pixels start + within are: (64-bit offset of the tile, offsets inside it), in elements.

    sizes in pixels, strides in units. ADJACENT: the last stride is 1. The offsets inside are 32-bit numbers where the
    pixels of a tile lie side by side.
    """
    if LEVELS == 1:
        base = tl.cast(start, tl.int64)
        offsets = within
        if not ADJACENT:
            base = base * (strides.step_2 * UNIT)
            offsets = within.to(tl.int64) * (strides.step_2 * UNIT)
    else:
        base = tl.cast(0, tl.int64)
        pixel = start + within
        rest = pixel // sizes.size_2
        offsets = (pixel % sizes.size_2).to(tl.int64)
        if not ADJACENT:
            offsets = offsets * (strides.step_2 * UNIT)
        if LEVELS == 2:
            offsets += rest.to(tl.int64) * (strides.step_1 * UNIT)
        else:
            offsets += (rest % sizes.size_1).to(tl.int64) * (strides.step_1 * UNIT)
            offsets += (rest // sizes.size_1).to(tl.int64) * (strides.step_0 * UNIT)
    return base, offsets
