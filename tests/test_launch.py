"""Launches: how many, how many of them cooperative, on which device, and how many kernels are compiled for new values.

Without a GPU they are counted on one that is not there (perf/standin.py), in a process without the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import CUDA, labelled

import lmp_triton
from lmp_triton import settings

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def seen():
    """What perf/launches.py says."""
    pytest.importorskip("pandas")
    script = Path(__file__).parents[1] / "perf" / "launches.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), "--json"]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(result.stdout)


def forward_of(rows, shape, cooperative):
    (row,) = (r for r in rows if r["shape"].startswith(shape) and r["cooperative"] == cooperative)
    assert row["backward"] == ["logits_gradient_kernel"]
    return row


ABSENT = "counts launches on a GPU that is not there"


@pytest.mark.xdist_group("launches")  # one worker asks perf/launches.py
@pytest.mark.skipif(CUDA, reason=ABSENT)
@pytest.mark.parametrize(
    "shape, cooperative, names, in_all",
    [
        ("16x19x40x40", "none", ["softmax_losses_kernel", "sort_kernel"], 4),
        ("2x19x550x550", "none", ["softmax_losses_kernel", *["select_kernel"] * 2], 5),
        ("8x19x1024x1024", "none", ["softmax_losses_kernel", *["select_kernel"] * 2], 5),
        ("2x19x550x550", "solve", ["softmax_losses_kernel", "select_kernel"], 4),
        ("8x19x1024x1024", "solve", ["softmax_losses_kernel", "select_kernel"], 4),
        ("2x19x550x550", "forward", ["forward_kernel"], 3),
        ("8x19x1024x1024", "forward", ["forward_kernel"], 3),
    ],
)
def test_number_of_launches(seen, shape, cooperative, names, in_all):
    """One memset, and these; the cooperative one is the last, and all its programs are on the device at once."""
    row = forward_of(seen["launches"], shape, cooperative)
    assert row["forward"] == names and row["memsets"] == 1 and row["in all"] == in_all
    assert row["cooperative launches"] == (names[-1:] if cooperative != "none" else [])
    if cooperative != "none":
        assert row["programs"][-1] <= 132 * 8


@pytest.mark.xdist_group("launches")
@pytest.mark.skipif(CUDA, reason=ABSENT)
@pytest.mark.parametrize("why", ["refused", "no room"])
@pytest.mark.parametrize("cooperative", ["solve", "forward"])
def test_where_a_cooperative_launch_cannot_be(seen, why, cooperative):
    """The driver refuses it, or there are more images than programs that fit: separate launches instead."""
    row = forward_of(seen[why], "2x19x550x550" if why == "refused" else "32x19x100x100", cooperative)
    assert not row["cooperative launches"]
    assert row["forward"] == ["softmax_losses_kernel", *["select_kernel"] * 2]


@pytest.mark.xdist_group("launches")
@pytest.mark.skipif(CUDA, reason=ABSENT)
def test_no_new_kernel_for_a_new_value(seen):
    assert seen["compiled"] == 0


def test_unknown_way_to_launch(monkeypatch):
    monkeypatch.setenv(settings.COOPERATIVE, "yes")
    with pytest.raises(ValueError, match="LMP_TRITON_COOPERATIVE must be one of"):
        lmp_triton.loss_max_pooling(torch.randn(1, 2, 9), torch.zeros(1, 9, dtype=torch.long), backend="triton")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("p", [1.0, 1.3])
def test_the_same_from_every_launch(rng, monkeypatch, configure, device, p, layout, reduction):
    """The losses and all phases of the solve in one launch, or one by one: the same bits."""
    if not CUDA:
        select = {"block": 512, "capacity": 16, "solve_block": 128, "passes": (10, 200)}
        configure(select=select, forward_solve_block=128)
    logits, target = labelled((2, 30, 40), 5, device=device)
    if layout == "channels_last":
        logits = logits.contiguous(memory_format=torch.channels_last)
    found = []
    for cooperative in settings.WAYS:
        monkeypatch.setenv(settings.COOPERATIVE, cooperative)
        x = logits.detach().requires_grad_()
        loss, stats = lmp_triton.loss_max_pooling(
            x,
            target,
            p=p,
            ignore_index=255,
            reduction=reduction,
            backend="triton",
            solver="select",
            return_stats=True,
        )
        loss.sum().backward()
        found.append((loss.detach(), *stats, x.grad))
    for one, other in zip(found[0] * 2, found[1] + found[2], strict=True):
        assert torch.equal(one, other)


def test_on_the_device_of_the_tensor(rng, monkeypatch, device):
    seen = []
    original = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: seen.append(tensor.device) or original(tensor))
    logits, target = labelled((1, 20, 30), 5, device=device)
    lmp_triton.loss_max_pooling(logits.requires_grad_(), target, ignore_index=255, backend="triton").backward()
    assert seen == [logits.device] * 3


@pytest.mark.skipif(not CUDA, reason="the test on a GPU that is not there covers it without one")
def test_no_new_kernel_for_a_new_value_on_a_gpu(rng, device):
    from lmp_triton.kernels import launcher

    def run(p, ratio, ignore_index, shape):
        logits, target = labelled(shape, 19, device=device, ignore_index=ignore_index)
        lmp_triton.loss_max_pooling(
            logits.requires_grad_(), target, p=p, ratio=ratio, ignore_index=ignore_index, backend="triton"
        ).backward()

    run(1.3, 0.25, 255, (2, 96, 96))
    before = len(launcher._compiled)
    for arguments in (
        (1.0, 1.0, -1, (2, 96, 96)),
        (1.7, 0.1, -100, (3, 112, 128)),
        (float("inf"), 0.5, 254, (5, 128, 160)),
    ):
        run(*arguments)
    assert len(launcher._compiled) == before


@pytest.mark.skipif(CUDA, reason="looks into the interpreter")
def test_a_wait_is_for_the_phase_before_it(rng, monkeypatch, configure, device):
    """A program alone waits for nobody, and a wait for too little goes unnoticed: the flag must be at its value."""
    from lmp_triton.kernels import forward, select
    from triton import language as tl

    seen = []

    def checked(flag, value):
        seen.append((int(tl.atomic_add(flag, 0, sem="acquire").handle.data.item()), int(value)))

    monkeypatch.setattr(forward, "wait_for", checked)
    monkeypatch.setattr(select, "wait_for", checked)
    configure(select={"block": 512, "capacity": 4, "solve_block": 128, "passes": (10, 200)})
    logits, target = labelled((1, 30, 40), 5, device=device)
    waits = {}
    for cooperative in ("solve", "forward"):
        monkeypatch.setenv(settings.COOPERATIVE, cooperative)
        seen.clear()
        lmp_triton.loss_max_pooling(logits, target, ignore_index=255, backend="triton", solver="select")
        waits[cooperative] = list(seen)
    assert all(flag == value for rows in waits.values() for flag, value in rows), waits
    assert waits["solve"][0] == (1, 1) and waits["forward"][:2] == [(1, 1), (2, 2)]


def test_what_is_compiled_anew(monkeypatch):
    """For other types, alignments, constants, warps, registers and ways to launch, and for nothing else."""
    from lmp_triton.kernels import launcher

    compiled = []
    monkeypatch.setattr(launcher, "_compiled", {})
    monkeypatch.setattr(launcher, "_compile", lambda *arguments: compiled.append(arguments) or len(compiled))
    monkeypatch.setattr(launcher.triton, "JITFunction", object)  # whatever is launched counts as a kernel
    x = torch.zeros(64)

    def number_of(tensor, number=1, constants=(128,), warps=4, cooperative=False, registers=None):
        return launcher._ready("kernel", ((tensor, None, number),), constants, warps, cooperative, registers)

    assert number_of(x) == number_of(x[4:], 16) == number_of(x[:1], -5) == 1
    others = number_of(x[1:]), number_of(x.double()), number_of(None), number_of(x, constants=(256,))
    others += (
        number_of(x, warps=8),
        number_of(x, cooperative=True),
        launcher._ready("another", ((x, None, 1),), (), 4, 0),
    )
    assert (*others, number_of(x, registers=255)) == tuple(range(2, 10))


def test_what_is_handed_on(monkeypatch):
    """To a compiled kernel: the grid, then its arguments, then its constants."""
    from lmp_triton.kernels import launcher

    class Compiled:
        def __getitem__(self, grid):
            return lambda *given: seen.append((grid, given))

    seen = []
    monkeypatch.setattr(launcher, "_ready", lambda *arguments: Compiled())
    launcher.launch("kernel", 7, ("tensors", 2), ("constants",), 4)
    assert seen == [((7, 1, 1), ("tensors", 2, "constants"))]
