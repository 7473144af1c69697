"""How it is timed: three clocks, rotated inputs, a cold cache; correctness before and after."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .providers import Loss

FLUSH_BYTES = 1 << 28
"""More than the second-level cache of any GPU so far; written before every timed run."""
SECONDS = 0.4
"""Spent on each series."""


class Series(NamedTuple):
    """Times of one thing, in milliseconds."""

    median: float
    p20: float
    p80: float
    count: int


def series(milliseconds: list[float]) -> Series:
    """Median, 20th and 80th percentile."""
    if len(milliseconds) < 2:
        return Series(milliseconds[0], milliseconds[0], milliseconds[0], 1)
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Series(statistics.median(milliseconds), fifths[0], fifths[3], len(milliseconds))


def one_pass(loss: Loss, backward: bool) -> Callable[[Tensor, Tensor], None]:
    """Forward, or forward and backward into a fresh gradient."""

    def run(logits: Tensor, target: Tensor) -> None:
        logits.grad = None
        value = loss(logits, target)
        if backward:
            value.backward()

    return run


def repeats(once: float) -> int:
    """How many runs of `once` seconds fill SECONDS."""
    return max(5, min(200, int(SECONDS / max(once, 1e-6))))


def clock(
    run: Callable[[Tensor, Tensor], None], inputs: list[tuple[Tensor, Tensor]], device: torch.device
) -> dict[str, Series]:
    """Time `run` over the inputs in turn.

    Returns:
        "end to end": from the call until the device is done; "host": until the call returns; on a GPU also "kernel":
        GPU time between two events around the call, queued behind the flush, so that the host is ahead.
    """
    cuda = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if cuda else None

    def settle() -> None:
        if flush is not None:
            flush.zero_()
            torch.cuda.synchronize()

    def timed(i: int) -> tuple[float, float]:
        settle()
        start = time.perf_counter()
        run(*inputs[i % len(inputs)])
        issued = time.perf_counter()
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (issued - start), 1e3 * (time.perf_counter() - start)

    for i in range(2):
        timed(i)
    count = repeats(timed(0)[1] / 1e3)
    pairs = [timed(i) for i in range(count)]
    found = {"end to end": series([end for _, end in pairs])}
    if flush is None:
        return found
    found["host"] = series([host for host, _ in pairs])
    events = []
    for i in range(count):
        flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The host needs about 0.1 ms a call and the flush about as long: two keep the queue filled.
        flush.zero_()
        before.record()
        run(*inputs[i % len(inputs)])
        after.record()
        events.append((before, after))
    torch.cuda.synchronize()
    found["kernel"] = series([before.elapsed_time(after) for before, after in events])
    return found


def graph(run: Callable[[Tensor, Tensor], None], inputs: tuple[Tensor, Tensor]) -> Series:
    """GPU time of one replay of `run` captured in a CUDA graph; the cache is flushed before each."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run(*inputs)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=inputs[0].device)
    times = []
    for _ in range(50):
        flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        captured.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return series(times)


def device_times(run: Callable[[Tensor, Tensor], None], inputs: tuple[Tensor, Tensor]) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel, memset and copy of one run on the GPU, in order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run(*inputs)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.elapsed_us()) for e in sorted(events, key=lambda e: e.time_range.start)]


def peak_bytes(run: Callable[[Tensor, Tensor], None], inputs: tuple[Tensor, Tensor]) -> int:
    """Most memory in use during one run, above what was in use before."""
    inputs[0].grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a large copy on this device, the median of several."""
    size = 1 << (30 if device.type == "cuda" else 27)
    source, copy = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    times = []
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        copy.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times[2:])


@contextlib.contextmanager
def freed(device: torch.device):  # type: ignore[no-untyped-def]
    """What was allocated inside goes back to the device."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
