"""The perf suite works without a GPU: it times, resumes, refuses wrong results, reports and compares."""

import contextlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from support import CUDA

pandas = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from lmp_triton.perf import bench, measure, providers, report, sets, table, workloads  # noqa: E402

from lmp_triton.cli import main  # noqa: E402

PERF = Path(__file__).parents[1] / "perf"
ALWAYS = ["lmp_triton, eager", "LMP by torch.sort", "F.cross_entropy"]


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """Runs the smallest set; returns the path of its table."""
    monkeypatch.setattr(measure, "SECONDS", 0.02)
    path = tmp_path / "times.csv"

    def run(*names):
        assert main(["bench", "run", "--set", "tiny", "--out", str(path), "--providers", *names]) == 0
        return path

    return run


def test_run_report_compare(timed, tmp_path, capsys):
    path = timed(*ALWAYS)
    rows = pandas.read_csv(path)
    assert set(rows["provider"]) == set(ALWAYS) and (rows["status"] == "ok").all() and (rows["ms"] > 0).all()
    assert (rows["p20"] <= rows["ms"]).all() and (rows["ms"] <= rows["p80"]).all()
    assert set(rows["pass"]) == {"forward", "forward+backward"} and rows["device"].notna().all()
    capsys.readouterr()
    timed(*ALWAYS)  # resumed: nothing is left to do
    assert "0 to do" in capsys.readouterr().out
    assert len(pandas.read_csv(path)) == len(rows)
    assert main(["bench", "report", str(path), "--to", str(tmp_path / "report")]) == 0
    assert "ratio to F.cross_entropy" in capsys.readouterr().out
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png") == 3 and (tmp_path / "report" / "roofline.png").stat().st_size > 5000
    assert main(["bench", "compare", str(path), str(path)]) == 0
    slower = tmp_path / "slower.csv"
    rows.assign(ms=2 * rows["ms"], commit="abc").to_csv(slower, index=False)
    assert main(["bench", "compare", str(path), f"{slower}@abc"]) == 1
    assert main(["bench", "compare", str(path), str(slower), "--threshold", "3"]) == 0
    assert main(["bench", "compare", str(path), f"{slower}@H100"]) == 2
    assert "no row of a commit or device like" in capsys.readouterr().err


def test_stages_of_a_profiled_provider():
    """On a GPU a provider with few kernels is drawn kernel by kernel."""
    rows = {"provider": "x", "pass": ["forward", "forward+backward"], "ms": [1.0, 3.0], "launches": [1, 2]}
    profiled = pandas.DataFrame(rows | {"kernels_us": ["a_kernel=900.0", "a_kernel=900.0; b_kernel=2000.0"]})
    assert report.stages_of(profiled) == {"x": [("a_kernel", 0.9), ("b_kernel", 2.0)]}
    assert report.stages_of(pandas.DataFrame(rows)) == {"x": [("forward", 1.0), ("backward", 2.0)]}


def test_what_cannot_run_says_why(timed, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    rows = pandas.read_csv(timed("Liger cross-entropy"))
    assert (
        rows["status"].str.startswith("not available: liger-kernel is not installed").all() and rows["ms"].isna().all()
    )


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_a_wrong_result_gets_no_speed(timed, monkeypatch, fault):
    def make(workload):
        right = providers.ours("eager")(workload)

        def loss(logits, target):
            if fault == "value":
                return right(logits, target) * (1 + 1e-4)
            return right(logits, target) + 1e-3 * (logits - logits.detach()).sum()

        return loss

    monkeypatch.setitem(providers.PROVIDERS, "F.cross_entropy", providers.Provider(make, pooled=True))
    rows = pandas.read_csv(timed("F.cross_entropy"))
    assert rows["status"].str.startswith("wrong: the").all() and rows["ms"].isna().all()


@pytest.mark.parametrize("name", ["lmp_triton, eager", "LMP by torch.sort", "top-k (detectron2)", "OHEM (mmseg)"])
def test_providers(name):
    for workload in workloads.TINY:
        logits, target = workload.make(torch.device("cpu"), 3)
        value = providers.PROVIDERS[name].make(workload)(logits, target)
        value.backward()
        assert value.isfinite() and logits.grad.isfinite().all()


def test_the_passes_alone_are_a_cross_entropy():
    logits, target = workloads.TINY[0].make(torch.device("cpu"), 3)
    target.clamp_min_(0)
    value = providers.passes_alone(workloads.TINY[0])(logits, target)
    expected = torch.nn.functional.cross_entropy(logits, target)
    (grad,), (right,) = (torch.autograd.grad(x, logits) for x in (value, expected))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, right)


