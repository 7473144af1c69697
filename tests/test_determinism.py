"""The same input gives the same bits: on every repeat, in every order of the programs and of the pixels."""

import math

import pytest
import torch
from conftest import CUDA, labelled

import lmp_triton


def solve(losses, p=1.3, backend="triton"):
    """Everything the solver returns, as one tensor of bits."""
    weights, stats = lmp_triton.optimal_weights(losses, p=p, backend=backend)
    loss = lmp_triton.pool_losses(losses, p=p, reduction="none", backend=backend)
    return weights, torch.stack([loss, *(field.float() for field in stats)])


@pytest.fixture
def order_of_programs(monkeypatch):
    """Makes the interpreter visit the programs of every launch in another order."""
    from triton.runtime.interpreter import interpreter_builder

    original = interpreter_builder.set_grid_idx

    def use(order):
        def set_grid_idx(x, y, z):
            original(order(x, interpreter_builder.grid_dim[0]), y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)

    return use


def stride_order(x, size):
    """A permutation of range(size) that leaves no neighbours together."""
    step = next(s for s in range(size // 2 + 1, 2 * size + 2) if math.gcd(s, size) == 1)
    return x * step % size


@pytest.mark.skipif(CUDA, reason="the order of programs can be chosen in the interpreter only")
@pytest.mark.parametrize("p", [1.0, 1.3])
def test_order_of_programs(rng, order_of_programs, p):
    pytest.importorskip("triton")
    losses = torch.rand(2, 7000).exp() - 1
    logits, target = labelled((2, 1500), 5)

    def everything():
        x = logits.clone().requires_grad_()
        loss = lmp_triton.loss_max_pooling(x, target, p=p, ignore_index=255, backend="triton")
        loss.backward()
        return *solve(losses, p), loss.detach(), x.grad

    expected = everything()
    for order in (lambda x, size: x, lambda x, size: size - 1 - x, stride_order):
        order_of_programs(order)
        for got, want in zip(everything(), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("p", [1.0, 1.01, 1.3, 100.0])
def test_order_of_pixels(rng, backend, device, p):
    """All sums are of integers: α*, the loss and the weights do not change by a bit, let alone by 2 ulp.

    On the CPU, PyTorch's exp2 and log1p of an element differ in the last bit with its place (vector lane or rest of
    the loop), so the eager backend there keeps to 2 ulp.
    """
    losses = torch.randn(1, 6000, device=device).mul(2).exp()
    weights, stats = solve(losses, p, backend)
    for _ in range(3):
        order = torch.randperm(6000, device=device)
        permuted_weights, permuted_stats = solve(losses[:, order], p, backend)
        tolerance = {"rtol": 2.0**-22 if backend == "eager" else 0, "atol": 0}
        torch.testing.assert_close(permuted_stats, stats, **tolerance)
        if backend == "triton":
            assert torch.equal(permuted_weights, weights[:, order])


def test_tiling(rng, monkeypatch, device):
    """Another block size, another number of programs, another list: the same bits."""
    pytest.importorskip("triton")
    from lmp_triton.kernels import configs, losses, select, weights

    values = torch.randn(2, 5000, device=device).exp()
    expected = solve(values)
    for block, capacity, programs in ((256, 1 << 14, 3), (2048, 1 << 14, 8), (1024, 64, 1)):
        for module in (configs, select):
            config = configs.SelectConfig(block, 16, programs, capacity)
            monkeypatch.setattr(module, "SELECT", config)
        for module in (losses, weights):
            monkeypatch.setattr(module, "STREAM", configs.StreamConfig(block, 4, programs))
        for got, want in zip(solve(values), expected, strict=True):
            assert torch.equal(got, want)


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
