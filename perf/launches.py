"""What one call launches and compiles, on a GPU that is not there (`standin`).

    python perf/launches.py [--json] [--capability 90]

launches    of every pipeline, memsets included, and which of them are cooperative; what happens where those don't fit
compiled    kernels compiled anew while p, ratio, ignore_index and sizes change: none, once a p inside and one outside
            of the range of approximate powers was seen (`kernels.solution.power_for`)

What the host pays up to the driver: `lmp-triton bench run --set host`.
"""

from __future__ import annotations

import argparse
import json

import torch
from lmp_triton.perf.providers import asking
from lmp_triton.perf.standin import StandIn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lmp_triton
from lmp_triton import settings

SHAPES = {
    "16x19x40x40 (1600 pixels an image)": (16, 19, 40, 40),
    "2x19x550x550": (2, 19, 550, 550),
    "8x19x1024x1024": (8, 19, 1024, 1024),
    "32x19x100x100": (32, 19, 100, 100),
}


class Memsets(TorchDispatchMode):
    """Counts what fills fresh memory with zeros."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function.__name__.split(".")[0] in ("zeros", "zeros_like", "zero_", "fill_", "full")
        return function(*args, **(kwargs or {}))


def inputs(shape: tuple[int, ...], layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Memory nobody has touched: logits bf16, target int64."""
    logits = torch.empty(shape, dtype=torch.bfloat16)
    if layout == "channels_last":
        logits = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    return logits.requires_grad_(), torch.empty(shape[0], *shape[2:], dtype=torch.long)


def call(logits: Tensor, target: Tensor, **options: object) -> Tensor:
    """Forward."""
    return lmp_triton.loss_max_pooling(logits, target, backend="triton", **options)  # type: ignore


def pipelines(gpu: StandIn) -> list[dict[str, object]]:
    """One row a shape and pipeline."""
    rows: list[dict[str, object]] = []
    for shape_name, shape in SHAPES.items():
        for name in settings.WAYS:
            logits, target = inputs(shape)
            gpu.launches.clear()
            with asking(name), Memsets() as memsets:
                loss = call(logits, target)
                forward = list(gpu.launches)
                gpu.launches.clear()
                torch.autograd.grad(loss, logits, torch.empty(()))
            rows.append(
                {
                    "shape": shape_name,
                    "cooperative": name or "none",
                    "memsets": memsets.count,
                    "forward": [launch.name for launch in forward],
                    "cooperative launches": [launch.name for launch in forward if launch.cooperative],
                    "programs": [launch.programs for launch in forward],
                    "backward": [launch.name for launch in gpu.launches],
                    "in all": memsets.count + len(forward) + len(gpu.launches),
                }
            )
    return rows


def recompilations(gpu: StandIn) -> int:
    """Kernels compiled while only values and sizes change; divisibility by 16 and the sort's run length stay."""
    values: list[tuple[float, float, int, tuple[int, ...]]] = [
        (1.3, 0.25, 255, (2, 19, 96, 96)),
        (1.01, 0.25, 255, (2, 19, 96, 96)),
        (1.0, 1.0, -1, (2, 19, 96, 96)),
        (1.7, 0.1, -100, (3, 19, 112, 128)),
        (float("inf"), 0.5, 2**40, (5, 19, 128, 160)),
    ]
    counts = []
    for p, ratio, ignore_index, shape in values:
        logits, target = inputs(shape)
        call(logits, target, p=p, ratio=ratio, ignore_index=ignore_index).backward()
        counts.append(len(gpu.compiled))
    return counts[-1] - counts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--capability", type=int, default=90)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with StandIn(options.capability) as gpu:
        found: dict[str, object] = {"launches": pipelines(gpu), "compiled": recompilations(gpu)}
    with StandIn(options.capability, refuse=True) as gpu:
        found["refused"] = pipelines(gpu)
    with StandIn(options.capability, multiprocessors=4) as gpu:
        found["no room"] = pipelines(gpu)
    if options.json:
        print(json.dumps(found))
        return
    import pandas as pd

    pd.set_option("display.width", 250, "display.max_colwidth", 80)
    print(f"kernels compiled anew for new values and sizes: {found['compiled']}")
    for title in ("launches", "refused", "no room"):
        print(f"\n{title}")
        print(pd.DataFrame(found[title]).to_string(index=False))


if __name__ == "__main__":
    main()
