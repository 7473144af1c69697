"""Schedules: the ratio goes where it should, a resumed run goes on, and nothing compiles anew."""

import math

import pytest
import torch
from support import CUDA, labelled

import lmp_triton
from lmp_triton import LossMaxPooling, RatioSchedule, anneal

pytestmark = pytest.mark.traced


def test_anneal():
    assert [anneal(i, 4, 1.0, 0.2) for i in range(6)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    cosine = [anneal(i, 4, 1.0, 0.2, "cosine") for i in range(6)]
    assert cosine == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * min(i, 4) / 4)) for i in range(6)])
    assert anneal(7, 7, 1.0, 0.3) == 0.3  # exactly
    for bad in ({"step": -1}, {"steps": 0}, {"shape": "step"}):
        with pytest.raises(ValueError, match="must be"):
            anneal(**{"step": 0, "steps": 3, "start": 1.0, "end": 0.5, **bad})


@pytest.mark.parametrize("shape", ["linear", "cosine"])
@pytest.mark.parametrize("parameter", [float, torch.tensor])
def test_ratio_goes_from_the_mean_to_its_target(parameter, shape):
    criterion = LossMaxPooling(ratio=parameter(0.25))
    tensor = criterion.ratio
    schedule = RatioSchedule(criterion, 5, shape=shape)
    seen = [float(criterion.ratio)]
    for _ in range(7):
        schedule.step()
        seen.append(float(criterion.ratio))
    assert seen == pytest.approx([anneal(i, 5, 1.0, 0.25, shape) for i in range(8)])
    assert seen[0] == 1.0 and seen[5:] == [0.25] * 3
    if parameter is torch.tensor:
        assert criterion.ratio is tensor  # a graph that was captured reads this one
    else:
        assert isinstance(criterion.ratio, float)


def test_of_a_criterion_that_moved():
    """`to` may have made a new tensor: the schedule fills the one that the criterion has now."""
    criterion = LossMaxPooling(ratio=torch.tensor(0.25))
    schedule = RatioSchedule(criterion, 2)
    criterion.ratio = criterion.ratio.clone()
    schedule.step()
    assert criterion.ratio == 0.625


def test_loss_at_the_start_is_the_mean(rng, backend, device):
    logits, target = labelled((2, 6, 7), 5, device=device)
    for ratio in (0.25, torch.tensor(0.25, device=device)):
        criterion = LossMaxPooling(ratio=ratio, ignore_index=255, scope="batch", backend=backend)
        schedule = RatioSchedule(criterion, 3)
        mean = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
        torch.testing.assert_close(criterion(logits, target), mean)
        for _ in range(3):
            schedule.step()
        expected = lmp_triton.loss_max_pooling(
            logits, target, ratio=0.25, ignore_index=255, scope="batch", backend=backend
        )
        assert criterion(logits, target) == expected > mean


@pytest.mark.parametrize("parameter", [float, torch.tensor])
def test_resumed_run(tmp_path, parameter):
    def start():
        criterion = LossMaxPooling(ratio=parameter(0.25))
        return criterion, RatioSchedule(criterion, 10, start=0.9, shape="cosine")

    criterion, schedule = start()
    for _ in range(4):
        schedule.step()
    torch.save(schedule.state_dict(), tmp_path / "checkpoint")
    resumed_criterion, resumed = start()
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    for _ in range(8):
        assert float(criterion.ratio) == float(resumed_criterion.ratio)
        schedule.step()
        resumed.step()
    assert float(resumed_criterion.ratio) == 0.25


def test_bad_arguments():
    criterion = LossMaxPooling(ratio=0.5)
    for options, says in (
        ({"steps": 0}, "steps at least 1"),
        ({"start": 1.5}, r"start must be in \(0, 1\], got 1.5"),
        ({"end": 0.0}, r"end must be in \(0, 1\], got 0.0"),
        ({"shape": "exponential"}, "shape must be one of"),
    ):
        with pytest.raises(ValueError, match=says):
            RatioSchedule(criterion, **{"steps": 3, **options})
    schedule = RatioSchedule(criterion, 3)
    state = schedule.state_dict()
    state["last_epoch"] = state.pop("last_step")
    with pytest.raises(ValueError, match=r"unknown keys \['last_epoch', 'last_step'\]"):
        schedule.load_state_dict(state)


@pytest.mark.parametrize("backend", ["triton", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_tensor_compiles_once(rng, backend, device):
    """And the graph reads the value of the step."""
    from torch._dynamo.testing import CompileCounter

    logits, target = labelled((2, 6, 7), 5, device=device)
    criterion = LossMaxPooling(
        torch.tensor(1.3, device=device), torch.tensor(0.25, device=device), ignore_index=255, backend=backend
    )
    schedule = RatioSchedule(criterion, 12)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    seen = set()
    for i in range(12):
        criterion.p.fill_(anneal(i, 12, 2.0, 1.1))
        loss = compiled(logits, target)
        torch.testing.assert_close(loss, criterion(logits, target), rtol=2e-6, atol=0)
        seen.add(loss.item())
        schedule.step()
    assert counter.frame_count == 1 and len(seen) == 12


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_a_cuda_graph_reads_the_tensor(rng, backend, device):
    logits, target = labelled((2, 40, 50), 5, device=device)
    x = logits.requires_grad_()
    criterion = LossMaxPooling(ratio=torch.tensor(0.25, device=device), ignore_index=255, backend=backend)
    schedule = RatioSchedule(criterion, 4)

    def step():
        loss = criterion(x, target)
        return loss, *torch.autograd.grad(loss, x)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(5):
        graph.replay()
        for result, expected in zip(captured, step(), strict=True):
            assert torch.equal(result, expected)
        schedule.step()


def test_schedule_of_a_compiled_criterion(rng, device):
    """What torch.compile returns for a module passes its attributes on."""
    criterion = LossMaxPooling(ratio=0.5)
    schedule = RatioSchedule(torch.compile(criterion), 2)
    schedule.step()
    assert criterion.ratio == 0.75
