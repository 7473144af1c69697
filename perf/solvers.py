"""The two solvers beside each other, counted; `lmp-triton bench run --set solvers` times them.

    python perf/solvers.py steps [--csv FILE]        rounds, passes and bytes of both solvers, on a GPU or interpreted
    python perf/solvers.py code [--capability 90]    instructions an element, from compiled code
    python perf/solvers.py errors                    worst errors against float64, on a GPU or interpreted

`steps` counts what the kernels did; the bytes follow from it. Interpreted, logarithms and powers are NumPy's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys

import pandas as pd
import torch
from lmp_triton.perf.workloads import Losses
from torch import Tensor

RATIO = 0.25
KINDS = ("untrained", "trained", "well trained", "heavy tail", "all equal", "thirty orders")
LENGTHS = (2_000, 50_000, 302_500, 1_048_576)
PS = (1.0, 1.3, 100.0)
PS_OF_ERRORS, RATIOS = (1.0, 1.05, 1.3, 3.0, 50.0), (0.03, 0.1, 0.3, 0.9)


def steps(n: int, p: float, name: str, losses: Tensor, solver: str) -> dict[str, object]:
    """What one solve took."""
    from lmp_triton.kernels import configs, workspace

    from lmp_triton import fused, reference
    from lmp_triton.types import Pool

    pixels, pooling = fused.pool_losses(losses.unsqueeze(0), None, Pool(p, RATIO, reduction="none", solver=solver))
    value = pooling.value.item()
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


def where_kernels_run() -> contextlib.AbstractContextManager[None]:
    """On a GPU, or else in the interpreter, which works on vectors: large blocks, which change no result."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
    import interpreter

    interpreter.speed_up()
    from lmp_triton.kernels import configs

    table = configs.table_for(0)
    table = table._replace(
        select=table.select._replace(block=1 << 17, solve_block=1 << 17, exact_solve_block=1 << 17),
        stream=table.stream._replace(block=1 << 17),
    )
    return configs.using(table)


def report_steps(arguments: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with where_kernels_run():
        for n in arguments.lengths or LENGTHS:
            for name in KINDS:
                losses = Losses(n, name).make(torch.device(device), n)[0].detach()[0]
                for p in PS:
                    for solver in ("select", "sort"):
                        if solver == "sort" and n > 60_000 and device == "cpu":
                            continue  # minutes in the interpreter
                        rows.append(steps(n, p, name, losses, solver))
                        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    show(rows, arguments.csv)


def errors(losses: Tensor, p: float, ratio: float, solver: str) -> dict[str, float]:
    """Of one solve, relative ones; of the weights relative to τ."""
    import lmp_triton
    from lmp_triton import reference

    ell = losses.double().cpu().numpy()
    expected = reference.solve(ell, reference.support(len(ell), ratio), p)
    given = {"p": p, "ratio": ratio, "scope": "batch", "backend": "triton", "solver": solver}
    loss = lmp_triton.pool_losses(losses, **given).item()
    weights, stats = lmp_triton.optimal_weights(losses, **given)
    of_weights = (weights.double().cpu().numpy().ravel() - expected.weights) / expected.tau
    found = {"loss": (loss, expected.loss), "tau": (stats.tau.item(), expected.tau)}
    if expected.alpha > 0:
        found["alpha"] = stats.alpha.item(), expected.alpha
    return {name: abs(x - y) / y for name, (x, y) in found.items()} | {"w of tau": abs(of_weights).max()}


def report_errors(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with where_kernels_run():
        for n in arguments.lengths or (1000,):
            for name in KINDS:
                losses = Losses(n, name).make(device, n)[0].detach()[0]
                for p in PS_OF_ERRORS:
                    for ratio in RATIOS:
                        for solver in ("select", "sort"):
                            rows.append({"solver": solver, "p": p} | errors(losses, p, ratio, solver))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    show(pd.DataFrame(rows).groupby(["solver", "p"], as_index=False).max().to_dict("records"), arguments.csv, ".3g")


def show(rows: list[dict[str, object]], csv: str | None, precision: str = ".4g") -> None:
    table = pd.DataFrame(rows)
    if csv:
        table.to_csv(csv, index=False, float_format=f"%{precision}")
    print(table.to_string(index=False, float_format=lambda x: format(x, precision), na_rep=""))


def report_code(arguments: argparse.Namespace) -> None:
    from lmp_triton.perf import catalogue, static
    from lmp_triton.perf.compiled import read

    loops = {  # the part of a kernel by the number of its loop, 0: all of it
        "narrow_bracket, all losses": ("select, first pass", 1),
        "select, all losses": ("select", 1),
        "select, short list, a round": ("select", 3),
        "sort, one run, everything": ("sort one run", 0),
        "sort, runs, everything": ("sort runs", 0),
        "softmax_losses bf16 C=19, for comparison": ("softmax_losses bf16 C=19", 1),
    }
    launches = dict(static.launches(arguments.capability, {kernel for kernel, _loop in loops.values()}))
    rows = []
    for name, (kernel, loop) in loops.items():
        code, launch = read(launches[kernel].compiled), launches[kernel]
        pixels = launch.arguments[1].solve_block if "round" in name else catalogue.cost(launch).pixels
        assert code.flow is not None
        counted = len(code.opcodes) if loop == 0 else code.flow.loop(lambda _opcode: 1.0, loop - 1)
        rows.append(
            {
                "": name,
                "instructions an element": counted * 32 * code.warps / pixels,
                "registers": code.registers,
                "in the whole kernel": len(code.opcodes),
                "loops": " ".join(str(end - head + 1) for head, end in code.flow.loops),
            }
        )
    print(
        f"sm_{arguments.capability}; of a loop the cheapest path; loops: from head to backward branch, in program order"
    )
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.1f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "code", "errors"])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--csv")
    arguments = parser.parse_args()
    {"steps": report_steps, "code": report_code, "errors": report_errors}[arguments.what](arguments)


if __name__ == "__main__":
    main()
