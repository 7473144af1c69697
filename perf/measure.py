"""How it is timed: three clocks, sides that take turns, rotated inputs, a cold cache, a busy machine."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

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


def one_pass(loss: Loss, backward: bool) -> Callable[..., None]:
    """Forward, or forward and backward into a fresh gradient."""

    def run(values: Tensor, target: Tensor | None) -> None:
        values.grad = None
        value = loss(values, target)
        if backward:
            value.backward()

    return run


def repeats(once: float) -> int:
    """How many runs of `once` seconds fill SECONDS."""
    return max(5, min(200, int(SECONDS / max(once, 1e-6))))


def clock(
    runs: Mapping[str, Callable[..., None]], inputs: list[tuple[Any, ...]], device: torch.device
) -> dict[str, dict[str, Series]]:
    """Time each of `runs` over the inputs; they take turns, so that what else the machine does hits all alike.

    Returns:
        Of each, "end to end": from the call until the device is done; on a GPU also "host": until the call returns,
        and "kernel": GPU time between two events around the call, queued behind the flush, so that the host is ahead.
    """
    cuda = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if cuda else None

    def timed(run: Callable[..., None], i: int) -> tuple[float, float]:
        if flush is not None:
            flush.zero_()
            torch.cuda.synchronize()
        start = time.perf_counter()
        run(*inputs[i % len(inputs)])
        issued = time.perf_counter()
        if cuda:
            torch.cuda.synchronize()
        return 1e3 * (issued - start), 1e3 * (time.perf_counter() - start)

    for i in range(2):
        for run in runs.values():
            timed(run, i)
    count = repeats(sum(timed(run, 0)[1] for run in runs.values()) / len(runs) / 1e3)
    pairs = [{name: timed(run, i) for name, run in runs.items()} for i in range(count)]
    found = {name: {"end to end": series([pair[name][1] for pair in pairs])} for name in runs}
    if flush is None:
        return found
    for name, run in runs.items():
        found[name]["host"] = series([pair[name][0] for pair in pairs])
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
        found[name]["kernel"] = series([before.elapsed_time(after) for before, after in events])
    return found


# It is told who started it: one that asks could be too late, and would spin for ever beside whoever adopted it.
SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(100_000): pass"


def spin() -> subprocess.Popen[bytes]:
    """A process that does nothing but spin until this one ends."""
    return subprocess.Popen([sys.executable, "-S", "-c", SPIN, str(os.getpid())], stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def spinning(processes: int) -> Iterator[None]:
    """So many processes that do nothing but spin; they end with the context, or with this process if it is killed."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(processes):
            started.append(spin())
        time.sleep(0.5 if processes else 0)  # they are under way
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def graph(run: Callable[..., None], inputs: tuple[Any, ...]) -> Series:
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


def device_times(run: Callable[..., None], inputs: tuple[Any, ...]) -> list[tuple[str, float]]:
    """Name and microseconds of every kernel, memset and copy of one run on the GPU, in order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run(*inputs)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.elapsed_us()) for e in sorted(events, key=lambda e: e.time_range.start)]


def peak_bytes(run: Callable[..., None], inputs: tuple[Any, ...]) -> int:
    """Most memory in use during one run, above what was in use before; on a CPU what PyTorch allocates there."""
    inputs[0].grad = None
    if inputs[0].device.type == "cpu":
        return _peak_on_the_cpu(run, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What libraries write to the standard error on their own is dropped: the profiler remarks on each use."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak_on_the_cpu(run: Callable[..., None], inputs: tuple[Any, ...]) -> int:
    """From every allocation and release that PyTorch's profiler sees (`tracemalloc` does not see what tensors hold)."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with _silent(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run(*inputs)
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(sizes, key=lambda event: event[0]):
        now += size
        peak = max(peak, now)
    return peak


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
def freed(device: torch.device) -> Iterator[None]:
    """What was allocated inside goes back to the device."""
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
