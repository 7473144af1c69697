"""The same input gives the same bits: on every repeat, in every order of the programs and of the pixels."""

import math

import pytest
import torch
from support import CUDA, labelled

import lmp_triton


def weights_and_statistics(losses, p=1.3, **solver):
    """Everything the solver returns: the weights; the loss and the statistics."""
    weights, stats = lmp_triton.optimal_weights(losses, p=p, **solver)
    loss = lmp_triton.pool_losses(losses, p=p, reduction="none", **solver)
    return weights, torch.stack([loss, *(field.float() for field in stats)])


def ulps(a, b):
    """The largest distance between two float32 tensors, in units in the last place."""
    return (a.view(torch.int32) - b.view(torch.int32)).abs().max().item()


@pytest.fixture
def order_of_programs(monkeypatch):
    """Makes the interpreter visit the programs of every launch in another order."""
    import interpreter

    def use(order):
        def run(program, count):
            for number in range(count):
                interpreter.set_program(order(number, count))
                program()

        monkeypatch.setattr(interpreter, "run_programs", run)

    return use


def stride_order(x, size):
    """A permutation of range(size) that leaves no neighbours together."""
    step = next(s for s in range(size // 2 + 1, 2 * size + 2) if math.gcd(s, size) == 1)
    return x * step % size


@pytest.mark.skipif(CUDA, reason="the order of programs can be chosen in the interpreter only")
@pytest.mark.parametrize("p", [1.0, 1.3])
def test_order_of_programs(rng, order_of_programs, solver, p):
    if solver["backend"] == "eager":
        pytest.skip("it has no programs")
    losses = torch.rand(2, 900).exp() - 1
    logits, target = labelled((2, 700), 5)

    def everything():
        x = logits.clone().requires_grad_()
        loss = lmp_triton.loss_max_pooling(x, target, p=p, ignore_index=255, **solver)
        loss.backward()
        return *weights_and_statistics(losses, p, **solver), loss.detach(), x.grad

    expected = everything()
    for order in (lambda x, size: x, lambda x, size: size - 1 - x, stride_order):
        order_of_programs(order)
        for got, want in zip(everything(), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.skipif(CUDA, reason="the order of programs can be chosen in the interpreter only")
@pytest.mark.parametrize("size", [(16, 40), (10, 160)])  # what spans give to their left and right: in one, kept apart
def test_order_of_programs_that_upsample(rng, order_of_programs, configure, size):
    configure(upsampled={"lanes": 32, "height": 2, "per_multiprocessor": 1})
    logits, target = torch.randn(2, 3, 4, 5), labelled((2, *size), 3)[1]

    def both():
        x = logits.clone().requires_grad_()
        loss = lmp_triton.upsampled_loss_max_pooling(x, target, ignore_index=255, backend="triton")
        loss.backward()
        return loss.detach(), x.grad

    expected = both()
    for order in (lambda x, size: size - 1 - x, stride_order):
        order_of_programs(order)
        assert all(map(torch.equal, both(), expected))


@pytest.mark.parametrize("p", [1.0, 1.01, 1.3, 100.0])
def test_order_of_pixels(rng, solver, device, p):
    """By selection all sums are of integers: α*, the loss and the weights don't change by a bit, let alone by 2 ulp.

    By sorting, which losses share a run changes, and with it the rounding of the sums in each. So it does in the eager
    backend on the CPU, where exp2 of an element differs in the last bit with its place (vector lane or rest).
    """
    losses = torch.randn(1, 1500, device=device).mul(2).exp()
    weights, stats = weights_and_statistics(losses, p, **solver)
    exact, tau = solver.get("solver") == "select", stats[2].max()
    for _ in range(3):
        order = torch.randperm(losses.shape[1], device=device)
        permuted_weights, permuted_stats = weights_and_statistics(losses[:, order], p, **solver)
        assert ulps(permuted_stats[1], stats[1]) <= (0 if exact else 2)  # α*
        torch.testing.assert_close(permuted_stats, stats, rtol=0 if exact else 1e-6, atol=0)
        torch.testing.assert_close(permuted_weights, weights[:, order], rtol=0, atol=0 if exact else 1e-6 * tau)


@pytest.mark.parametrize("which", ["select", "sort"])
def test_tiling(rng, configure, device, which):
    """Other blocks and programs: the same bits by selection. Other runs, lists and passes: α* to 2 ulp."""
    pytest.importorskip("triton")
    values = torch.randn(2, 2500, device=device).exp()
    expected, expected_stats = weights_and_statistics(values, backend="triton", solver=which)
    for block, programs, capacity, passes in (
        (256, 3, 8192, ()),
        (2048, 8, 8192, ()),
        (1024, 1, 16, ()),
        (512, 4, 16, (9, 99)),
    ):
        select = {
            "block": block,
            "solve_block": block,
            "exact_solve_block": block,
            "per_multiprocessor": programs,
            "capacity": capacity,
            "passes": passes,
        }
        configure(
            select=select,
            stream={"block": block, "per_multiprocessor": programs},
            sort={"run": block, "lanes": 8},
        )
        weights, stats = weights_and_statistics(values, backend="triton", solver=which)
        exact = which == "select" and not passes and capacity == 8192  # a list that overflows is not sorted
        assert ulps(stats[1], expected_stats[1]) <= (0 if exact else 2)  # α*
        torch.testing.assert_close(weights, expected, rtol=0, atol=0 if exact else 1e-6 * expected_stats[2].max())


def test_repeats(rng, backend, device):
    logits, target = labelled((2, 40, 41), 7, device=device)
    runs = []
    for _ in range(20 if CUDA else 3):
        x = logits.clone().requires_grad_()
        loss = lmp_triton.loss_max_pooling(x, target, ignore_index=255, backend=backend)
        loss.backward()
        runs.append((loss.detach(), x.grad))
    for loss, grad in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(grad, runs[0][1])
