"""Losses at the ends of the number range: the largest, normal, denormal, and with denormals read as 0.

Each was once wrong: x + t overflows above half the largest number, so did sums of losses and α* times a count.
"""

import math

import numpy as np
import pytest
import torch
from support import CUDA, oracle, solve

import lmp_triton
from lmp_triton import reference, search

LARGEST = {torch.float32: torch.finfo(torch.float32).max, torch.float64: torch.finfo(torch.float64).max}


def pooled(losses, p, ratio, in_rounds, monkeypatch, reduction="none"):
    """Loss, weights and statistics by the eager backend, by either of its searches."""
    if in_rounds:
        monkeypatch.setattr(search, "gives_arrays", lambda *_: False)
    loss, weights, stats = solve(losses, p, ratio, reduction=reduction, backend="eager")
    return loss.double(), weights.double().numpy(), stats


@pytest.fixture(params=[False, True], ids=["host", "rounds"])
def in_rounds(request):
    return request.param


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("length", [6, 20_000])  # sorted, and counted
@pytest.mark.parametrize("p", [1.0, 1.0001, 1.3, 4.0, 50.0, math.inf])
def test_as_after_scaling_down(rng, monkeypatch, in_rounds, dtype, length, p):
    """Near the largest number the solution is that of losses 2^-40 times as large, whose sums are harmless."""
    for scale in (1.0, 2.0**-2, 2.0**-60):
        fractions = torch.as_tensor(rng.choice([1.0, 0.99, 0.5, 1e-3, 0.0], length) * (1 - 1e-3 * rng.random(length)))
        losses = (fractions[None] * LARGEST[dtype] * scale).to(dtype)
        loss, weights, stats = pooled(losses, p, 0.3, in_rounds, monkeypatch)
        expected = oracle(losses[0].double() * 2.0**-40, p, 0.3)
        assert loss.item() * 2.0**-40 == pytest.approx(expected.loss, rel=2e-6)
        assert np.abs(weights[0] - expected.weights).max() <= 2e-6 * expected.tau
        assert stats.total_weight.item() == pytest.approx(expected.weights.sum(), rel=2e-6)


def test_the_example(monkeypatch, in_rounds):
    losses = torch.tensor([[2.0, 2.02, 2.04, 1.0, 0.2, 0.0]]) * 1e38
    loss, weights, _ = pooled(losses, 1.0, 0.3, in_rounds, monkeypatch)
    assert loss.item() == pytest.approx(2.0311e38, rel=1e-4)
    np.testing.assert_allclose(weights[0], [0, 0.8 / 1.8, 1 / 1.8, 0, 0, 0], atol=1e-6)


