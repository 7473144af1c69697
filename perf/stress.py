"""The kernels against the oracle, again and again, with other work on the GPU: what a race would show up in.

    python perf/stress.py [--seconds 20] [--small] [--cooperative]

compute-sanitizer's racecheck sees shared memory only; what programs tell each other through global memory (tickets,
integer totals, the short list) is checked here: every repeat must give the bits of the first, on fresh inputs of every
kind, while another stream keeps part of the GPU busy, so that programs start late and in other orders. --small: one
round of every kernel on small inputs, for compute-sanitizer and ncu. --cooperative: the launches whose programs wait
for each other (LMP_TRITON_COOPERATIVE) against separate ones, bit for bit; a watchdog ends the process if one hangs.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time

import numpy as np
import torch
from lmp_triton.perf.providers import asking
from torch import Tensor

import lmp_triton
from lmp_triton import reference, settings

CASES = (
    # n, segments: one run; many runs and no pass; one pass; two passes
    (1500, 7),
    (6000, 5),
    (302_500, 2),
    (1_300_000, 1),
)
PS = (1.0, 1.3, 50.0)
SOLVERS = ("select", "sort")


def losses_of(kind: str, n: int, segments: int, generator: torch.Generator) -> Tensor:
    """Random losses on the GPU."""
    x = torch.randn(segments, n, generator=generator, device=generator.device)
    if kind == "trained":
        rare = torch.rand(segments, n, generator=generator, device=x.device) < 0.05
        return torch.where(rare, x.abs() * 3, x.abs() * 0.01)
    return {"untrained": (2.94 + 0.3 * x).abs(), "heavy tail": (5 * x).exp(), "ties": x.abs().round(decimals=1)}[kind]


def solve(losses: Tensor, p: float, solver: str) -> tuple[Tensor, Tensor]:
    """Losses a segment, and weights."""
    x = losses.detach().requires_grad_()
    value = lmp_triton.pool_losses(x, p=p, reduction="none", backend="triton", solver=solver)
    value.sum().backward()
    assert x.grad is not None
    return value.detach(), x.grad


def run(seconds: float, small: bool) -> int:
    """How many solves were wrong or not the same twice."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(int(time.time()))
    print(f"seed {generator.initial_seed()}")
    load, busy = torch.randn(2048, 2048, device=device), torch.cuda.Stream()
    bad = total = 0
    end = time.monotonic() + seconds
    while True:
        for n, segments in CASES[:3] if small else CASES:
            for kind in ("untrained", "trained", "heavy tail", "ties"):
                losses = losses_of(kind, n // (8 if small else 1), segments, generator)
                for p in PS:
                    expected = [
                        reference.solve(ell, reference.support(ell.size, 0.25), p).loss
                        for ell in losses.double().cpu().numpy()
                    ]
                    for solver in SOLVERS:
                        first, weights = solve(losses, p, solver)
                        relative = np.abs(first.double().cpu().numpy() / expected - 1).max()
                        if not relative <= 2e-6:
                            print(f"WRONG by {relative:.2g}: n={n} {kind} p={p} {solver}")
                            bad += 1
                        for _ in range(1 if small else 20):
                            with torch.cuda.stream(busy):
                                load @ load
                            again, weights_again = solve(losses, p, solver)
                            total += 1
                            if not (torch.equal(first, again) and torch.equal(weights, weights_again)):
                                print(f"NOT THE SAME BITS: n={n} {kind} p={p} {solver}")
                                bad += 1
                if time.monotonic() > end and not small:
                    break
        if small or time.monotonic() > end:
            break
    if small:
        for shape, options in (
            ((2, 5, 20, 30), {}),
            ((2, 40, 20, 30), {"label_smoothing": 0.1}),
            ((2, 19, 550, 25), {}),
        ):
            logits = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
            target = torch.randint(shape[1], (shape[0], *shape[2:]), device=device)
            for layout in (torch.contiguous_format, torch.channels_last):
                x = logits.detach().contiguous(memory_format=layout).requires_grad_()
                lmp_triton.loss_max_pooling(x, target, backend="triton", **options).backward()  # type: ignore[arg-type]
    torch.cuda.synchronize()
    print(f"{total} repeats, {bad} bad")
    return bad


SHAPES = (
    # images, classes, pixels: no pass, one, two; many images; one image and so the most programs a segment
    ((3, 5, 5_000), "image"),
    ((2, 19, 302_500), "image"),
    ((1, 4, 1_300_000), "image"),
    ((64, 7, 9_000), "image"),
    ((4, 21, 103_041), "batch"),
)
PATIENCE = 20.0
"""Seconds without an end of a call before it counts as hanging."""


def run_cooperative(seconds: float) -> int:
    """How many calls gave other bits than separate launches; ends the process with 3 if one never comes back."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(int(time.time()))
    print(f"seed {generator.initial_seed()}")
    load, busy = torch.randn(2048, 2048, device=device), torch.cuda.Stream()
    alive = time.monotonic()
    doing = "nothing"

    def watch() -> None:
        while True:
            time.sleep(1)
            if time.monotonic() - alive > PATIENCE:
                print(f"HANGS: {doing}", flush=True)
                os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    bad = total = 0
    end = time.monotonic() + seconds
    while True:
        for (images, classes, pixels), scope in SHAPES:
            logits = torch.randn(images, classes, pixels, generator=generator, device=device, dtype=torch.bfloat16)
            target = torch.randint(classes, (images, pixels), generator=generator, device=device)
            for p in PS:
                expected = None
                for way in (*settings.WAYS, *settings.WAYS[1:] * 5):
                    doing = f"{(images, classes, pixels)} {scope} p={p} cooperative={way}"
                    x = logits.detach().requires_grad_()
                    with torch.cuda.stream(busy):
                        load @ load
                    with asking(way):
                        loss = lmp_triton.loss_max_pooling(
                            x, target, p=p, scope=scope, reduction="none", backend="triton", solver="select"
                        )
                    loss.sum().backward()
                    torch.cuda.synchronize()
                    alive = time.monotonic()
                    total += 1
                    assert x.grad is not None
                    expected = (loss.detach(), x.grad) if expected is None else expected
                    if not (torch.equal(loss, expected[0]) and torch.equal(x.grad, expected[1])):
                        print(f"NOT THE SAME BITS: {doing}")
                        bad += 1
        if time.monotonic() > end:
            break
    print(f"{total} calls, {bad} bad, none hung")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--cooperative", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing was run")
        return 0
    bad = run_cooperative(options.seconds) if options.cooperative else run(options.seconds, options.small)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
