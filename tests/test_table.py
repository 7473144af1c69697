"""A table of results survives whatever ends the process that writes it, and no other file is taken for one."""

import os
import signal
import subprocess
import sys

import pytest
from lmp_triton.perf import bench, table
from lmp_triton.perf.table import COLUMNS, Table, Unusable

from lmp_triton.cli import main

HERE = dict.fromkeys(table.MACHINE, "x") | {"workload": "w", "pass": "forward", "clock": "end to end", "status": "ok"}
HEADER = ",".join(COLUMNS)


def row(provider="a", ms=1.5, **more):
    return HERE | {"provider": provider, "ms": ms} | more


def test_rows_come_back(tmp_path):
    path = tmp_path / "deep" / "t.csv"
    with Table(path) as t:
        t.append([row(status='failed: "two\nlines", a comma, Lovász'), row("b")])
    with Table(path) as t:
        assert len(t.rows) == 2
        t.append([row("c", ms=0.123456789)])
    first, second, third = table.read(path)
    assert first["status"] == 'failed: "two lines", a comma, Lovász' and third["ms"] == "0.12346"
    assert path.read_text().count("\n") == 4 and second["provider"] == "b"


def test_cut_anywhere(tmp_path, capsys):
    """However much of the file was written: what is whole stays, what is torn is set aside, and it goes on."""
    path, aside = tmp_path / "t.csv", tmp_path / "t.csv.torn"
    with Table(path) as t:
        t.append([row(status="Lovász"), row("b", kernels_us="a=1.0; b=2.0")])
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        aside.unlink(missing_ok=True)
        with Table(path) as t:
            assert len(t.rows) == max(0, sum(end <= size for end in ends) - 1), size
            t.append([row("again")])
        rows = table.read(path)
        assert rows[-1]["provider"] == "again" and path.read_text().startswith(HEADER + "\n")
        torn = size not in (0, *ends)
        assert aside.exists() == torn and ("set aside" in capsys.readouterr().err) == torn, size


@pytest.mark.parametrize(
    "inside", ["glued,to,another", HEADER, "x," * (len(COLUMNS) - 1) + "x", ",".join(["nan"] * len(COLUMNS))]
)
def test_torn_in_the_middle(tmp_path, inside):
    """As earlier versions left them: rows glued to others, a second header, words where numbers belong."""
    path = tmp_path / "t.csv"
    with Table(path) as t:
        t.append([row()])
    with path.open("a") as file:
        file.write(inside + "\n")
        file.write(path.read_text().splitlines()[1] + "\n")
    assert len(table.read(path)) == 2
    with Table(path) as t:
        assert len(t.rows) == 2
    assert path.with_name("t.csv.torn").read_text().startswith(inside[:10])


FOREIGN = {
    "foreign": b"a,b\n1,2\n",
    "words": b"hello",
    "binary": bytes(range(256)) * 4,
    "a picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "zeros": bytes(1000),
    "an old header": HEADER.replace("clock,", "").encode() + b"\n",
}


@pytest.mark.parametrize("what", [*FOREIGN, "empty", "missing", "folder", "header alone"])
@pytest.mark.parametrize("command", ["run", "report", "compare", "compare, as B"])
def test_files_that_are_no_table(tmp_path, capsys, what, command):
    """One line that names the file, never a traceback, never 1, which means "slower"; and the file is left alone."""
    pytest.importorskip("pandas")
    path, good = tmp_path / "it.csv", tmp_path / "good.csv"
    with Table(good) as t:
        t.append([row()])
    if what == "folder":
        path.mkdir()
    elif what != "missing":
        path.write_bytes(FOREIGN.get(what, b"" if what == "empty" else HEADER.encode() + b"\n"))
    arguments = {
        "run": ["run", "--set", "tiny", "--out", str(path)],
        "report": ["report", str(path)],
        "compare": ["compare", str(path), str(good)],
        "compare, as B": ["compare", str(good), str(path)],
    }[command]
    if command == "run" and what in ("empty", "missing", "header alone"):
        return  # it is written
    before = path.read_bytes() if path.is_file() else None
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "it.csv" in said, said
    assert (path.read_bytes() if path.is_file() else None) == before


def test_compare_of_tables_that_don_t_match(tmp_path, capsys):
    pytest.importorskip("pandas")
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    with Table(a) as t:
        t.append([row(), row("gone"), row(ms=2.0, torch="y")])  # the last of two counts
    with Table(b) as t:
        t.append([row(ms=2.1), row("gone", ms="", status="wrong: the loss is 3")])
    assert main(["bench", "compare", str(a), str(b)]) == 0
    said = capsys.readouterr().out
    assert "1 in common, 0 slower" in said and "no time in B: gone on w: wrong: the loss is 3" in said
    assert main(["bench", "compare", str(b), str(a), "--threshold", "0.9"]) == 1
    with Table(b) as t:
        t.append([row(device="another")])
    assert main(["bench", "compare", str(a), str(b)]) == 2
    assert "holds several devices" in capsys.readouterr().err
    for bad in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(SystemExit) as ended:
            main(["bench", "compare", str(a), str(a), "--threshold", bad])
        assert ended.value.code == 2


def test_a_fault_in_a_command_is_not_slower(tmp_path, capsys, monkeypatch):
    from lmp_triton.perf import report

    def fails(options):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(report, "compare", fails)
    assert main(["bench", "compare", "a", "b"]) == 2
    assert capsys.readouterr().err == "lmp-triton bench: RuntimeError: two lines\n"


def test_one_writer_at_a_time(tmp_path):
    with Table(tmp_path / "t.csv"), pytest.raises(Unusable, match="being written by another process"):
        Table(tmp_path / "t.csv").__enter__()


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.exists("/proc"), reason="needs /proc")
def test_what_cannot_be_written(tmp_path):
    for path in ("/proc/nothing/t.csv", str(tmp_path)):
        with pytest.raises(Unusable, match="can't be written"):
            bench.run(bench_options(path))


def bench_options(out):
    import argparse

    return argparse.Namespace(set="tiny", out=out, providers=["F.cross_entropy"], seconds=None)


def test_full_disk(tmp_path):
    """All of the rows of a call or none; the table stays what it was. (A limit on the size of files stands in.)"""
    script = """
import resource, signal, sys
from pathlib import Path
from lmp_triton.perf.table import COLUMNS, Table, Unusable
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Table(Path(sys.argv[1])) as t:
    t.append([dict.fromkeys(COLUMNS, 1)])
    size = Path(sys.argv[1]).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, size + 5))
    try:
        t.append([dict.fromkeys(COLUMNS, 2)])
    except Unusable as reason:
        print(reason)
"""
    path = tmp_path / "t.csv"
    said = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "can't be written" in said.stdout
    assert path.read_text() == HEADER + "\n" + ",".join(["1"] * len(COLUMNS)) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on(tmp_path, by):
    """Killed before its first row, and after it: the next run does what is left."""
    path = tmp_path / "t.csv"
    names = ["lmp_triton, eager", "LMP by torch.sort", "F.cross_entropy"]
    command = [sys.executable, "-m", "lmp_triton.perf.bench", "run", "--set", "tiny", "--out", str(path)]
    command += ["--providers", *names]
    for rows in (0, 1):  # lines beyond the header to wait for
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > rows):
                pass
            process.send_signal(by)
        assert path.read_text().startswith(HEADER)
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = [(row["workload"], row["provider"], row["pass"]) for row in table.read(path)]
    assert len(done) == len(set(done)) and {provider for _w, provider, _p in done} == set(names)
    assert not path.with_name("t.csv.torn").exists()
