"""What is shipped, what it needs, and that nothing it reads is run."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = {"lmp_triton": "lmp_triton", "kernels": "lmp_triton/kernels", "perf": "lmp_triton/perf"}
"""Folders of the checkout, and where their modules are installed."""


def sources():
    return [path for folder in SHIPPED for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.slow
def test_the_wheel_holds_the_modules_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    about = {name for name in names if ".dist-info/" in name}
    expected = {
        f"{SHIPPED[path.relative_to(ROOT).parts[0]]}/{path.relative_to(ROOT / path.relative_to(ROOT).parts[0])}"
        for path in sources()
    }
    data = {f"lmp_triton/{path.relative_to(ROOT / 'lmp_triton')}" for path in (ROOT / "lmp_triton").rglob("py.typed")}
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / package.replace(".", "/")
        data |= {str(path.relative_to(ROOT)) for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    assert names - about == expected | data
    assert {name.split("/", 1)[1] for name in about} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }


CALLS = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "os.system"}
CALLS |= {"shelve.open", "dill.load", "joblib.load", "yaml.load", "yaml.unsafe_load", "pandas.read_pickle"}
CALLS |= {"pd.read_pickle", "torch.hub.load", "torch.jit.load"}


def test_nothing_that_is_read_is_run():
    """No pickle, no shell, no code made of text; torch.load takes tensors only, and NumPy no objects."""
    seen = 0
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, options = ast.unparse(node.func), {x.arg: ast.unparse(x.value) for x in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
            assert name not in CALLS, where
            assert options.get("shell", "False") == "False", where
            assert options.get("allow_pickle", "False") == "False", where
            assert options.get("weights_only", "True") == "True", where
            seen += 1
    assert seen > 1000


def requirements():
    extras = PROJECT["project"]["optional-dependencies"]
    return [
        *PROJECT["project"]["dependencies"],
        *(text for name, those in extras.items() if name != "all" for text in those),
    ]


def test_every_dependency_has_a_lower_bound_that_holds_here():
    packaging = pytest.importorskip("packaging.requirements")
    for text in requirements():
        requirement = packaging.Requirement(text)
        assert any(x.operator in (">=", "==", "~=") for x in requirement.specifier), text
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if requirement.name != "triton":  # CI tries versions that torch does not ask for
            assert requirement.specifier.contains(version, prereleases=True), (text, version)


def test_triton_is_bounded_above():
    """The kernels follow Triton's versions one by one; nothing else in the core is bounded so."""
    bounds = {re.match(r"[\w-]+", text)[0]: "<" in text for text in PROJECT["project"]["dependencies"]}
    assert bounds == {"torch": False, "triton": True, "numpy": False}
