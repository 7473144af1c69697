"""Into which slices a pass over pixels is cut on the CPU: the one place that decides by size and number of threads.

PyTorch splits an operation of more than `GRAIN` elements over its threads and waits for all of them at its end. Beside
other busy processes such a wait lasts until the system lets the last thread run again, milliseconds, whatever the work;
hundreds of waits then cost more than the pass. On the other hand temporaries as large as the logits cost more than the
arithmetic, since every page of them is faulted in anew. So:

- Up to `WHOLE` elements: no slices, a few operations, each split over the threads. (Passes over one number a
  pixel, which are short, take the next line from `GRAIN` on.)
- More, and one or two threads: slices that one thread does alone, without a wait. For one thread they need not be below
  the grain, only fit into the cache. Two threads would gain little: what is done here in the cache takes less time than
  the page faults.
- More, and more threads: slices of a cache full for each thread, so tens of waits and not hundreds.
- Page faults of a fresh tensor are taken by all threads at once, see `fault_in`, before slices of it are written.

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

WHOLE = 1 << 22
"""Elements up to which nothing is cut: 16 MB of float32, which the allocator hands out again without page faults."""


def cut(*tensors: Tensor, whole: int = WHOLE) -> Iterator[tuple[Tensor, ...]]:
    """The same slices of all tensors, each (N, …, L), along images and pixels; the first one counts.

    Args:
        whole: elements up to which it is not cut.
    """
    x = tensors[0]
    if not on_host(x) or x.numel() <= whole:
        yield tensors
        return
    pixels = max(1, _elements() * x.shape[0] * x.shape[-1] // x.numel())
    pixels -= pixels % 16 if pixels > 16 else 0  # log_softmax goes by vectors, and splits what is more than its block
    if pixels < x.shape[-1]:
        pieces = ((piece for image in t.split(1) for piece in image.split(pixels, -1)) for t in tensors)
    else:
        pieces = (iter(t.split(pixels // x.shape[-1])) for t in tensors)
    yield from zip(*pieces, strict=True)


def _elements() -> int:
    """Of a slice."""
    threads = torch.get_num_threads()
    return CACHE if threads == 1 else GRAIN if threads == 2 else threads * CACHE


def fault_in(x: Tensor) -> Tensor:
    """Fresh memory, whose pages all threads have touched if the pass that fills it is left to one."""
    if x.numel() > WHOLE and torch.get_num_threads() == 2:
        x.zero_()
    return x


class Scratch:
    """Memory for the temporary of one slice (n, C, l), used again for the next: the first is the largest."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(0, dtype=dtype)

    def like(self, x: Tensor) -> Tensor:
        """A tensor of the shape of x, dense, with the classes where x has them; not initialised."""
        if self._buffer.numel() < x.numel():
            self._buffer = torch.empty(x.numel(), dtype=self._buffer.dtype)
        n, classes, pixels = x.shape
        flat = self._buffer[: x.numel()]
        return flat.view(n, pixels, classes).mT if x.stride(1) == 1 else flat.view(x.shape)
