"""What is timed: shapes, types, layouts and losses, as data."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Workload(NamedTuple):
    """One batch of logits and labels."""

    shape: tuple[int, ...]
    """(N, C, *spatial)."""
    dtype: str = "bfloat16"
    layout: str = "contiguous"
    """or "channels_last"."""
    losses: str = "untrained"
    """or "trained": most pixels sure of their label, one in twenty wrong."""

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        size = "x".join(map(str, self.shape))
        return f"{size} {self.dtype}" + ("" if self.layout == "contiguous" else " channels_last") + f" {self.losses}"

    @property
    def scope(self) -> str:
        """(N, C) is pooled as one segment."""
        return "batch" if len(self.shape) == 2 else "image"

    @property
    def logits_bytes(self) -> int:
        """Of the logits."""
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    def make(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        """Logits, a leaf that wants a gradient, and target, int64, one pixel in twenty ignored (−100)."""
        generator = torch.Generator(device).manual_seed(seed)
        n, classes, *spatial = self.shape
        target = torch.randint(classes, (n, *spatial), generator=generator, device=device)
        spread = 0.4 if self.losses == "untrained" else 1.0
        logits = torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=device)
        logits.normal_(0, spread, generator=generator)
        if self.losses == "trained":
            right = torch.rand(target.shape, generator=generator, device=device) < 0.95
            logits.scatter_add_(1, target.unsqueeze(1), (8 * right).to(logits.dtype).unsqueeze(1))
        target[torch.rand(target.shape, generator=generator, device=device) < 0.05] = -100
        if self.layout == "channels_last":
            logits = logits.contiguous(memory_format=torch.channels_last)
        return logits.requires_grad_(), target


PAPER = ((2, 19, 550, 550), (4, 21, 321, 321))
SHAPES = (
    *PAPER,
    (8, 19, 512, 1024),
    (8, 19, 1024, 1024),
    (16, 150, 512, 512),
    (2, 19, 1024, 2048),
    (1, 847, 640, 640),
    (2, 4, 128, 128, 128),
    (65536, 1000),
)
CORE = tuple(Workload(s) for s in (SHAPES[0], SHAPES[1], SHAPES[3], SHAPES[4])) + (
    Workload(SHAPES[0], losses="trained"),
    Workload(SHAPES[3], losses="trained"),
    Workload(SHAPES[3], layout="channels_last"),
)
SETS = {
    "core": CORE,
    "full": tuple(
        dict.fromkeys(
            CORE
            + tuple(Workload(s, losses=losses) for losses in ("untrained", "trained") for s in SHAPES)
            + tuple(Workload(s, layout="channels_last") for s in SHAPES[:4])
            + tuple(Workload(s, dtype) for dtype in ("float32", "float16") for s in SHAPES)
        )
    ),
    "cpu": tuple(
        Workload(shape, "float32", losses=losses)
        for shape in (*PAPER, (1, 19, 512, 1024), (1, 150, 256, 256), (4096, 1000))
        for losses in ("untrained", "trained")
    ),
    "tiny": (Workload((2, 5, 24, 20), "float32"), Workload((300, 7), "float32", losses="trained")),
}
"""core: what a rented GPU does in minutes; full: everything; cpu: what a CPU does in minutes; tiny: for the tests."""
