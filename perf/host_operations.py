"""Why the eager backend does on the CPU in NumPy what it does once a loss: PyTorch's operations beside NumPy's.

    python perf/host_operations.py [--csv FILE]

One thread; numbers that lie in the cache; medians in microseconds of 32 768 float32. Then the search on the host,
segments sorted whole beside counted, and in rounds, minima of CPU time in milliseconds. Before them page faults: of a
new tensor of 46 MB (also with THP_MEM_ALLOC_ENABLE=1, which asks for huge pages), and of a forward and backward pass.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

import lmp_triton
from lmp_triton import host_search, search

SEGMENTS = ((1, 4096), (64, 4096), (16, 8192), (16, 16_384), (512, 1000), (1, 605_000))
ROUNDS_UP_TO = 1 << 19
"""Losses beyond which the search in rounds is left out."""


def seconds(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> list[float]:
    """The first is not counted."""
    found = []
    for _ in range(repeats + 1):
        start = clock()
        run()
        found.append(clock() - start)
    return found[1:]


def faults(run: Callable[[], object]) -> tuple[int, float]:
    """Page faults and milliseconds, medians of five, the first time not counted."""
    found = []
    for _ in range(6):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        run()
        taken = 1e3 * (time.perf_counter() - start)
        found.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, taken))
    count, ms = (statistics.median(each) for each in zip(*found[1:], strict=True))
    return int(count), ms


def memory() -> Iterator[str]:
    """Page faults, a line each."""
    logits, target = torch.randn(2, 19, 550, 550).requires_grad_(), torch.randint(19, (2, 550, 550))

    def of(loss: Callable[..., torch.Tensor]) -> None:
        logits.grad = None
        loss(logits, target).backward()

    for name, run in (
        ("a new tensor filled", lambda: torch.empty_like(logits.detach()).fill_(1.0)),
        ("F.cross_entropy", lambda: of(F.cross_entropy)),
        ("loss_max_pooling", lambda: of(lmp_triton.loss_max_pooling)),
    ):
        yield "(2, 19, 550, 550), {}: {} page faults, {:.0f} ms".format(name, *faults(run))


def operations() -> pd.DataFrame:
    """Both libraries' ways to the same."""
    x = torch.rand(1 << 15) * 4 + 0.01
    few, bits, label = (x > 2) & (x < 2.01), x.view(torch.int32) >> 16, torch.randint(19, x.shape)
    y, mask, short, counts = torch.empty_like(x), x > 2, label.short(), torch.zeros(1 << 16, dtype=torch.int64)
    a, b, o, m, s, at = x.numpy(), few.numpy(), y.numpy(), mask.numpy(), short.numpy(), label.numpy()
    one, index, q = counts.new_ones(1).expand(x.shape), bits.long(), np.float32(4.333)
    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "comparison": (lambda: x > 2.0, lambda: a > np.float32(2)),
        "number of True": (mask.sum, lambda: np.count_nonzero(m)),
        "picking out a few": (lambda: x[few], lambda: a[b]),
        "power": (lambda: torch.pow(x, 4.333, out=y), lambda: np.power(a, q, out=o)),
        "power by log2 and exp2": (lambda: (x.log2() * 4.333).exp2_(), lambda: np.exp2(np.log2(a) * q)),
        "power by log and exp2": (
            lambda: (x.log() * 6.251).exp2_(),
            # What the backend does: both have vector code for AVX2, which NumPy's log2 and exp2 have not.
            lambda: torch.exp2(torch.from_numpy(np.multiply(np.log(a, out=o), q, out=o)), out=y),
        ),
        "exp2": (lambda: torch.exp2(x, out=y), lambda: np.exp2(a, out=o)),
        "product": (lambda: torch.mul(x, 2.0, out=y), lambda: np.multiply(a, q, out=o)),
        "masked fill": (lambda: y.masked_fill_(mask, 1.0), lambda: np.copyto(o, q, where=m)),
        "int64 with int16": (lambda: label == short, lambda: at == s),
        "counting by 16 bits": (
            lambda: counts.scatter_add_(0, index, one),
            lambda: np.bincount(bits.numpy(), minlength=1 << 15),
        ),
    }
    rows = []
    for name, both in ways.items():
        torch_us, numpy_us = (1e6 * statistics.median(seconds(way, 50, time.perf_counter)) for way in both)
        rows.append({"what": name, "torch": torch_us, "numpy": numpy_us})
    return pd.DataFrame(rows)


def searches() -> pd.DataFrame:
    """The search by each of its ways."""
    ratio, q = torch.tensor(0.25, dtype=torch.float64), torch.tensor(4.333, dtype=torch.float64)
    rows, limit = [], host_search.SORTED_LENGTH
    for shape in SEGMENTS:
        losses, found = 3 * torch.rand(shape), {"what": f"search, {shape[0]} of {shape[1]}"}
        for name, up_to in (("sorted", 1 << 15), ("counted", 0)):
            if shape[1] <= up_to or not up_to:
                host_search.SORTED_LENGTH = up_to
                way = functools.partial(host_search.segments, losses.numpy(), float(ratio), float(q))
                found[name] = 1e3 * min(seconds(way, 9, time.process_time))
        if losses.numel() <= ROUNDS_UP_TO:
            found["rounds"] = 1e3 * min(
                seconds(functools.partial(search.in_rounds, losses, ratio, q), 3, time.process_time)
            )
        rows.append(found)
    host_search.SORTED_LENGTH = limit
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="write the table there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(*memory(), sep="\n")
    table = pd.concat([operations(), searches()], ignore_index=True)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, NumPy {np.__version__}")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3g}", na_rep=""))
    if options.csv:
        table.round(3).to_csv(options.csv, index=False)


if __name__ == "__main__":
    main()
