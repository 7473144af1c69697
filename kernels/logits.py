"""Reading logits and whatever lies beside them: the pixels of an image in tiles, the classes of a tile in chunks.

Everything that knows in what layout logits lie is here; `Tile` is what the other device functions get to see of it.
"""

import functools
import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .configs import LogitsConfig, Table, pixel_config, row_config
from .layout import Sizes, Strides, merged, padded, pixel_offsets, times_unit, unit_of


class Constants(NamedTuple):
    """What a kernel that walks logits is compiled for."""

    classes: int
    unit: int
    """Sizes and strides, but for size_1, are in units of so many elements (with rows those of the logits alone), see
    `layout.unit_of`."""
    levels: int
    """Dimensions of an image."""
    adjacent: bool
    """The pixels of the logits lie side by side."""
    other_adjacent: bool
    """Those of the other tensor do."""
    rows: bool
    """The classes of a pixel lie side by side, as in channels_last logits, and are loaded so."""
    chunk: int
    """Classes at a time."""
    block: int
    """Pixels a tile."""
    per_image: bool
    """A segment an image; otherwise one for all."""
    smooth: bool
    """Labels are smoothed."""


class Tile(NamedTuple):
    """Some pixels of an image, as many as inside is true for, and where their logits are."""

    logits: Any
    """The first class of the first pixel."""
    offsets: Any
    """Of the pixels from there."""
    class_stride: Any
    inside: Any


@triton.jit
def image_sizes(sizes, C: tl.constexpr):
    """Sizes in pixels."""
    return times_unit(sizes, 1 if C.rows else C.unit)


@triton.jit
def tile_of(logits, image, start, sizes, strides, ADJACENT: tl.constexpr, C: tl.constexpr):
    """The C.block pixels of an image from `start` on; sizes in pixels, strides in units. ADJACENT: the last one is 1.

    Of the logits, or of the gradient.
    """
    UNIT: tl.constexpr = C.unit
    BLOCK: tl.constexpr = C.block
    within = tl.arange(0, BLOCK)
    base, offsets = pixel_offsets(start, within, sizes, strides, UNIT, ADJACENT, C.levels)
    class_stride = tl.cast(1, tl.int64) if C.rows else strides.classes * UNIT
    return Tile(logits + image * strides.image * UNIT + base, offsets, class_stride, start + within < sizes.pixels)


@triton.jit
def within_classes(inside, c, COUNT: tl.constexpr, CLASSES: tl.constexpr):
    """The mask of class c, of a chunk of COUNT classes: nothing to test where the chunks fit exactly."""
    if CLASSES % COUNT:
        inside = inside & (tl.zeros(inside.shape, tl.int32) + c < CLASSES)
    return inside


@triton.jit
def load_classes(tile, first, COUNT: tl.constexpr, CLASSES: tl.constexpr, EVICT: tl.constexpr):
    """A tuple of COUNT class vectors in float32, from class `first` on; classes past the last one read as −inf.

    A tuple and not a [COUNT, BLOCK] tile: no padding to a power of two, and a third of the instructions.
    """
    xs = ()
    for i in tl.static_range(COUNT):
        there = within_classes(tile.inside, first + i, COUNT, CLASSES)
        # 64-bit from the class on: C·L may exceed 2^31.
        row = tile.logits + tl.cast(first + i, tl.int64) * tile.class_stride
        x = tl.load(row + tile.offsets, mask=there, other=float("-inf"), eviction_policy=EVICT)
        xs = xs + (x.to(tl.float32),)
    return xs


@triton.jit
def load_row(tile, first, COUNT: tl.constexpr, CLASSES: tl.constexpr, EVICT: tl.constexpr):
    """(float32 tile, classes, mask): COUNT classes of every pixel from class `first` on, where they lie side by side.

    COUNT is a power of two; what lies past the last class reads as −inf.
    """
    classes = (first + tl.arange(0, COUNT))[None, :]
    there = tile.inside[:, None] & (classes < CLASSES)
    place = tile.logits + tile.offsets[:, None] + classes
    x = tl.load(place, mask=there, other=float("-inf"), eviction_policy=EVICT)
    return x.to(tl.float32), classes, there


@triton.jit
def load_label(tile, label):
    """The logit of each pixel's label, int64: one more load a pixel, of a line that is needed anyway."""
    return tl.load(tile.logits + label * tile.class_stride + tile.offsets, mask=tile.inside, other=0.0).to(tl.float32)


def classes_adjacent(logits: Tensor) -> bool:
    """Whether the classes of a pixel lie side by side and its neighbours don't: channels_last, (N, C)."""
    return logits.stride(1) == 1 and _classes_adjacent(logits.shape, logits.stride())


def _classes_adjacent(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return strides[1] == 1 and shape[1] > 1 and merged(shape[2:], (strides[2:],)).strides[0][-1] != 1


class Walk(NamedTuple):
    """How a kernel goes over logits and another tensor of the same pixels: target, or gradient."""

    config: LogitsConfig
    adjacent_classes: bool
    """As `classes_adjacent` says of the logits."""
    sizes: Sizes
    strides: Strides
    """Of the logits."""
    other_strides: Strides
    constants: Constants


def walk(logits: Tensor, other: Tensor, table: Table, per_image: bool, smooth: bool) -> Walk:
    """For logits (N, C, *spatial) and the target (N, *spatial), or a gradient with strides like those of the logits."""
    return _walk(logits.shape, logits.stride(), other.stride(), logits.element_size(), table, per_image, smooth)


@functools.lru_cache(maxsize=1024)
def _walk(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    other_strides: tuple[int, ...],
    itemsize: int,
    table: Table,
    per_image: bool,
    smooth: bool,
) -> Walk:
    classes, spatial = shape[1], shape[2:]
    pixels = math.prod(spatial)
    sizes, (steps, other_steps) = merged(spatial, (strides[2:], other_strides[-len(spatial) :]))
    adjacent, other_adjacent = steps[-1] == 1, other_steps[-1] == 1
    of_logits = (strides[0], *steps[: len(steps) - adjacent])
    of_other = (other_strides[0], *other_steps[: len(steps) - other_adjacent])
    is_grad = len(other_strides) == len(strides)
    adjacent_classes = _classes_adjacent(shape, strides)
    rows = adjacent_classes and classes > table.rows.above
    if rows:
        unit, pixel_unit = unit_of(*of_logits, *(of_other if is_grad else ())), 1
        config = row_config(table, classes, unit, itemsize)
    else:
        of_classes = (strides[1], other_strides[1]) if is_grad else (strides[1],)
        unit = pixel_unit = unit_of(pixels, sizes[-1], *of_classes, *of_logits, *of_other)
        config = pixel_config(table, classes, adjacent_classes)

    def in_units(image: int, classes: int, steps: tuple[int, ...], unit: int) -> Strides:
        return Strides(*(stride // unit for stride in (image, classes, *padded(steps))))

    return Walk(
        config,
        adjacent_classes,
        Sizes(pixels // pixel_unit, sizes[-2] if len(sizes) > 1 else 1, sizes[-1] // pixel_unit),
        in_units(strides[0], strides[1], steps, unit),
        in_units(other_strides[0], other_strides[1] if is_grad else 0, other_steps, unit if is_grad else pixel_unit),
        Constants(
            classes,
            unit,
            len(sizes),
            adjacent,
            other_adjacent,
            rows,
            config.chunk,
            config.block,
            per_image,
            smooth,
        ),
    )
