"""What is timed: shapes, types, layouts and losses, as data."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
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
    busy: bool = False
    """Timed beside one spinning process a core."""
    p: float = 1.3
    ratio: float = 0.25
    stride: int = 1
    """How much smaller the logits are than the labels, whose (N, C, *spatial) the shape is then."""

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        size = "x".join(map(str, self.shape)) + (f" from stride {self.stride}" if self.stride > 1 else "")
        layout = "" if self.layout == "contiguous" else " channels_last"
        return f"{size} {self.dtype}{layout} {self.losses}" + (" busy" if self.busy else "")

    @property
    def scope(self) -> str:
        """(N, C) is pooled as one segment."""
        return "batch" if len(self.shape) == 2 else "image"

    @property
    def logits_bytes(self) -> int:
        """Of the logits."""
        return math.prod(self._logits_shape) * getattr(torch, self.dtype).itemsize

    @property
    def _logits_shape(self) -> tuple[int, ...]:
        n, classes, *spatial = self.shape
        return (n, classes, *(-(-x // self.stride) for x in spatial))

    def make(self, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
        """Logits, a leaf that wants a gradient, and target, int64, one pixel in twenty ignored (−100)."""
        generator = torch.Generator(device).manual_seed(seed)
        n, classes, *spatial = self._logits_shape
        target = torch.randint(classes, (n, *spatial), generator=generator, device=device)
        spread = 0.4 if self.losses == "untrained" else 1.0
        logits = torch.empty(self._logits_shape, dtype=getattr(torch, self.dtype), device=device)
        logits.normal_(0, spread, generator=generator)
        if self.losses == "trained":
            right = torch.rand(target.shape, generator=generator, device=device) < 0.95
            logits.scatter_add_(1, target.unsqueeze(1), (8 * right).to(logits.dtype).unsqueeze(1))
        if self.stride > 1:  # squares of one label
            for dim, size in enumerate(self.shape[2:], 1):
                target = target.repeat_interleave(self.stride, dim).narrow(dim, 0, size)
            target = target.contiguous()
        target[torch.rand(target.shape, generator=generator, device=device) < 0.05] = -100
        if self.layout == "channels_last":
            logits = logits.contiguous(memory_format=torch.channels_last)
        return logits.requires_grad_(), target


class Losses(NamedTuple):
    """One segment of losses, for the solvers alone."""

    length: int
    losses: str
    """untrained: about log C each; trained: one in twenty high; well trained: one in a hundred, the others about 10^-4;
    heavy tail; all equal; thirty orders of magnitude."""
    p: float = 1.3
    ratio: float = 0.25
    busy: bool = False

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        return f"{self.length} losses {self.losses} p={self.p:g}" + (" busy" if self.busy else "")

    @property
    def logits_bytes(self) -> int:
        """Of the losses: there are no logits."""
        return 4 * self.length

    def make(self, device: torch.device, seed: int) -> tuple[Tensor, None]:
        """Losses (1, length) float32, a leaf that wants a gradient; no mask."""
        rng = np.random.default_rng(seed)
        n = self.length
        values = {
            "untrained": lambda: 2.94 + 0.3 * rng.standard_normal(n),
            "trained": lambda: np.where(rng.random(n) < 0.05, rng.exponential(3, n), rng.exponential(0.01, n)),
            "well trained": lambda: np.where(rng.random(n) < 0.01, rng.exponential(2, n), 10 ** rng.normal(-4, 1, n)),
            "heavy tail": lambda: rng.lognormal(0, 5, n),
            "all equal": lambda: np.full(n, 0.7),
            "thirty orders": lambda: 10.0 ** -rng.uniform(0, 30, n),
        }[self.losses]()
        losses = torch.as_tensor(values, dtype=torch.float32).abs().unsqueeze(0).to(device)
        return losses.requires_grad_(), None


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
FULL = tuple(
    dict.fromkeys(
        CORE
        + tuple(Workload(s, losses=losses) for losses in ("untrained", "trained") for s in SHAPES)
        + tuple(Workload(s, layout="channels_last") for s in SHAPES[:4])
        + tuple(Workload(s, dtype) for dtype in ("float32", "float16") for s in SHAPES)
    )
)
CPU = tuple(
    Workload(shape, "float32", losses=losses)
    for shape in (*PAPER, (1, 19, 512, 1024), (1, 150, 256, 256), (4096, 1000))
    for losses in ("untrained", "trained")
)
AT_CROP = tuple(Workload(PAPER[0], "float32", losses=losses) for losses in ("untrained", "trained"))
EAGER = (
    *AT_CROP,
    Workload((2, 19, 400, 400), "float32"),
    Workload((2, 19, 256, 256), "float32"),
    Workload((8, 11, 64, 64), "float32"),
    Workload((4096, 1000), "float32"),
    Workload((64, 10), "float32"),
)
BUSY = tuple(workload._replace(busy=busy) for workload in AT_CROP for busy in (False, True))
BUSY_SEGMENTS = tuple(Losses(605_000, "trained", busy=busy) for busy in (False, True))
SEGMENTS = tuple(
    Losses(n, losses, p)
    for n in (2_000, 50_000, 302_500, 1_048_576)
    for losses in ("untrained", "trained")
    for p in (1.0, 1.3)
)
UPSAMPLING = tuple(Workload((8, 19, 1024, 1024), losses="trained", stride=stride) for stride in (4, 8, 16))
UPSAMPLING_CPU = tuple(Workload((2, 19, 544, 544), "float32", losses="trained", stride=s) for s in (4, 8, 16))
TINY = (Workload((2, 5, 24, 20), "float32"), Workload((300, 7), "float32", losses="trained"))
TINY_UPSAMPLING = (Workload((2, 5, 23, 20), "float32", stride=4),)
TINY_SEGMENTS = (Losses(500, "trained", p=1.0), Losses(500, "untrained"))
