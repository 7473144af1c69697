"""The two solvers beside each other, and the eager one beside what people use instead.

    python perf/solvers.py steps [--csv FILE]        rounds, passes and bytes of both solvers, on a GPU or interpreted
    python perf/solvers.py code [--capability 90]    instructions an element, from compiled code
    python perf/solvers.py cpu [--repeats 9]         eager against sort + cumsum, topk and mpl.pytorch's algorithm

`steps` counts what the kernels did; the bytes follow from it. `cpu` times the CPU, sides taking turns, medians.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

RATIO = 0.25
LENGTHS = (2_000, 50_000, 302_500, 1_048_576)
PS = (1.0, 1.3, 100.0)


def distributions(n: int) -> dict[str, Tensor]:
    """Losses of an untrained and of a trained network, and harder ones."""
    rng = np.random.default_rng(n)
    easy = rng.exponential(0.01, n)
    found = {
        "untrained": 2.94 + 0.3 * rng.standard_normal(n),
        "trained": np.where(rng.random(n) < 0.05, rng.exponential(3, n), easy),
        "heavy tail": rng.lognormal(0, 5, n),
        "all equal": np.full(n, 0.7),
        "thirty orders": 10.0 ** -rng.uniform(0, 30, n),
    }
    return {name: torch.as_tensor(values, dtype=torch.float32).abs() for name, values in found.items()}


def steps(n: int, p: float, name: str, losses: Tensor, solver: str) -> dict[str, object]:
    """What one solve took."""
    from lmp_triton.kernels import configs, workspace

    from lmp_triton import fused, reference

    pixels = fused.marked_losses(losses.unsqueeze(0), None, 1)
    value = fused.solve(pixels, p, RATIO, 1, "none", solver).value.item()
    expected = reference.solve(losses.double().cpu().numpy(), reference.support(n, RATIO), p).loss
    assert abs(value - expected) <= 2e-6 * expected, (n, p, name, solver, value, expected)
    assert pixels.statistics is not None
    words = pixels.statistics.tolist()
    rounds = words[workspace.ROUNDS.value]
    row: dict[str, object] = {"n": n, "p": p, "losses": name, "solver": solver, "rounds": rounds}
    if solver == "select":
        table = configs.table(losses.device)
        passes = configs.passes_for(n, table.select)
        listed = words[workspace.LISTED.value]
        fits = listed <= min(table.select.capacity, n)
        walked = listed if fits else n
        # Each pass that narrows reads all losses, unless what was left fitted the list: then it reads none.
        row |= {"passes launched": passes, "listed": listed, "walked a round": walked}
        row["bytes a loss"] = (4 * n + 4 * min(listed, n) + 4 * walked * (rounds + 1)) / n
        row["and a pass"] = 4 if passes else 0
    else:
        run = configs.table(losses.device).sort.run
        runs = -(-n // run)
        one = runs == 1
        row |= {"runs": runs, "loads a round": 0 if one else 4 * runs * (run.bit_length() + 2)}
        row["bytes a loss"] = (4 if one else 12) + 8 + 4 * (0 if one else row["loads a round"] * rounds / n)  # type: ignore[operator]
    return row


def report_steps(arguments: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
        import interpreter

        interpreter.speed_up()
        from lmp_triton.kernels import configs

        # The interpreter works on vectors: large blocks, which change no result of the selection.
        table = configs.table_for(0)
        table = table._replace(
            select=table.select._replace(block=1 << 17, solve_block=1 << 17),
            stream=table.stream._replace(block=1 << 17),
        )
        configs.table = lambda device: table  # type: ignore[assignment]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for n in arguments.lengths:
        for name, losses in distributions(n).items():
            for p in PS:
                for solver in ("select", "sort"):
                    if solver == "sort" and n > 60_000 and device == "cpu":
                        continue  # minutes in the interpreter
                    rows.append(steps(n, p, name, losses.to(device), solver))
                    print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    table = pd.DataFrame(rows)
    if arguments.csv:
        table.to_csv(arguments.csv, index=False, float_format="%.4g")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}", na_rep=""))


def report_code(arguments: argparse.Namespace) -> None:
    from lmp_triton.perf import catalogue
    from lmp_triton.perf.compiled import compile_for

    launches = {
        "narrow_bracket, all losses": (catalogue.select_threshold(passes=1), 1),
        "select, all losses": (catalogue.select_threshold(), 1),
        "select, short list, a round": (catalogue.select_threshold(), 3),
        "sort, one run, everything": (catalogue.sort_runs(one_run=True), 0),
        "sort, runs, everything": (catalogue.sort_runs(), 0),
        "softmax_losses bf16 C=19, for comparison": (catalogue.softmax_losses(19), 1),
    }
    rows = []
    for name, (launch, loop) in launches.items():
        code = compile_for(launch.kernel, arguments.capability, launch.signature, launch.constants, launch.num_warps)
        counted = len(code.opcodes) if loop == 0 else code.loops[loop - 1]
        rows.append(
            {
                "": name,
                "instructions an element": counted * 32 * launch.num_warps / launch.pixels,
                "registers": code.registers,
                "in the whole kernel": len(code.opcodes),
                "loops": " ".join(map(str, code.loops)),
            }
        )
    print(f"sm_{arguments.capability}; a loop is counted between its head and its backward branch, in program order")
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.1f}"))


def sort_and_cumsum(losses: Tensor, p: float) -> Tensor:
    """Algorithm 1 as it is usually written: all losses sorted, prefix sums of powers (float64, or they underflow)."""
    n, m = losses.shape[1], RATIO * losses.shape[1]
    ascending = losses.double().sort(1).values
    largest = ascending[:, -1:]
    if p == 1:
        k = math.ceil(m)
        alpha = ascending[:, n - k : n - k + 1]
        heavy = ascending[:, n - k + 1 :].sum(1)
        return ((heavy + (m - k + 1) * alpha.squeeze(1)) / m).mean()
    q = p / (p - 1)
    powers = (ascending / largest).pow(q)
    sums = powers.cumsum(1)
    c = m - n + torch.arange(1, n + 1)
    first = (c * powers - sums <= 0).sum(1, keepdim=True)
    before = (first - 1).clamp_min(0)
    alpha = largest * (sums.gather(1, before) / (m - n + first)).pow(1 / q)
    weights = n ** (-1 / q) * m ** (-1 / p) * (losses / alpha).clamp_max(1).pow(q - 1)
    return (weights * losses).sum(1).mean()


def topk(losses: Tensor, p: float) -> Tensor:
    """The mean of the m largest losses: p = 1 with a whole m."""
    return losses.topk(int(RATIO * losses.shape[1]), 1, sorted=False).values.mean()


def mpl_pytorch(losses: Tensor, p: float) -> Tensor:
    """mpl.pytorch's steps, written afresh: one sort of everything, a scan on the host, weights scattered back."""
    flat = losses.reshape(-1)
    ascending, order = flat.sort()
    ell = ascending.numpy().astype(np.float64)
    n, m, q = ell.size, RATIO * ell.size, p / (p - 1) if p > 1 else math.inf
    if p == 1:
        scaled = (np.arange(n) >= n - m) / m
    else:
        powers = (ell / ell[-1]) ** q
        sums = np.cumsum(powers)
        eta = (m - n + np.arange(1, n + 1)) * powers - sums
        first = min(int(np.searchsorted(eta > 0, True)), n - 1)  # from here on τ
        alpha = ell[-1] * (sums[max(first - 1, 0)] / (m - n + first)) ** (1 / q)
        scaled = n ** (-1 / q) * m ** (-1 / p) * np.minimum(ell / alpha, 1) ** (q - 1)
    weights = torch.empty_like(flat)
    weights[order] = torch.as_tensor(scaled, dtype=flat.dtype)
    return (weights * flat).sum()