def test_all_equal_to_the_largest(monkeypatch, in_rounds):
    """J* is empty and α* above the largest number, the loss is not."""
    for dtype, largest in LARGEST.items():
        loss, weights, stats = pooled(torch.full((1, 50), largest, dtype=dtype), 1.3, 0.1, in_rounds, monkeypatch)
        assert loss.item() == pytest.approx(largest, rel=1e-6) and stats.alpha.isinf()
        np.testing.assert_allclose(weights, 0.02, rtol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_large_segments(monkeypatch, in_rounds, reduction):
    """The mean of representable losses is representable; a sum that is not is infinite, and its gradient is right."""
    losses = torch.full((8, 40), 3e38)
    loss, weights, _ = pooled(losses, 1.3, 0.5, in_rounds, monkeypatch, reduction)
    assert loss.item() == (pytest.approx(3e38, rel=1e-6) if reduction == "mean" else math.inf)
    np.testing.assert_allclose(weights, 1 / 40 / (8 if reduction == "mean" else 1), rtol=1e-6)


@pytest.mark.parametrize("length", [300, 20_000])
@pytest.mark.parametrize("p", [1.0, 1.3, 20.0])
def test_smallest(rng, monkeypatch, in_rounds, length, p):
    """Around the smallest normal number, and below: a loss has the bits that are left."""
    tiny = torch.finfo(torch.float32).tiny
    for top in (4 * tiny, tiny / 64):
        losses = torch.tensor(rng.random((1, length)) * top, dtype=torch.float32)
        loss, weights, _ = pooled(losses, p, 0.3, in_rounds, monkeypatch)
        expected = oracle(losses[0], p, 0.3)
        assert abs(loss.item() - expected.loss) <= 1e-6 * expected.loss + 2.0**-149
        assert np.abs(weights[0] - expected.weights).max() <= 1e-6 * expected.tau


@pytest.mark.parametrize("length", [300, 20_000])
def test_flushed(rng, monkeypatch, in_rounds, length):
    """Where the processor reads denormals as 0, they are losses of 0, also beside normal ones; nothing is NaN."""
    assert torch.set_flush_denormal(True)
    try:
        denormal = torch.full((1, length), 1e-40)
        loss, weights, stats = pooled(denormal, 1.3, 0.3, in_rounds, monkeypatch)
        assert loss.item() == 0 and not weights.any() and stats.valid.item() == length
        mixed = denormal.clone()
        mixed[0, : length // 2] = torch.as_tensor(rng.random(length // 2), dtype=torch.float32)
        loss, weights, _ = pooled(mixed, 1.3, 0.3, in_rounds, monkeypatch)
        loss, weights = loss.item(), weights[0].copy()
    finally:
        torch.set_flush_denormal(False)
    mixed[0, length // 2 :] = 0
    expected = oracle(mixed[0], 1.3, 0.3)
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    assert np.abs(weights - expected.weights).max() <= 1e-6 * expected.tau


def test_both_searches_agree(rng):
    """On whatever magnitude, at every length from sorted to counted."""
    for _ in range(20):
        n = int(10 ** rng.uniform(0, 4.7))
        losses = 10.0 ** (rng.uniform(-30, 30) + rng.uniform(0, 6) * rng.standard_normal(n))
        losses = torch.as_tensor(losses, dtype=torch.float32).clamp_max(3e38)[None]
        for q in (float(1 + 10 ** rng.uniform(-4, 4)), search.Q_CAP[torch.float32]):
            call = losses, torch.tensor(float(rng.uniform(0.01, 1)), dtype=torch.float64), torch.tensor(q).double()
            one = search.Crossing(*torch.ops.lmp_triton.crossing(*call))
            other = search.in_rounds(*call)
            assert one.valid == other.valid and one.above == other.above
            alphas = [
                found.pivot.double().log2() + (found.power_sum / (found.m - found.above)).log2() / q
                for found in (one, other)
            ]
            if one.pivot > 0:
                assert abs(alphas[0] - alphas[1]).item() < 1e-6


def test_large_logits():
    """Differences of finite logits that overflow are infinite losses, NaN by the contract; large ones are exact."""
    logits = torch.tensor([[[1e30, 0.0], [0.0, 1e30]]]).requires_grad_()
    loss = lmp_triton.loss_max_pooling(logits, torch.tensor([[1, 1]]), ratio=0.5, p=1.0, backend="eager")
    loss.backward()
    assert loss.item() == np.float32(1e30) and logits.grad.tolist() == [[[1.0, 0.0], [-1.0, 0.0]]]
    logits = torch.tensor([[[3e38], [-3e38]]])
    assert lmp_triton.loss_max_pooling(logits, torch.tensor([[1]]), backend="eager").isnan()


@pytest.mark.parametrize("solver", ["select", "sort"])
@pytest.mark.parametrize("scale", [3.4e38, 1.6e38, 2e-38, 1e-40], ids=["largest", "half", "smallest", "denormal"])
def test_kernels(rng, solver, scale):
    """The same of the kernels; a denormal loss has the bits that are left."""
    pytest.importorskip("triton")
    for p in (1.0, 1.3):
        losses = torch.as_tensor(rng.random((2, 90)) ** 3 * scale, dtype=torch.float32)
        x = losses.clone().requires_grad_()
        loss = lmp_triton.pool_losses(x, p=p, ratio=0.3, reduction="none", backend="triton", solver=solver)
        loss.sum().backward()
        for i in range(2):
            expected = oracle(losses[i], p, 0.3)
            assert abs(loss[i].item() - expected.loss) <= 2e-6 * expected.loss + 2.0**-149
            assert np.abs(x.grad[i].double().numpy() - expected.weights).max() <= 1e-5 * expected.tau


@pytest.mark.skipif(CUDA, reason="the processor's switch: kernels on a GPU keep denormals")
@pytest.mark.parametrize("solver", ["eager", "select", "sort"])
@pytest.mark.parametrize("p", [1.0, 1.3])
def test_flushed_by_every_solver(rng, solver, p):
    """The same, few losses being normal, and losses around the smallest normal number.

    (There two losses may differ by less than that number, which reads as nothing: to eager they may be ties.)
    """
    if solver != "eager":
        pytest.importorskip("triton")
    options = {"backend": "eager"} if solver == "eager" else {"backend": "triton", "solver": solver}
    tiny = torch.finfo(torch.float32).tiny
    cases = [np.where(np.arange(300) < some, rng.random(300), 1e-40) for some in (0, 20, 150)]
    for values in (*cases, 4 * tiny * rng.random(300)):
        losses = torch.as_tensor(values, dtype=torch.float32)[None]
        x = losses.clone().requires_grad_()
        assert torch.set_flush_denormal(True)
        try:
            loss, stats = lmp_triton.pool_losses(x, p=p, ratio=0.3, reduction="none", return_stats=True, **options)
            loss.sum().backward()
        finally:
            torch.set_flush_denormal(False)
        expected = oracle(torch.where(losses[0] < tiny, 0.0, losses[0]), p, 0.3)
        assert abs(loss.item() - expected.loss) <= 2e-6 * expected.loss and stats.valid.item() == 300
        assert x.grad.isfinite().all()
        if solver != "eager" or values.max() > tiny * 4:
            assert np.abs(x.grad[0].double().numpy() - expected.weights).max() <= 1e-5 * expected.tau


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_large_segments_in_the_kernels(reduction):
    pytest.importorskip("triton")
    losses = torch.full((8, 40), 3e38)
    loss = lmp_triton.pool_losses(losses, ratio=0.5, reduction=reduction, backend="triton")
    assert loss.item() == (pytest.approx(3e38, rel=1e-6) if reduction == "mean" else math.inf)


@pytest.mark.parametrize("p", [1.0, 1.3, 20.0, math.inf])
def test_oracle(rng, p):
    """Near the largest float64, and near the smallest normal one, it says what it says in between."""
    losses = rng.choice([1.0, 0.5, 0.0], 50) * (1 - 1e-3 * rng.random(50))
    expected = reference.solve(losses, 15.0, p)
    for scale in (2.0**1023, 2.0**-960):
        found = reference.solve(losses * scale, 15.0, p)
        assert found.saturated == expected.saturated
        assert found.loss / scale == pytest.approx(expected.loss, rel=1e-12)
        np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("length", [100, 20_000])
def test_a_sum_overflows_before_its_powers(monkeypatch, in_rounds, length):
    """Relative to the smaller losses the powers of the larger two are just below 2^1024."""
    losses = torch.ones(1, length)
    losses[0, 7] = losses[0, 70] = 2 ** (1023.7 / 21)
    loss, weights, stats = pooled(losses, 1.05, 0.5, in_rounds, monkeypatch)
    expected = oracle(losses[0], 1.05, 0.5)
    assert loss.item() == pytest.approx(expected.loss, rel=1e-6)
    assert np.abs(weights[0] - expected.weights).max() <= 1e-6 * expected.tau
    assert stats.saturated.item() == 2
