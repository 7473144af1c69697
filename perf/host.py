"""Host time of a call up to the driver's launch function, on a GPU that is not there (`standin`)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from . import measure
from .providers import Provider
from .timing import Row, problem, row, said
from .workloads import Workload


def rows_of(
    workload: Workload, providers: Mapping[str, Provider], device: torch.device, roof: float
) -> dict[str, list[Row]]:
    """As `timing.rows_of`; the clock is the host's, one thread. Nothing runs, so nothing is checked.

    F.cross_entropy is the exception: it takes a few pixels, which the CPU is through with in no time.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        reason = "not available: TRITON_INTERPRET=1 is set, and nothing is compiled then"
        return {name: problem(reason) for name in providers}
    from .standin import StandIn

    found: dict[str, list[Row]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with StandIn():
            untouched = torch.empty(workload.shape, dtype=getattr(torch, workload.dtype)).requires_grad_()
            labels = torch.empty(workload.shape[0], *workload.shape[2:], dtype=torch.long)
            few = torch.randn(1, 2, 4, requires_grad=True), torch.zeros(1, 4, dtype=torch.long)
            sides = {}
            for name, provider in providers.items():
                try:
                    sides[name] = provider.make(workload), ((untouched, labels) if provider.pooled else few)
                    torch.autograd.grad(sides[name][0](*sides[name][1]), sides[name][1][0])  # compiles
                except Exception as error:
                    found[name] = problem(said(error))
                    sides.pop(name, None)
            for backward in (False, True):
                runs = {name: _one_pass(*side, backward) for name, side in sides.items()}
                for name, clocks in measure.clock(runs, [()], torch.device("cpu")).items():
                    shared: Row = {"pass": "forward+backward" if backward else "forward"}
                    found.setdefault(name, []).append(shared | row("host", clocks["end to end"], 0, 0.0))
    finally:
        torch.set_num_threads(threads)
    return found


def _one_pass(loss, inputs, backward):  # type: ignore[no-untyped-def]
    def run() -> None:
        value = loss(*inputs)
        if backward:
            torch.autograd.grad(value, inputs[0])  # no gradient is left behind, and none is added up

    return run
