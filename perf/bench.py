"""`lmp-triton bench`: run the suite, report it, compare two of its results.

    lmp-triton bench run [--set core|full|cpu|tiny] [--out FILE.csv] [--providers NAME ...]
    lmp-triton bench report FILE.csv [--to FOLDER]
    lmp-triton bench compare A B [--threshold 1.1]

`run` appends a row for every workload, provider, pass and clock to one long table, and leaves out what the table holds
already for this machine and commit: stopped by Ctrl-C, it goes on where it was. A side of `compare` is FILE or
FILE@TEXT, TEXT being the start of a commit or a part of a GPU's name; it exits with 1 if B is slower than A anywhere
by more than the threshold.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from . import measure
from .providers import PROVIDERS, Unavailable, check
from .workloads import SETS, Workload

MACHINE = ("device", "capability", "driver", "torch", "triton", "python", "commit")
KEY = (*MACHINE, "workload", "provider", "pass", "clock")
COLUMNS = (
    *KEY,
    "date",
    "status",
    "ms",
    "p20",
    "p80",
    "count",
    "logits_bytes",
    "effective_gb_s",
    "device_gb_s",
    "percent_of_device",
    "peak_mib",
    "launches",
    "first_call_s",
    "kernels_us",
)


def machine(device: torch.device) -> dict[str, str]:
    """What a time means nothing without."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    found = {"torch": torch.__version__, "triton": triton, "python": platform.python_version(), "commit": commit()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()[0]
    else:
        found |= {"device": f"{_cpu()}, {torch.get_num_threads()} threads", "capability": "", "driver": ""}
    return {name: found[name] for name in MACHINE}


