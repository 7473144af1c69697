"""The rows of one workload: what can run is checked, timed and checked again; what can't says why."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import measure
from .providers import Loss, Provider, Unavailable, check
from .workloads import Losses, Workload

Row = dict[str, object]


def said(error: Exception) -> str:
    """How a row says what was raised."""
    return f"failed: {type(error).__name__}: {str(error).strip()[:200]}"


def problem(reason: str) -> list[Row]:
    """The one row of a provider that has no times."""
    return [{"pass": "", "clock": "", "status": reason}]


def rows_of(
    workload: Workload | Losses, providers: Mapping[str, Provider], device: torch.device, roof: float
) -> dict[str, list[Row]]:
    """The rows of each provider, timed in turns; of one that can't run or is wrong, one row that says why.

    Args:
        roof: bytes a second that a large copy reaches on the device.
    """
    found: dict[str, list[Row]] = {}
    try:
        inputs = _inputs(workload, device)
        ready: dict[str, Loss] = {}
        shared: dict[str, Row] = {}
        for name, provider in providers.items():
            try:
                loss = provider.make(workload)
                first = _first_call(loss, inputs[0], device)
                reason = _wrong(loss, provider, inputs[-1], workload)
                if reason:
                    found[name] = problem(reason)
                else:
                    ready[name], shared[name] = loss, {"first_call_s": first}
            except Unavailable as error:
                found[name] = problem(f"not available: {error}")
            except Exception as error:  # whatever a peer's code or compiler raises is a result, too
                found[name] = problem(said(error))
        if ready:
            timed = _timed(workload, ready, inputs, device, roof)
            for name, rows in timed.items():  # what was timed must still be right
                reason = _wrong(ready[name], providers[name], inputs[-1], workload)
                found[name] = problem(reason) if reason else [shared[name] | row for row in rows]
    except Exception as error:
        found |= {name: problem(said(error)) for name in providers if name not in found}
    return found


def _inputs(workload: Workload | Losses, device: torch.device) -> list[tuple[Any, ...]]:
    sets = max(1, min(3, (1 << 33) // (3 * workload.logits_bytes))) if device.type == "cuda" else 1
    return [workload.make(device, seed) for seed in range(sets)]


def _first_call(loss: Loss, inputs: tuple[Any, ...], device: torch.device) -> float:
    start = time.perf_counter()
    loss(*inputs).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _wrong(loss: Loss, provider: Provider, inputs: tuple[Any, ...], workload: Workload | Losses) -> str | None:
    inputs[0].grad = None
    value: Tensor = loss(*inputs)
    value.backward()
    if provider.pooled:
        return check(inputs, value.detach(), workload)
    return None if value.isfinite() and inputs[0].grad.isfinite().all() else "wrong: not finite"


def _timed(
    workload: Workload | Losses,
    losses: Mapping[str, Loss],
    inputs: list[tuple[Any, ...]],
    device: torch.device,
    roof: float,
) -> dict[str, list[Row]]:
    cuda = device.type == "cuda"
    rows: dict[str, list[Row]] = {name: [] for name in losses}
    beside = measure.spinning(os.cpu_count() or 1) if workload.busy else contextlib.nullcontext()
    with beside:
        for backward in (False, True):
            runs = {name: measure.one_pass(loss, backward) for name, loss in losses.items()}
            least = workload.logits_bytes * (3 if backward else 1)  # reads and writes that can't be avoided
            for name, clocks in measure.clock(runs, inputs, device).items():
                shared: Row = {"pass": "forward+backward" if backward else "forward"}
                every: dict[str, measure.Series | str] = dict(clocks)
                shared |= _of_one_run(runs[name], inputs[0])
                if cuda:
                    try:
                        every["graph"] = measure.graph(runs[name], inputs[0])
                    except Exception as error:
                        every["graph"] = said(error)
                rows[name] += [shared | row(clock, times, least, roof) for clock, times in every.items()]
    return rows


def row(clock: str, times: measure.Series | str, least: int, roof: float) -> Row:
    """Of one clock; `least`: bytes that must move."""
    if isinstance(times, str):
        return {"clock": clock, "status": times}
    found: Row = {"clock": clock, "status": "ok", "ms": times.median, "p20": times.p20, "p80": times.p80}
    found["count"] = times.count
    if clock != "host" and roof:
        rate = least / times.median / 1e6
        found |= {"effective_gb_s": rate, "percent_of_device": 1e11 * rate / roof}
    return found


def _of_one_run(run: Any, inputs: tuple[Any, ...]) -> Row:
    """Memory, and on a GPU what was launched."""
    peak: Row = {"peak_mib": measure.peak_bytes(run, inputs) / 2**20}
    if inputs[0].device.type != "cuda":
        return peak
    on_device = measure.device_times(run, inputs)
    return peak | {
        "launches": len(on_device),
        "kernels_us": "; ".join(f"{name.split('(')[0][-40:]}={us:.1f}" for name, us in on_device[:12]),
    }
