"""The example of the segmentation package's README runs as it stands, but for its sizes."""

import re
from pathlib import Path

import pytest
import trees

README = Path(__file__).parent.parent / "lmp_triton" / "segmentation" / "README.md"


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    for package in ("torchvision", "torchmetrics", "rich"):
        pytest.importorskip(package)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for full, small in (("321", "32"), ("overlap=64", "overlap=8"), ("range(10)", "range(2)")):
        assert full in code
        code = code.replace(full, small)
    monkeypatch.chdir(trees.folder(tmp_path))
    exec(compile(code, str(README), "exec"), {"__name__": "__main__"})
    assert 0 <= float(re.findall(r"tensor\(([\d.]+)", capsys.readouterr().out)[-1]) <= 1
