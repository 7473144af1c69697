"""The sets of `lmp-triton bench run`: what is timed against what, and how, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from . import host, timing
from .providers import PROVIDERS, SOLVERS, UPSAMPLED, Provider, cross_entropy, nothing_at_all, ours, passes_alone, tuned
from .workloads import (
    BUSY,
    BUSY_SEGMENTS,
    CORE,
    CPU,
    EAGER,
    FULL,
    PAPER,
    SEGMENTS,
    TINY,
    TINY_SEGMENTS,
    TINY_UPSAMPLING,
    UPSAMPLING,
    UPSAMPLING_CPU,
    Losses,
    Workload,
)

Part = tuple[tuple[Workload | Losses, ...], Mapping[str, Provider]]
"""Workloads, and what is timed on each of them."""


class Set(NamedTuple):
    """One thing to find out."""

    about: str
    parts: tuple[Part, ...]
    rows_of: Callable[..., dict[str, list[timing.Row]]] = timing.rows_of

    @property
    def providers(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(dict.fromkeys(name for _workloads, providers in self.parts for name in providers))


_EAGER = ("lmp_triton, eager", "lmp_triton, eager, compiled", "LMP by torch.sort", "F.cross_entropy")
EAGERS = {name: PROVIDERS[name] for name in (*_EAGER, "F.cross_entropy, compiled")}
PASSES = {
    "the passes over logits alone": Provider(passes_alone),
    "an autograd.Function of nothing": Provider(nothing_at_all),
}
EAGER_SOLVERS = {name: SOLVERS[name] for name in ("lmp_triton, eager", "LMP by torch.sort")}
HOST = {
    "lmp_triton": Provider(ours("triton", standing_in=True), pooled=True),
    "lmp_triton, cooperative solve": Provider(ours("triton", "select", "solve", standing_in=True), pooled=True),
    "lmp_triton, cooperative forward": Provider(ours("triton", "select", "forward", standing_in=True), pooled=True),
    "F.cross_entropy": Provider(cross_entropy),
}
TUNED = {
    "as it is": Provider(tuned(), pooled=True),
    **{
        f"approximation {name}": Provider(tuned(approximation=name), pooled=True) for name in ("none", "log2", "approx")
    },
    **{f"{warps} warps": Provider(tuned(warps=warps), pooled=True) for warps in (4, 8, 16)},
    **{f"{n} programs": Provider(tuned(per_multiprocessor=n), pooled=True) for n in (1, 2, 4)},
    **{f"capacity {n}": Provider(tuned(capacity=n), pooled=True) for n in (2048, 8192, 32768)},
}
SETS = {
    "core": Set("the paper's crops, a city, many classes: what a GPU does in minutes", ((CORE, PROVIDERS),)),
    "full": Set("every shape, type, layout and kind of losses", ((FULL, PROVIDERS),)),
    "cpu": Set("what a CPU does in minutes", ((CPU, PROVIDERS),)),
    "eager": Set("the eager backend against F.cross_entropy, and what limits it", ((EAGER, EAGERS | PASSES),)),
    "busy": Set(
        "the eager backend quiet, and beside one spinning process a core",
        ((BUSY, EAGERS), (BUSY_SEGMENTS, EAGER_SOLVERS)),
    ),
    "solvers": Set("the solver alone, against sort, topk and mpl.pytorch's algorithm", ((SEGMENTS, SOLVERS),)),
    "upsampling": Set("logits smaller than the labels: in one, or interpolated first", ((UPSAMPLING, UPSAMPLED),)),
    "upsampling-cpu": Set("the same, as much as a CPU does in minutes", ((UPSAMPLING_CPU, UPSAMPLED),)),
    "host": Set(
        "host time up to the driver, on a GPU that is not there", (((Workload(PAPER[0]),), HOST),), host.rows_of
    ),
    "tune": Set("entries of the table of the search beside each other, on a GPU", ((CORE, TUNED),)),
    "tiny": Set("for the tests", ((TINY, PROVIDERS), (TINY_SEGMENTS, SOLVERS), (TINY_UPSAMPLING, UPSAMPLED))),
}