def test_upsampling_is_timed_beside_interpolation():
    """Loss and gradient against the oracle's through a float64 interpolation; memory from PyTorch's allocations."""
    some = ("lmp_triton, eager, upsampled", "F.interpolate + lmp_triton, eager", providers.LARGE)
    for workload in (*workloads.TINY_UPSAMPLING, workloads.TINY[0]._replace(stride=8, shape=(1, 7, 200, 200))):
        logits, target = workload.make(torch.device("cpu"), 3)
        assert target.shape[1:] == workload.shape[2:] and logits.numel() < target.numel()
        found = sets.timing.rows_of(workload, {n: providers.UPSAMPLED[n] for n in some}, torch.device("cpu"), 1e9)
        assert [row["status"] for name in some for row in found[name]] == ["ok"] * 6
    peaks = {name: found[name][-1]["peak_mib"] for name in some}
    large = 7 * 200 * 200 * 4 / 2**20
    assert (
        0 < peaks[some[0]] < 0.75 * peaks[providers.LARGE] and min(peaks[some[1]], peaks[providers.LARGE]) > 2 * large
    )


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_wrong_upsampled_gets_no_time(what):
    name, workload = "lmp_triton, eager, upsampled", workloads.TINY_UPSAMPLING[0]

    def make(workload):
        right = providers.UPSAMPLED[name].make(workload)

        def loss(logits, target):
            value = right(logits, target)
            return 0.99 * value if what == "loss" else value + 0.01 * (value - value.detach())

        return loss

    found = sets.timing.rows_of(workload, {name: providers.Provider(make, pooled=True)}, torch.device("cpu"), 1e9)
    assert found[name][0]["status"].startswith(f"wrong: the {what} is")


def test_workloads():
    """The trained ones are sure of most pixels, the untrained of none; both have ignored pixels."""
    for workload in workloads.TINY:
        logits, target = workload.make(torch.device("cpu"), 3)
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")[target != -100]
        assert (losses < 0.1).float().mean() > 0.7 if workload.losses == "trained" else losses.min() > 0.3
        assert 0 < (target == -100).sum() < 0.2 * target.numel()
    assert all(w.logits_bytes < 2**33 for w in workloads.FULL) and len(workloads.FULL) > 35


@pytest.mark.parametrize("workload", workloads.TINY_SEGMENTS + (workloads.Losses(2_000, "heavy tail", p=1.7),))
@pytest.mark.parametrize("name", ["lmp_triton, eager", "LMP by torch.sort", "mpl.pytorch's algorithm", "torch.topk"])
def test_solvers_agree(name, workload):
    """The ways to pool losses beside each other are ways to the same loss; what isn't gets no time."""
    found = sets.timing.rows_of(workload, {name: providers.SOLVERS[name]}, torch.device("cpu"), 1e9)[name]
    if name == "torch.topk" and workload.p != 1:
        assert found[0]["status"] == "not available: p = 1 only"
    elif name == "mpl.pytorch's algorithm" and workload == workloads.TINY_SEGMENTS[1]:
        assert found[0]["status"].startswith("wrong: the loss is")  # where no loss reaches α*, it takes the largest
    else:
        assert [row["status"] for row in found] == ["ok", "ok"]


def test_sorted_pooling_is_the_oracle(rng):
    """The one sort-based loss of the suite, ties, ignored pixels and small supports included."""
    from lmp_triton import reference

    for p in (1.0, 1.3, 7.0):  # nearer to 1 its powers underflow, as the usual way does
        for ratio in (0.001, 0.25, 0.9):
            losses = torch.randn(3, 200).mul(2).exp().round(decimals=1)
            valid = torch.rand(3, 200) < 0.8
            want = [
                reference.solve(ell[keep].double().numpy(), reference.support(int(keep.sum()), ratio), p).loss
                for ell, keep in zip(losses, valid, strict=True)
            ]
            got = providers.sorted_pooling(losses, valid, p, ratio).item()
            assert abs(got - sum(want) / 3) <= 2e-6 * got, (p, ratio)


def test_spinning_processes_end():
    """With the context, and with the process that started them, however it ends."""
    with measure.spinning(1):
        pass
    script = "import os\nfrom lmp_triton.perf import measure\nprint(measure.spin().pid, flush=True)\nos._exit(1)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/").stdout
    spinner = int(said)
    for _ in range(100):
        if not Path(f"/proc/{spinner}").exists():
            return
        time.sleep(0.1)
    os.kill(spinner, signal.SIGKILL)
    raise AssertionError("it spins on")


def test_a_busy_workload_is_timed_beside_spinning_processes(monkeypatch):
    started = []
    monkeypatch.setattr(measure, "SECONDS", 0.02)
    monkeypatch.setattr(measure, "spinning", lambda n: started.append(n) or contextlib.nullcontext())
    quiet, busy = workloads.TINY[0], workloads.TINY[0]._replace(busy=True)
    for workload in (quiet, busy):
        sides = {"F.cross_entropy": providers.PROVIDERS["F.cross_entropy"]}
        rows = sets.timing.rows_of(workload, sides, torch.device("cpu"), 1e9)["F.cross_entropy"]
        assert [row["status"] for row in rows] == ["ok", "ok"]
    assert started == [os.cpu_count()] and busy.name == quiet.name + " busy"