def commit() -> str:
    """Of the checkout this file lies in; the file COMMIT beside it stands in where there is no git."""
    folder = Path(__file__).resolve().parent
    written = folder / "COMMIT"
    if written.exists():
        return written.read_text().strip()
    name = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = _output("git", "-C", str(folder.parent), "status", "--porcelain", "-uno", "--", ".", ":!perf/results")
    return name + ("-changed" if changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown CPU"


def rows_of(workload: Workload, name: str, device: torch.device, roof: float) -> Iterator[dict[str, object]]:
    """Every row of one provider on one workload; one row that says why, if it can't run or is wrong."""
    try:
        yield from _rows_of(workload, name, device, roof)
    except Unavailable as reason:
        yield {"pass": "", "clock": "", "status": f"not available: {reason}"}
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # whatever a peer's code or compiler raises is a result, too
        yield {"pass": "", "clock": "", "status": f"failed: {type(error).__name__}: {str(error).strip()[:200]}"}


def _rows_of(workload: Workload, name: str, device: torch.device, roof: float) -> Iterator[dict[str, object]]:
    provider = PROVIDERS[name]
    loss = provider.make(workload)
    cuda = device.type == "cuda"
    sets = max(1, min(3, (1 << 33) // (3 * workload.logits_bytes))) if cuda else 1
    inputs = [workload.make(device, seed) for seed in range(sets)]

    def wrong() -> str | None:
        logits, target = inputs[-1]
        logits.grad = None
        value = loss(logits, target)
        value.backward()
        if not provider.pooled:
            finite = bool(value.isfinite()) and bool(logits.grad.isfinite().all())  # type: ignore[union-attr]
            return None if finite else "wrong: not finite"
        return check(logits, target, value.detach(), logits.grad, workload)  # type: ignore[arg-type]

    start = time.perf_counter()
    loss(*inputs[0]).backward()
    if cuda:
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    if reason := wrong():
        yield {"pass": "", "clock": "", "status": reason}
        return
    rows = []
    for backward in (False, True):
        run = measure.one_pass(loss, backward)
        shared: dict[str, object] = {"pass": "forward+backward" if backward else "forward", "first_call_s": first}
        if cuda:
            on_device = measure.device_times(run, inputs[0])
            shared["launches"] = len(on_device)
            shared["kernels_us"] = "; ".join(f"{name.split('(')[0][-40:]}={us:.1f}" for name, us in on_device[:12])
            shared["peak_mib"] = measure.peak_bytes(run, inputs[0]) / 2**20
        clocks: dict[str, measure.Series | str] = dict(measure.clock(run, inputs, device))
        if cuda:
            try:
                clocks["graph"] = measure.graph(run, inputs[0])
            except Exception as error:
                clocks["graph"] = f"failed: {type(error).__name__}: {str(error).strip()[:200]}"
        least = workload.logits_bytes * (3 if backward else 1)  # reads and writes of the logits that can't be avoided
        for clock, series in clocks.items():
            row = shared | {"clock": clock, "status": series if isinstance(series, str) else "ok"}
            if isinstance(series, measure.Series):
                row |= {"ms": series.median, "p20": series.p20, "p80": series.p80, "count": series.count}
                if clock != "host":
                    rate = least / series.median / 1e6
                    row |= {"effective_gb_s": rate, "percent_of_device": 1e11 * rate / roof}
            rows.append(row)
    reason = wrong()  # what was timed must still be right
    yield from ([{"pass": "", "clock": "", "status": reason}] if reason else rows)


def run(options: argparse.Namespace) -> int:
    """Time what is not in the table yet, and append it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = SETS[options.set or ("core" if device.type == "cuda" else "cpu")]
    here = machine(device)
    out = Path(options.out or f"perf/results/{_slug(here['device'])}.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if out.exists():
        with out.open(newline="") as file:
            done = {tuple(row[name] for name in (*MACHINE, "workload", "provider")) for row in csv.DictReader(file)}
    todo = [
        (workload, name)
        for workload, name in itertools.product(chosen, options.providers or PROVIDERS)
        if (*here.values(), workload.name, name) not in done
    ]
    print(f"{here['device']}, torch {here['torch']}, commit {here['commit']}: {len(todo)} to do; writing {out}")
    if not todo:
        return 0
    roof = measure.bandwidth(device)
    print(f"bandwidth of a large copy: {roof / 1e9:.0f} GB/s")
    deadline = time.monotonic() + options.seconds if options.seconds else None
    fresh = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        if fresh:
            writer.writeheader()
        for workload, name in _progress(todo):
            if deadline and time.monotonic() > deadline:
                print("out of time; the same command goes on from here")
                break
            constant = here | {"workload": workload.name, "provider": name, "logits_bytes": workload.logits_bytes}
            constant |= {"date": datetime.date.today().isoformat(), "device_gb_s": _short(roof / 1e9)}
            with measure.freed(device):
                rows = list(rows_of(workload, name, device, roof))
            torch.compiler.reset()
            for row in rows:
                writer.writerow(constant | {key: _short(value) for key, value in row.items()})
            file.flush()
    return 0


def _progress(todo: list[tuple[Workload, str]]) -> Iterator[tuple[Workload, str]]:
    try:
        from rich.progress import track
    except ImportError:
        yield from todo
        return
    yield from track(todo, description="timing")


def _short(value: object) -> object:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The three commands."""
    from . import report

    commands = parser.add_subparsers(dest="what", required=True, metavar="run | report | compare")
    command = commands.add_parser("run", help="time the suite and append to its table")
    command.add_argument("--set", choices=SETS, help="default: core on a GPU, cpu elsewhere")
    command.add_argument("--out", help="default: perf/results/<device>.csv")
    command.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    command.add_argument("--seconds", type=float, help="stop after the workload that runs then")
    command.set_defaults(run=run)
    command = commands.add_parser("report", help="tables, plots and a page")
    command.add_argument("file", type=Path)
    command.add_argument("--to", type=Path, help="folder for report.html and its plots; default: beside the file")
    command.set_defaults(run=report.run)
    command = commands.add_parser("compare", help="ratios of times, B to A")
    command.add_argument("a")
    command.add_argument("b")
    command.add_argument("--threshold", type=float, default=1.1)
    command.set_defaults(run=report.compare)


def main() -> int:
    """Without the command line of the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
