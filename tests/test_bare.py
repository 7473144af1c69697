"""What `pip install .` alone brings: every public name works, every command works or says what to install."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

KEPT = {"lmp-triton", "torch", "triton", "numpy", "pip", "setuptools"}


def optional_modules():
    """Top-level modules of what is installed here and is neither a dependency of this package nor one of those."""
    needed, queue = set(), [*KEPT]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in needed:
            continue
        needed.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        queue += [re.match(r"[\w.-]+", text)[0] for text in requirements if "extra ==" not in text]
    return sorted(
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not needed & {re.sub(r"[-_.]+", "-", name).lower() for name in distributions}
    )


def bare(code, folder, *arguments, path=None):
    """Run code where the optional modules can't be imported."""
    head = f"import sys\nfor name in {optional_modules()!r}: sys.modules[name] = None\n"
    if path is not None:
        # As if that folder were the current one, and nothing installed from this checkout.
        head += f"sys.path.insert(0, {str(path)!r})\n"
        head += "sys.meta_path = [x for x in sys.meta_path if 'editable' not in getattr(x, '__module__', '').lower()]\n"
    command = [sys.executable, "-c", head + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


COMMANDS = {
    "--version": None,
    "--help": None,
    "info": None,
    "demo": "demo",
    "demo --scene land-cover": "demo",
    "train --config digits": "segmentation",
    "bench sets": None,
    "bench run --set tiny --providers F.cross_entropy --seconds 0.01 --out tiny.csv": None,
    "bench report table.csv": "perf",
    "bench compare table.csv table.csv": "perf",
}
"""Each, and the extra that it needs."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Exit status, output and errors of every command."""
    code = f"""
import contextlib, io, json
from lmp_triton import cli
found = {{}}
for command in {list(COMMANDS)!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(command.split())
        except SystemExit as error:
            status = error.code
    found[command] = status, out.getvalue(), err.getvalue()
print(json.dumps(found))
"""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(next((ROOT / "perf" / "results").glob("*threads.csv")), folder / "table.csv")
    result = bare(code, folder)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_the_blocked_modules_are_those_of_the_extras():
    blocked = optional_modules()
    assert {"pytest", "hypothesis"} <= set(blocked)
    assert not {"torch", "numpy", "triton", "lmp_triton", "sympy", "filelock"} & set(blocked)


def test_public_names(tmp_path):
    code = """
import lmp_triton, torch
for name in lmp_triton.__all__:
    getattr(lmp_triton, name)
x, y = torch.randn(1, 3, 20, requires_grad=True), torch.randint(3, (1, 20))
lmp_triton.LossMaxPooling()(x, y).backward()
lmp_triton.optimal_weights(lmp_triton.pool_losses(torch.rand(2, 20), reduction="none").unsqueeze(0))
lmp_triton.reference.solve([1.0, 2.0], 1.0, 1.3)
print(lmp_triton.obstacle(logits=x))
from lmp_triton.integrations import dropins, hub
dropins.MaxPoolingLoss()(torch.rand(9))
hub.build(__import__("pathlib").Path("hub"))
"""
    result = bare(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.xdist_group("bare")  # one worker runs them all
@pytest.mark.parametrize("command", COMMANDS)
def test_commands(ran, command):
    status, out, err = ran[command]
    if COMMANDS[command] is None:
        assert status == 0 and out and not err, err
    else:
        assert status == 2 and f"lmp-triton[{COMMANDS[command]}]" in err and len(err.splitlines()) <= 4, err


@pytest.fixture
def checkout(tmp_path):
    """One that was not installed."""
    for name in ("lmp_triton", "kernels", "perf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_inside_a_checkout(checkout):
    """Its folder hides an installed package; the kernels, which lie beside it there, are found all the same."""
    pytest.importorskip("triton")
    code = f"""
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, lmp_triton
losses = torch.rand(1, 20)
assert lmp_triton.obstacle(losses=losses) is None
lmp_triton.pool_losses(losses, backend="triton")
import lmp_triton.kernels, lmp_triton.perf
for module in (lmp_triton, lmp_triton.kernels, lmp_triton.perf):
    assert module.__file__.startswith({str(checkout)!r}), module.__file__
"""
    result = bare(code, checkout, path=checkout)
    assert result.returncode == 0, result.stderr


def test_without_kernels(checkout):
    """ "auto" falls back, and who asks is told why."""
    shutil.rmtree(checkout / "kernels")
    code = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, lmp_triton
losses = torch.rand(1, 20)
assert "has no kernels" in lmp_triton.obstacle(losses=losses), lmp_triton.obstacle(losses=losses)
lmp_triton.pool_losses(losses)
try:
    lmp_triton.pool_losses(losses, backend="triton")
except ValueError as error:
    assert "has no kernels" in str(error)
else:
    raise AssertionError
from lmp_triton import cli
assert cli.main(["info"]) == 0
"""
    result = bare(code, checkout, path=checkout)
    assert result.returncode == 0, result.stderr
    assert "has no kernels" in result.stdout
