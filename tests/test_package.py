"""The wheel holds what it should, and works outside the checkout in an environment of its own."""

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_readme_example(tmp_path):
    """The first Python block of the README, pasted into a file, runs."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert sum(bool(line) for line in example.splitlines()) <= 5
    subprocess.run([sys.executable, "-c", example], check=True, cwd=tmp_path)


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "lmp_triton.cli"]
    info = subprocess.run([*command, "info"], check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "lmp-triton" in info and "torch" in info and "cpu (" in info
    refused = subprocess.run([*command, "fly"], capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and "invalid choice" in refused.stderr


@pytest.mark.slow
def test_wheel(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"lmp_triton", "lmp_triton-0.1.0.dist-info"}
    for expected in ("py.typed", "kernels/select.py", "demo/scene.py", "reference.py"):
        assert f"lmp_triton/{expected}" in names
    assert any(name.endswith("LICENSE") for name in names)

    clean = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(clean)], check=True)
    python = clean / "bin" / "python"
    # Its dependencies come from here, to spare the download: a path entry adds modules, but not editable installs.
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    code = (
        "import torch, lmp_triton, lmp_triton.kernels.select;"
        f"assert lmp_triton.__file__.startswith({site!r}), lmp_triton.__file__;"
        "x = torch.randn(1, 3, 20, requires_grad=True); y = torch.randint(0, 3, (1, 20));"
        "[lmp_triton.loss_max_pooling(x, y, backend=b).backward() for b in ('eager', 'triton')]; print('ok')"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.strip() == "ok", result.stderr
