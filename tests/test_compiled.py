"""Without a GPU: every kernel compiles for every architecture, spills nothing and loads vectors."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "perf" / "static.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[80, 86, 89, 90, 100, 120])
def table(request):
    """The static report of one architecture, from a process of its own: under TRITON_INTERPRET nothing compiles."""
    pytest.importorskip("triton")
    pandas = pytest.importorskip("pandas")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--csv", "-", "--capability", str(request.param)]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return pandas.read_csv(io.StringIO(result.stdout)).set_index("kernel")


def test_nothing_spills(table):
    assert len(table) > 20
    assert (table["spills"] == 0).all() and (table["registers"] < 255).all()


def test_width_of_loads(table):
    """4 pixels a thread. 550·550 is divisible by 4: 64-bit loads of bf16; 321·321 is odd: 16-bit ones.

    Each logit is loaded once a pass and each gradient stored once; the 16-bit loads besides gather x_label.
    """
    wide, odd = table.loc["softmax_losses bf16 C=19"], table.loc["softmax_losses bf16 C=19 odd"]
    assert wide["LDG 64"] == 19 + 4 and wide["LDG 16"] == 4  # 4 more: the int64 labels
    assert odd["LDG 16"] == 19 * 4 + 4
    wide, odd = table.loc["logits_gradient bf16 C=19"], table.loc["logits_gradient bf16 C=19 odd"]
    assert wide["LDG 64"] == 19 and wide["STG 64"] == 19
    assert odd["LDG 16"] == 19 * 4 and odd["STG 16"] == 19 * 4
    assert table.loc["softmax_losses fp32 C=19", "LDG 128"] == 19
    assert table.loc["logits_gradient fp32 C=19", "STG 128"] == 19


def test_instructions_a_pixel(table):
    """About 480 are free at 3 TB/s on an H100 (an estimate of the design); the bounds sit a little above today's."""
    assert table.loc["softmax_losses bf16 C=19", "a pixel"] < 340
    assert table.loc["logits_gradient bf16 C=19", "a pixel"] < 440
    # A loss: what perf/NOTES.md weighs the two solvers by.
    assert table.loc["sort one run", "a pixel"] < 640
    assert table.loc["sort runs", "a pixel"] < 940