def report_cpu(arguments: argparse.Namespace) -> None:
    import lmp_triton

    def ours(losses: Tensor, p: float) -> Tensor:
        return lmp_triton.pool_losses(losses, p=p, ratio=RATIO, backend="eager")

    sides: dict[str, Callable[[Tensor, float], Tensor]] = {
        "lmp_triton, eager": ours,
        "torch.sort + cumsum": sort_and_cumsum,
        "torch.topk": topk,
        "mpl.pytorch's algorithm": mpl_pytorch,
    }
    rows = []
    for n in arguments.lengths:
        for name, ell in list(distributions(n).items())[:2]:
            for p in (1.0, 1.3):
                losses = ell.unsqueeze(0)
                those = {side: f for side, f in sides.items() if p == 1 or side != "torch.topk"}
                values = {side: f(losses, p).item() for side, f in those.items()}
                assert max(values.values()) <= min(values.values()) * (1 + 1e-4), (n, name, p, values)
                times: dict[str, list[float]] = {side: [] for side in those}
                for repeat in range(arguments.repeats + 2):
                    for side, f in those.items():
                        start = time.perf_counter()
                        f(losses, p)
                        if repeat >= 2:
                            times[side].append(time.perf_counter() - start)
                medians = {side: statistics.median(t) for side, t in times.items()}
                base = medians["torch.sort + cumsum"]
                for side, median in medians.items():
                    row = {"n": n, "losses": name, "p": p, "": side, "ms": 1e3 * median, "ratio": median / base}
                    rows.append(row)
    print(f"forward, one segment, {torch.get_num_threads()} threads, torch {torch.__version__}; ratio to sort + cumsum")
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.3g}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "code", "cpu"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--csv")
    arguments = parser.parse_args()
    {"steps": report_steps, "code": report_code, "cpu": report_cpu}[arguments.what](arguments)


if __name__ == "__main__":
    main()
