"""Into which slices a pass over pixels is cut on the CPU: the one place that decides by size and number of threads.

PyTorch splits an operation of more than `GRAIN` elements over its threads and waits for all of them at its end. Beside
other busy processes such a wait lasts until the system lets the last thread run again, milliseconds, whatever the work;
hundreds of waits then cost more than the pass. On the other hand temporaries as large as the logits cost more than the
arithmetic, since every page of them is faulted in anew. So:

- Over logits (`cut`), one thread: slices that fit into its cache.
- Over logits, more threads: all of them, in a few operations. Where these need a temporary, whole images, which are
  dense as they are; where one is above what the allocator hands out again, slices of 4 MB, so tens of waits.
- Over one number a pixel (`cut_pixels`): slices that one thread does alone, without a wait. Two threads would gain
  little. More threads get slices of a cache full for each.

Nothing is cut while a graph is made, or on another device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .settings import on_host

GRAIN = 1 << 15
"""Elements up to which PyTorch leaves an operation to one thread (at::internal::GRAIN_SIZE)."""

CACHE = 1 << 17
"""Elements, about, that a thread keeps in its second-level cache together with what is computed of them."""

WHOLE = 1 << 20
"""Elements up to which nothing is cut; about what the threads keep in their last-level cache together with what is
computed of them."""

IMAGES = 1 << 23
"""Elements up to which a temporary is made of whole images: 32 MB of float32, which the allocator hands out again
without page faults."""


def cut(*tensors: Tensor, images: int | None = None) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of all tensors, the first one of them logits (N, C, L), along images and pixels.

    Args:
        images: elements, at most, of a slice of whole images; default `IMAGES`.
    """
    x = tensors[0]
    if not on_host(x) or x.numel() <= WHOLE:
        return iter((tensors,))
    if torch.get_num_threads() == 1:
        return _slices(tensors, CACHE)
    images = IMAGES if images is None else images
    return _slices(tensors, images if x.numel() <= images * x.shape[0] else WHOLE)


def cut_pixels(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of all tensors, (N, L), along images and pixels."""
    x = tensors[0]
    if not on_host(x) or x.numel() <= GRAIN:
        return iter((tensors,))
    threads = torch.get_num_threads()
    return _slices(tensors, GRAIN if threads == 2 else threads * CACHE)


def _slices(tensors: tuple[Tensor, ...], elements: int) -> Iterator[tuple[Tensor, ...]]:
    """Of so many elements of the first tensor."""
    x = tensors[0]
    images = min(x.shape[0], elements * x.shape[0] // x.numel())
    if images:
        return zip(*(t.split(images) for t in tensors), strict=True)
    pixels = max(1, elements * x.shape[0] * x.shape[-1] // x.numel())
    pixels -= pixels % 16 if pixels > 16 else 0  # log_softmax goes by vectors, and splits what is more than its block
    return zip(*((piece for image in t.split(1) for piece in image.split(pixels, -1)) for t in tensors), strict=True)


class Scratch:
    """Memory for the temporary of one slice (n, C, l), used again for the next: the first is the largest."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(0, dtype=dtype, device="cpu")

    def like(self, x: Tensor) -> Tensor:
        """A tensor of the shape of x, dense, with the classes where x has them; not initialised."""
        if self._buffer.numel() < x.numel():
            self._buffer = self._buffer.new_empty(x.numel())
        n, classes, pixels = x.shape
        flat = self._buffer[: x.numel()]
        return flat.view(n, pixels, classes).mT if x.stride(1) == 1 else flat.view(x.shape)


def dense(x: Tensor) -> bool:
    """Whether a slice (n, C, l) lies in memory without gaps, pixels or classes side by side."""
    return (x.mT if x.stride(1) == 1 else x).is_contiguous()
