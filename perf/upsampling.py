"""What the kernels for upsampled logits should take on a GPU, forward and backward: a model, not a measurement.

    python perf/upsampling.py [--architecture 90] [--strides 4 8 16]     labels (8, 1024, 1024), 19 classes, bf16

(Measured, and beside interpolation and cross-entropy: `lmp-triton bench run --set upsampling`, or upsampling-cpu.)

The model is that of perf/static.py and perf/roofline.py: of each launch the larger of bytes over bandwidth and issue
slots over the issue rate, and LAUNCH_US. Its floor has three parts: the bytes that must move (labels and coarse logits
read, the gradient of these written, 9 bytes a pixel written, 13 read); an exponential of every class of every pixel,
each way, where none is spared, 16 a cycle and multiprocessor; and what is counted here, all instructions issued. The
largest is the unit that limits. Where a row of a program has labels of one or two of its parts of the classes, what
these cost is not counted ("slots, most" of perf/static.py has all).

Memory is counted, not modelled: the most above logits and labels, from PyTorch's allocations while the launches happen
on a GPU that is not there, and of F.interpolate + F.cross_entropy while a CPU does it for one image, times the images.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
import torch.nn.functional as F
from lmp_triton.perf import catalogue, measure, providers, roofline, static
from lmp_triton.perf.compiled import read
from lmp_triton.perf.standin import StandIn
from torch import Tensor

import lmp_triton


def model(architecture: int, strides: list[int]) -> pd.DataFrame:
    """Microseconds of each launch of forward and backward in bf16, and the floors."""
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
                    extra = 4 * nodes + (4 * task.sums.numel() if "gradient" in launch.name else 0)
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
                **memory(architecture, shape, stride),
            }
        )
    return pd.DataFrame(rows)


def memory(architecture: int, shape: tuple[int, int, int, int], stride: int) -> dict[str, float]:
    """MB above logits and labels of that (N, C, H, W), fused and not."""
    images, classes, *size = shape
    logits = torch.randn(images, classes, *(n // stride for n in size)).bfloat16().requires_grad_()
    target = torch.zeros(images, *size, dtype=torch.long)

    def fused(logits: Tensor, target: Tensor) -> None:
        loss = lmp_triton.upsampled_loss_max_pooling(logits, target, backend="triton")
        torch.autograd.grad(loss, logits, torch.empty_like(loss))

    with StandIn(architecture, roofline.DEVICES[architecture].multiprocessors, remember=False):
        ours = measure.peak_bytes(fused, (logits, target)) / 1e6
    one = logits.detach()[:1].requires_grad_(), target[:1]
    theirs = images * measure.peak_bytes(measure.one_pass(providers.large(F.cross_entropy), True), one) / 1e6
    return {"MB": ours, "MB, interpolated + cross-entropy": theirs, "of its memory": ours / theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strides", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--architecture", type=int, default=90)
    options = parser.parse_args()
    print(model(options.architecture, options.strides).T.to_string(float_format=lambda x: f"{x:.3g}"))


if __name__ == "__main__":
    main()