@pytest.mark.skipif(CUDA, reason="takes the place of a GPU")
def test_host_times_come_from_a_gpu_that_is_not_there(tmp_path):
    """In a process without the interpreter; no bandwidth is claimed for them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = tmp_path / "host.csv"
    command = [sys.executable, "-m", "lmp_triton.perf.bench", "run", "--set", "host", "--out", str(out)]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, capture_output=True)
    rows = table.read(out)
    assert {row["provider"] for row in rows} == set(sets.HOST) and len(rows) == 2 * len(sets.HOST)
    assert all(row["status"] == "ok" and row["clock"] == "host" and not row["effective_gb_s"] for row in rows)
    assert main(["bench", "report", str(out), "--to", str(tmp_path / "report")]) == 0


def test_sets_are_named(capsys):
    assert main(["bench", "sets"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == list(sets.SETS)
    assert main(["bench", "run", "--set", "host", "--providers", "Lovász (smp)"]) == 2
    assert "the set has no provider Lovász (smp)" in capsys.readouterr().err


@pytest.mark.skipif(CUDA, reason="shows what it does without a GPU")
def test_gpu_session_without_a_gpu(tmp_path):
    from lmp_triton.perf import gpu_session

    command = ["bash", str(PERF / "gpu_session.sh"), "--out", str(tmp_path / "out")]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert "environment" in said and said.count("no GPU: not run") == len(gpu_session.stages(tmp_path)) - 1
    with tarfile.open(tmp_path / "out" / "gpu_session.tar.gz") as archive:
        assert {"gpu_session/summary.txt", "gpu_session/environment.log"} <= set(archive.getnames())


def test_a_stage_that_hangs_is_killed(tmp_path):
    from lmp_triton.perf import gpu_session

    stage = gpu_session.Stage("hang", [sys.executable, "-c", "import time; print('on'); time.sleep(60)"], 1)
    assert gpu_session.run_stage(stage, tmp_path / "log", 2.0, tmp_path).startswith("KILLED after")
    assert "on" in (tmp_path / "log").read_text()
    missing = gpu_session.Stage("missing", ["no-such-tool"], 1)
    assert "not on this machine" in gpu_session.run_stage(missing, tmp_path / "log", 2.0, tmp_path)


def test_machine_and_commit():
    here = bench.machine(torch.device("cpu"))
    assert set(here) == set(bench.MACHINE) and here["device"] and here["torch"] == torch.__version__


@pytest.mark.skipif(CUDA, reason="counts what a GPU would do")
@pytest.mark.parametrize(
    "command, column",
    [
        ("search.py --lengths 1000 --p 1.3", "pass 2"),
        pytest.param("host_operations.py", "picking out a few", marks=pytest.mark.slow),
        pytest.param("solvers.py steps --lengths 300", "bytes a loss", marks=pytest.mark.slow),
        pytest.param("solvers.py errors --lengths 300", "w of tau", marks=pytest.mark.slow),
        pytest.param("solvers.py code", "instructions an element", marks=pytest.mark.slow),
        pytest.param("upsampling.py --strides 16", "floor", marks=pytest.mark.slow),
    ],
)
def test_scripts_that_the_pages_name(command, column):
    """Beside perf/static.py and perf/launches.py, which tests of compiled code and of launches run."""
    pytest.importorskip("triton")
    script, *options = command.split()
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    said = subprocess.run(
        [sys.executable, str(PERF / script), *options], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert column in said and len(said.splitlines()) >= 5


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="counts what a GPU would do")
def test_memory_of_the_upsampling():
    """At most an eighth of what interpolation and cross-entropy take above logits and labels, from stride 8."""
    pytest.importorskip("triton")
    code = (
        "from lmp_triton.perf import upsampling\nprint(upsampling.memory(90, (8, 19, 1024, 1024), 8)['of its memory'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert 0.08 < float(said.stdout) <= 0.125


def test_simulation_of_the_search(configure):
    """perf/search.py finds as many losses in the bracket as the kernels do, and takes about as many rounds, where these
    sort next to no list."""
    workspace = pytest.importorskip("lmp_triton.kernels.workspace")
    from lmp_triton.perf import search

    from lmp_triton import fused
    from lmp_triton.types import Pool

    configure(select={"sorted": 2})
    n = 3000
    for name, losses in search.distributions(n):
        for p in (1.0, 1.3):
            (row,) = search.simulate(name, losses, p, (workspace.BINS.value,))
            device = torch.device("cuda" if CUDA else "cpu")
            ell = torch.as_tensor(losses, dtype=torch.float32, device=device)
            pool = Pool(p, search.RATIO, reduction="none", solver="select")
            pixels, _pooling = fused.pool_losses(ell.unsqueeze(0), None, pool)
            words = pixels.statistics.tolist()
            assert words[workspace.LISTED.value] == row["first"], (name, p)
            assert abs(words[workspace.ROUNDS.value] - row["rounds, 8192"]) <= 2, (name, p)
