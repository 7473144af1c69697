"""`lmp-triton bench`: run a set of timings, report it, compare two results.

    lmp-triton bench sets
    lmp-triton bench run [--set NAME] [--out FILE.csv] [--providers NAME ...] [--seconds S]
    lmp-triton bench report FILE.csv [--to FOLDER]
    lmp-triton bench compare A B [--threshold 1.1]

`run` appends a row for every workload, provider, pass and clock to one long table, and leaves out what the table holds
already for this machine and commit: stopped by Ctrl-C, or killed, it goes on where it was. A side of `compare` is FILE
or FILE@TEXT, TEXT being the start of a commit or a part of a GPU's name. `compare` exits with 1 if B is slower than A
anywhere by more than the threshold, and only then; whatever can't be done is 2, with one line that says why.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import measure
from .sets import SETS, Set
from .table import MACHINE, Table, Unusable
from .workloads import Losses, Workload

Group = tuple[Workload | Losses, list[str]]
"""A workload, and the providers that take turns on it."""


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


def groups(chosen: Set, names: list[str] | None, done: set[tuple[str, str]], together: bool) -> list[Group]:
    """What is still to be timed; `done`: workloads and providers."""
    found: list[Group] = []
    for workloads, providers in chosen.parts:
        for workload in workloads:
            todo = [name for name in providers if name in (names or providers) and (workload.name, name) not in done]
            found += [(workload, todo)] if together and todo else [(workload, [name]) for name in todo]
    return found


def run(options: argparse.Namespace) -> int:
    """Time what is not in the table yet, and append it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = SETS[options.set or ("core" if device.type == "cuda" else "cpu")]
    unknown = set(options.providers or ()) - set(chosen.providers)
    if unknown:
        raise Unusable(f"the set has no provider {', '.join(sorted(unknown))}; it has: {', '.join(chosen.providers)}")
    here = machine(device)
    with Table(Path(options.out or f"perf/results/{_slug(here['device'])}.csv")) as table:
        same = (row for row in table.rows if all(row[name] == here[name] for name in MACHINE))
        done = {(row["workload"], row["provider"]) for row in same}
        # On a CPU they take turns; on a GPU each is by itself, so that a crash of one is no other's.
        todo = groups(chosen, options.providers, done, together=device.type == "cpu")
        count = sum(len(names) for _workload, names in todo)
        print(f"{here['device']}, torch {here['torch']}, commit {here['commit']}: {count} to do; writing {table.path}")
        if todo:
            _time(chosen, todo, here, device, table, options.seconds)
    return 0


def _time(
    chosen: Set, todo: list[Group], here: dict[str, str], device: torch.device, table: Table, seconds: float | None
) -> None:
    roof = measure.bandwidth(device)
    print(f"bandwidth of a large copy: {roof / 1e9:.0f} GB/s", flush=True)
    deadline = time.monotonic() + seconds if seconds else math.inf
    providers = {name: provider for _workloads, those in chosen.parts for name, provider in those.items()}
    for workload, names in _progress(todo):
        if time.monotonic() > deadline:
            print("out of time; the same command goes on from here")
            return
        constant = here | {"workload": workload.name, "logits_bytes": workload.logits_bytes}
        constant |= {"date": datetime.date.today().isoformat(), "device_gb_s": roof / 1e9}
        with measure.freed(device):
            found = chosen.rows_of(workload, {name: providers[name] for name in names}, device, roof)
        torch.compiler.reset()
        table.append(constant | {"provider": name} | row for name in names for row in found[name])


def _progress(todo: list[Group]) -> Iterator[Group]:
    try:
        from rich.progress import track
    except ImportError:
        yield from todo
        return
    yield from track(todo, description="timing")


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def sets(options: argparse.Namespace) -> int:
    """Name the sets."""
    for name, each in SETS.items():
        workloads = sum(len(those) for those, _providers in each.parts)
        print(f"{name:8} {each.about} ({workloads} workloads)")
    return 0


def _report(options: argparse.Namespace) -> int:
    from . import report

    return report.run(options)


def _compare(options: argparse.Namespace) -> int:
    from . import report

    return report.compare(options)


def one_line(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """What goes wrong is one line on standard error and 2: a traceback's 1 would mean "slower"."""

    def guarded(options: argparse.Namespace) -> int:
        try:
            return command(options)
        except Unusable as reason:
            print(f"lmp-triton bench: {reason}", file=sys.stderr)
        except ImportError as error:
            print(
                f"lmp-triton bench {options.what} needs the extra perf ({error}): pip install 'lmp-triton[perf]'",
                file=sys.stderr,
            )
        except Exception as error:
            print(f"lmp-triton bench: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2

    return guarded


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The four commands. Needs none of the extras; `report` and `compare` say so when they do."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="sets | run | report | compare")
    command = commands.add_parser("sets", help="what there is to time")
    command.set_defaults(run=sets)
    names = ", ".join(SETS)
    command = commands.add_parser("run", help="time a set and append to its table")
    command.add_argument("--set", choices=SETS, metavar="NAME", help=f"{names}; default: core on a GPU, else cpu")
    command.add_argument("--out", help="default: perf/results/<device>.csv")
    command.add_argument("--providers", nargs="+", metavar="NAME", help="of the set; default: all")
    command.add_argument("--seconds", type=positive, help="stop after the workload that runs then")
    command.set_defaults(run=one_line(run))
    command = commands.add_parser("report", help="tables, plots and a page")
    command.add_argument("file", type=Path)
    command.add_argument("--to", type=Path, help="folder for report.html and its plots; default: beside the file")
    command.set_defaults(run=one_line(_report))
    command = commands.add_parser("compare", help="ratios of times, B to A")
    command.add_argument("a", metavar="A")
    command.add_argument("b", metavar="B")
    command.add_argument("--threshold", type=positive, default=1.1)
    command.set_defaults(run=one_line(_compare))


def main() -> int:
    """Without the command line of the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())
