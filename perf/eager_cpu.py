"""The eager backend on the CPU against F.cross_entropy: forward and backward, side by side in one run.

    python perf/eager_cpu.py [--shape 2 19 550 550] [--repeats 15]

The goal of the design is a ratio of at most 0.6 at (2, 19, 550, 550) float32. The two sides take turns, so that
whatever else the machine does hits both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import lmp_triton


def forward_backward(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> float:
    """Seconds for one forward and backward."""
    logits.grad = None
    start = time.perf_counter()
    loss(logits, target).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[2, 19, 550, 550], help="N C *spatial")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    n, classes, *spatial = arguments.shape
    logits = torch.randn(n, classes, *spatial, requires_grad=True)
    target = torch.randint(classes, (n, *spatial))

    def lmp_sorted(x: Tensor, y: Tensor) -> Tensor:
        """The same loss the usual way: all losses sorted, prefix sums of powers (float64, or they underflow)."""
        losses = F.cross_entropy(x, y, reduction="none").flatten(1)
        with torch.no_grad():
            q, pixels = 1.3 / 0.3, losses.shape[1]
            m = 0.25 * pixels
            ascending = losses.double().sort(1).values
            powers = (ascending / ascending[:, -1:]).pow(q)
            sums = powers.cumsum(1)
            c = m - pixels + torch.arange(1, pixels + 1)
            first = (c * powers - sums <= 0).sum(1, keepdim=True)
            before = (first - 1).clamp_min(0)
            alpha = ascending[:, -1:] * (sums.gather(1, before) / (m - pixels + first)).pow(1 / q)
            tau = pixels ** (-1 / q) * m ** (-1 / 1.3)
            weights = tau * (losses / alpha).clamp_max(1).pow(q - 1)
        return (weights * losses).sum(1).mean()

    sides: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "F.cross_entropy": F.cross_entropy,
        "lmp_triton, eager": lambda x, y: lmp_triton.loss_max_pooling(x, y, backend="eager"),
        "sort and prefix sums": lmp_sorted,
    }
    ours, sorted_loss = (sides[name](logits, target).item() for name in list(sides)[1:])
    assert abs(ours - sorted_loss) < 1e-4 * ours, (ours, sorted_loss)

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(arguments.repeats + 2):
        for name, loss in sides.items():
            elapsed = forward_backward(loss, logits, target)
            if repeat >= 2:
                seconds[name].append(elapsed)
    base = statistics.median(seconds["F.cross_entropy"])
    rows = []
    for name, times in seconds.items():
        low, middle, high = (1e3 * x for x in pd.Series(times).quantile([0.2, 0.5, 0.8]))
        rows.append({"": name, "ms": middle, "p20": low, "p80": high, "ratio": middle / 1e3 / base})
    print(f"{tuple(arguments.shape)} float32, forward + backward, {torch.get_num_threads()} threads of {cpu_name()}, ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {arguments.repeats} repeats")
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.2f}"))


def cpu_name() -> str:
    """The processor's name, as Linux tells it."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "an unknown processor"


if __name__ == "__main__":
    main()
