"""Several programs of an image that wait for each other, in the interpreter: one thread each (tests/scheduler.py).

The same bits as separate launches whatever order they run in, also where one hardly ever gets its turn; and a wait for
what never comes is found.
"""

import pytest
import torch
from support import CUDA, labelled

import lmp_triton
from lmp_triton import settings

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(CUDA, reason="schedules the interpreter; perf/stress.py --cooperative does so on a GPU")

import triton.language as tl  # noqa: E402
from lmp_triton.kernels import forward, select, workspace  # noqa: E402
from scheduler import Hang, reverse, round_robin, scheduled, shuffled, starving  # noqa: E402
from watch import watching  # noqa: E402

ORDERS = {"in turn": round_robin, "the last first": reverse, "by chance": shuffled(7)}
ORDERS |= {f"program {number} starves": starving(number) for number in (0, 1, -1)}


@pytest.fixture
def room(monkeypatch, configure):
    """A device for eight programs a launch, in which an image takes several."""
    for module in (select, forward):
        monkeypatch.setattr(module, "resident_programs", lambda *arguments: 8)
    settings = {"block": 128, "capacity": 8, "solve_block": 64, "passes": (10, 200)}
    configure(select=settings, forward_solve_block=64, stream={"block": 128})


def run(logits, target, p=1.3, solver="select"):
    x = logits.detach().requires_grad_()
    loss, stats = lmp_triton.loss_max_pooling(
        x, target, p=p, ignore_index=255, backend="triton", solver=solver, return_stats=True
    )
    loss.backward()
    return (loss.detach(), *stats, x.grad)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cooperative", settings.WAYS)
def test_the_same_bits_in_every_order(rng, monkeypatch, room, order, cooperative):
    logits, target = labelled((2, 20, 31), 4)
    expected = run(logits, target)
    monkeypatch.setenv(settings.COOPERATIVE, cooperative)
    with watching(), scheduled(ORDERS[order]) as scheduler:
        found = run(logits, target)
    assert scheduler.most >= 6 and scheduler.turns > 20  # several programs an image, which took turns
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cooperative", ["solve", "forward"])
def test_an_oversized_launch_hangs_and_is_found(rng, monkeypatch, room, cooperative):
    """What a cooperative launch is for: with fewer programs on the device than wait for each other, none goes on."""
    monkeypatch.setenv(settings.COOPERATIVE, cooperative)
    logits, target = labelled((1, 20, 31), 4)
    with pytest.raises(Hang), scheduled(round_robin, limit=3000, resident=1):
        run(logits, target)


def test_a_flag_that_nobody_raises_is_found(rng, monkeypatch, room):
    monkeypatch.setenv(settings.COOPERATIVE, "solve")
    monkeypatch.setattr(select, "raise_flag", lambda flag: None)
    logits, target = labelled((1, 20, 31), 4)
    with pytest.raises(Hang), scheduled(round_robin, limit=3000):
        run(logits, target)


@pytest.mark.parametrize("order", ["in turn", "the last first", "program -1 starves"])
def test_sorting_takes_turns_too(rng, configure, order):
    configure(sort={"run": 128, "lanes": 4})
    logits, target = labelled((2, 20, 31), 4)
    expected = run(logits, target, solver="sort")
    with watching(), scheduled(ORDERS[order]) as scheduler:
        found = run(logits, target, solver="sort")
    assert scheduler.most >= 6
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@triton.jit
def relay(flag, data, out, value, PROGRAMS: tl.constexpr):
    """Each program waits for the one before it, and adds to what that one left."""
    program = tl.program_id(0)
    workspace.wait_for(flag, program)
    tl.store(out + program, tl.load(data))
    tl.debug_barrier()
    tl.store(data, tl.load(data) + value)
    workspace.raise_flag(flag)


@pytest.mark.parametrize("order", ORDERS)
def test_a_relay(order):
    """raise_flag and wait_for by themselves: what was written before the flag is read after the wait."""
    flag, data = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    out = torch.full((5,), -1, dtype=torch.int32)
    with watching(), scheduled(ORDERS[order]):
        relay[(5,)](flag, data, out, 3, 5)
    assert out.tolist() == [0, 3, 6, 9, 12]


def test_kernels_leave_it_to_the_workspace():
    """What programs tell each other goes through one file: outside of it no atomic acquires or releases."""
    from pathlib import Path

    for path in sorted(Path(__file__).parents[1].joinpath("kernels").glob("*.py")):
        text = path.read_text()
        if path.name != "workspace.py":
            assert 'sem="acq' not in text and 'sem="rel' not in text.replace('sem="relaxed"', ""), path
            assert "atomic_cas" not in text and text.count("atomic_") == text.count('sem="relaxed"'), path
