"""Upsampling and loss apart and in one: peak memory and time, side by side, forward and backward on this machine's CPU.

    python perf/upsampling.py [--shape 2 19 544 544] [--strides 4 8 16] [--threads 1] [--repeats 7] [--csv FILE]
    python perf/upsampling.py --model [--architecture 90]    what the kernels should take on a GPU, (8, 19, 1024, 1024)

The shape is that of the labels and the classes, (N, C, H, W); strides: how much smaller the logits are, float32. Memory
is the most above the inputs during one step, from every allocation and release that PyTorch's profiler sees of the CPU
allocator (`tracemalloc` does not see what tensors hold). Times are medians; all ways take turns.

The model is that of perf/static.py and perf/roofline.py: of each launch the larger of bytes over bandwidth and issue
slots over the issue rate, and LAUNCH_US. Its floor has three parts: the bytes that must move (labels and coarse logits
read, the gradient of these written, 9 bytes a pixel written, 13 read); an exponential of every class of every pixel,
each way, where none is spared, 16 a cycle and multiprocessor; and what is counted here, all instructions issued. The
largest is the unit that limits. Where a row of a program has labels of one or two of its parts of the classes, what
these cost is not counted ("slots, most" of perf/static.py has all).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import lmp_triton

Loss = Callable[[Tensor, Tensor], Tensor]


def _large(logits: Tensor, target: Tensor) -> Tensor:
    return F.interpolate(logits, target.shape[1:], mode="bilinear")


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(_large(logits, target), target)


WAYS: dict[str, Loss] = {
    "F.interpolate + F.cross_entropy": _cross_entropy,
    "F.interpolate + F.cross_entropy, compiled": torch.compile(_cross_entropy, fullgraph=True, dynamic=False),
    "upsampled, ratio=1 (cross-entropy)": lambda x, y: lmp_triton.upsampled_loss_max_pooling(x, y, ratio=1.0),
    "F.interpolate + loss_max_pooling": lambda x, y: lmp_triton.loss_max_pooling(_large(x, y), y),
    "upsampled_loss_max_pooling": lambda x, y: lmp_triton.upsampled_loss_max_pooling(x, y),
}
BASE = next(iter(WAYS))


def step(loss: Loss, logits: Tensor, target: Tensor) -> None:
    """Forward and backward."""
    logits.grad = None
    loss(logits, target).backward()


def peak_bytes(loss: Loss, logits: Tensor, target: Tensor) -> int:
    """Most memory in use during a step, above what was in use before; the small gradient counts."""
    logits.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(loss, logits, target)
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(sizes, key=lambda event: event[0]):
        now += size
        peak = max(peak, now)
    return peak


def milliseconds(logits: Tensor, target: Tensor, repeats: int) -> dict[str, float]:
    """Medians."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats + 1):  # the first is not counted
        for name, loss in WAYS.items():
            start = time.perf_counter()
            step(loss, logits, target)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(found[1:]) for name, found in times.items()}


def model(architecture: int, strides: list[int]) -> pd.DataFrame:
    """Microseconds of each launch of forward and backward in bf16, and the floors."""
    from lmp_triton.perf import catalogue, roofline, static
    from lmp_triton.perf.compiled import read
    from lmp_triton.perf.standin import StandIn

    images, classes, height, width = shape = (8, 19, 1024, 1024)
    pixels, device = images * height * width, roofline.DEVICES[architecture]
    rows = []
    for stride in strides:
        nodes = pixels // stride**2 * classes
        with StandIn(architecture, device.multiprocessors) as gpu:
            catalogue.upsampled((images, classes, height // stride, width // stride), (height, width))
            found: dict[str, float] = {}
            for launch in gpu.launches:
                cost, code = catalogue.cost(launch), read(launch.compiled)
                taken = static.issue(cost, code, device)
                tiles = pixels / cost.pixels
                extra = 0.0
                if cost.walk == "cells":
                    task = launch.arguments[0]
                    tiles = launch.programs * task.grid.height
                    strips = task.grid.strips + height // stride
                    sums = 4 * 2 * classes * images * strips * (width // stride + 1) * launch.arguments[1].spans
                    extra = 4 * nodes + (sums if "gradient" in launch.name else 0)
                elif "nodes" in launch.name:
                    tiles = launch.programs
                    cost = cost._replace(pixels=launch.arguments[1].block)
                by_issue, by_bytes = roofline.pixel_ns(device, taken.least, cost.read, cost.written)
                us = max(tiles * cost.pixels * by_issue, tiles * cost.pixels * by_bytes + extra / device.gb_s) / 1e3
                us += roofline.once_us(device, taken.once, code.warps, launch.programs) + roofline.LAUNCH_US
                if launch.name == "select_kernel" and launch is gpu.launches[-3]:
                    us += roofline.alone_us(device, taken.last, code.warps)
                name = launch.name.removesuffix("_kernel")
                found[name] = found.get(name, 0.0) + us
        issued = sum(us for name, us in found.items() if name.startswith("upsampled"))
        per_us = device.multiprocessors * device.ghz * 1e3
        rows.append(
            {"labels": "x".join(map(str, shape)), "stride": stride, "device": device.name}
            | {f"{name} us": us for name, us in found.items()}
            | {
                "all us": sum(found.values()) + roofline.LAUNCH_US,
                "bytes floor us": (pixels * (8 + 9 + 4 + 9) + 4 * nodes) / device.gb_s / 1e3,
                "exponentials us": 2 * pixels * classes / 16 / per_us,
                "issued us": issued,
                "large logits, floor us": roofline.floors(device, pixels, classes)[0],
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs=4, type=int, default=[2, 19, 544, 544])
    parser.add_argument("--strides", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--csv", help="write the table there as well")
    parser.add_argument("--model", action="store_true")
    parser.add_argument("--architecture", type=int, default=90)
    options = parser.parse_args()
    if options.model:
        print(model(options.architecture, options.strides).T.to_string(float_format=lambda x: f"{x:.3g}"))
        return
    torch.set_num_threads(options.threads)
    images, classes, height, width = options.shape
    rows = []
    for stride in options.strides:
        logits = torch.randn(images, classes, -(-height // stride), -(-width // stride), requires_grad=True)
        target = torch.randint(classes, (images, height, width))
        times = milliseconds(logits, target, options.repeats)
        peaks = {name: peak_bytes(loss, logits, target) for name, loss in WAYS.items()}
        for name in WAYS:
            rows.append(
                {
                    "labels": "x".join(map(str, options.shape)),
                    "stride": stride,
                    "way": name,
                    "peak MB": round(peaks[name] / 1e6, 1),
                    "of its memory": round(peaks[name] / peaks[BASE], 3),
                    "ms": round(times[name], 1),
                    "of its time": round(times[name] / times[BASE], 2),
                    "threads": options.threads,
                    "torch": torch.__version__,
                }
            )
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if options.csv:
        table.to_csv(options.csv, index=False)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
