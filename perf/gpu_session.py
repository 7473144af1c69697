"""Everything to do on a rented GPU, in one command: correctness first, then speed.

    bash perf/gpu_session.sh [--out FOLDER] [--minutes 9] [--only STAGE ...] [--commit ID]

Each stage is a process with a time limit of its own and a log; one that fails or hangs does not stop the next. Needs no
network and installs nothing: torch, Triton, numpy, pandas, pytest, and where they are to be had compute-sanitizer and
ncu. Results: FOLDER/summary.txt, FOLDER/times.csv, and FOLDER/gpu_session.tar.gz with these, a log a stage and the
report; the archive is renewed after every stage, so that what is cut off leaves what it had.

The stage "cooperative" is the test of the launches whose programs wait for each other: it ends itself if a call hangs
for 20 seconds, and is killed at its limit as every stage is. Only after it they are timed, in "bench_cooperative".
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "softmax_losses_kernel|select_kernel|sort_kernel|logits_gradient_kernel"
METRICS = (
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,"
    "dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_executed.sum,"
    "sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "launch__registers_per_thread"
)


class Stage(NamedTuple):
    """One step of the session."""

    name: str
    command: Sequence[str]
    seconds: float
    """Limit, of a session of nine minutes; scaled to the one asked for."""


def stages(logs: Path) -> list[Stage]:
    """In the order in which they matter."""
    python, perf = sys.executable, ROOT / "perf"
    small = [python, str(perf / "stress.py"), "--small"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20", "--kernel-regex", "kns=_kernel"]
    table = str(logs / "times.csv")
    bench = [python, "-m", "lmp_triton.perf.bench", "run", "--out", table]
    quick = ("lmp_triton", "F.cross_entropy", "F.cross_entropy, compiled")
    rest = ("lmp_triton, select", "lmp_triton, sort", "LMP by torch.sort", "Liger cross-entropy", "top-k (detectron2)")
    waiting = ("lmp_triton, cooperative solve", "lmp_triton, cooperative forward")
    return [
        Stage("environment", [python, str(Path(__file__)), "--environment"], 40),
        Stage("stress", [python, str(perf / "stress.py"), "--seconds", "25"], 60),
        Stage(
            "tests",
            [python, "-m", "pytest", "-q", "-n", "8", "-m", "not slow", "-p", "no:cacheprovider", str(ROOT / "tests")],
            170,
        ),
        Stage("bench", [*bench, "--set", "core", "--seconds", "75", "--providers", *quick], 120),
        Stage("cooperative", [python, str(perf / "stress.py"), "--cooperative", "--seconds", "20"], 50),
        Stage("memcheck", [*sanitizer, "--tool", "memcheck", *small], 40),
        Stage("racecheck", [*sanitizer, "--tool", "racecheck", *small], 40),
        Stage("initcheck", [*sanitizer, "--tool", "initcheck", *small], 40),
        Stage("ncu", ["ncu", "--kernel-name", f"regex:{KERNELS}", "--metrics", METRICS, "--csv", *small], 45),
        Stage("bench_cooperative", [*bench, "--set", "core", "--seconds", "20", "--providers", *waiting], 40),
        Stage("bench_rest", [*bench, "--set", "core", "--seconds", "30", "--providers", *rest], 60),
        Stage("bench_upsampling", [*bench, "--set", "upsampling", "--seconds", "20"], 40),
        Stage("errors", [python, str(perf / "solvers.py"), "errors", "--csv", str(logs / "errors.csv")], 30),
        Stage("tune", [*bench, "--set", "tune", "--seconds", "40"], 60),
        Stage("report", [python, "-m", "lmp_triton.perf.bench", "report", table, "--to", str(logs / "report")], 30),
    ]


def environment() -> None:
    """What the machine is."""
    import torch

    for command in (["nvidia-smi"], ["uname", "-a"], [sys.executable, "-m", "pip", "list"]):
        print("$", *command, flush=True)
        if shutil.which(command[0]):
            subprocess.run(command, check=False)
    print("torch", torch.__version__, "CUDA", torch.version.cuda)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        print(properties)
    else:
        print("no GPU")


def assemble(folder: Path, commit: str) -> None:
    """The package as it would be installed: kernels/ and perf/ inside lmp_triton/."""
    ignore = shutil.ignore_patterns("__pycache__", "results")
    shutil.copytree(ROOT / "lmp_triton", folder / "lmp_triton", ignore=ignore)
    for name in ("kernels", "perf"):
        shutil.copytree(ROOT / name, folder / "lmp_triton" / name, ignore=ignore)
    (folder / "lmp_triton" / "perf" / "COMMIT").write_text(commit)


def run_stage(stage: Stage, log: Path, limit: float, site: Path) -> str:
    """Run it where the assembled package is found before the checkout; says how it ended."""
    environ = os.environ | {"PYTHONPATH": str(site), "PYTHONUNBUFFERED": "1"}
    if not shutil.which(stage.command[0]):
        log.write_text(f"{stage.command[0]} is not on this machine\n")
        return f"skipped: {stage.command[0]} is not on this machine"
    with log.open("w") as file:
        print("$", *stage.command, file=file, flush=True)
        process = subprocess.Popen(
            stage.command, stdout=file, stderr=subprocess.STDOUT, cwd=site, env=environ, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"KILLED after {limit:.0f} s"
    return "ok" if code == 0 else f"FAILED ({code})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_session")))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", nargs="+", metavar="STAGE")
    parser.add_argument("--commit", default="")
    parser.add_argument("--rehearse", action="store_true", help="run the stages without a GPU too")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.environment:
        environment()
        return 0
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    found = (
        subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() if shutil.which("git") else ""
    )
    commit = options.commit or found or "unknown"
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    import torch

    gpu = torch.cuda.is_available()
    end = time.monotonic() + 60 * options.minutes
    lines = [f"commit {commit}, {torch.cuda.get_device_name() if gpu else 'no GPU'}"]
    print(lines[0], flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        site, logs = Path(temporary) / "site", Path(temporary) / "gpu_session"
        logs.mkdir()
        assemble(site, commit)
        for stage in stages(logs):
            if options.only and stage.name not in options.only:
                continue
            start, left = time.monotonic(), end - time.monotonic()
            limit = min(stage.seconds * options.minutes / 9, left)
            if not gpu and not options.rehearse and stage.name != "environment":
                result = "no GPU: not run"
            elif left < 5:
                result = "skipped: out of time"
            else:
                result = run_stage(stage, logs / f"{stage.name}.log", limit, site)
            lines.append(f"{stage.name:12} {time.monotonic() - start:6.1f} s  {result}")
            print(lines[-1], flush=True)
            (logs / "summary.txt").write_text("\n".join(lines) + "\n")
            with tarfile.open(out / "gpu_session.tar.gz", "w:gz") as archive:
                archive.add(logs, logs.name)
            for name in ("summary.txt", "times.csv"):
                if (logs / name).exists():
                    shutil.copy(logs / name, out)
    print(f"wrote {out / 'gpu_session.tar.gz'}")
    return 1 if any("FAILED" in line or "KILLED" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
