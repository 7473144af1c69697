"""Oracle = eager = Triton: the loss, α*, the number of saturated pixels and every weight, on losses of every kind."""

import math

import numpy as np
import pytest
import torch
from support import CUDA, oracle, solve

import lmp_triton
from lmp_triton.types import Pool

PS = (1.0, 1.000001, 1.05, 1.3, 2.0, 1e8, math.inf)
BETWEEN = (1.0001, 1.01, 50.0, 1e6)


def distributions(rng):
    """Name and float32 losses; each shape is there for a way in which solvers go wrong."""
    yield "uniform", rng.random(700)
    yield "lognormal", rng.lognormal(0, 1, 700)
    yield "heavy tail", rng.lognormal(0, 5, 700)
    yield "trained network", rng.exponential(1e-3, 700) + (rng.random(700) < 0.05) * rng.exponential(3, 700)
    yield "well trained network", 10 ** rng.normal(-4, 1, 700)
    powers = np.exp2(rng.integers(-30, 8, 600).astype(np.float32))  # where bins begin, and just below
    yield "powers of two", np.where(rng.random(600) < 0.5, powers, np.nextafter(powers, np.float32(0)))
    yield "untrained network", 2.9 + 0.3 * rng.standard_normal(700)
    yield "ties", np.round(rng.exponential(1, 700), 1)
    yield "two values", np.where(rng.random(600) < 0.3, 3.0, 0.5)
    yield "all equal", np.full(300, 0.7)
    yield "mostly zero", rng.exponential(1, 400) * (rng.random(400) < 0.1)
    yield "all zero", np.zeros(50)
    yield "one loss", np.array([0.3])
    yield "one outlier", np.append(rng.random(500) * 1e-6, 1e6)
    yield "thirty orders of magnitude", 10.0 ** -rng.uniform(0, 30, 600)
    yield "large", rng.lognormal(80, 1, 400)
    yield "denormal", rng.random(200) * 1e-40
    yield "fifty orders", np.concatenate([[1e30], np.repeat([1e-20, 2e-20, 3e-20], 3)])
    yield "a maximum far off", np.append(3e-12 * np.arange(1, 30), 1e38)


def check(losses, p, ratio, device, **solver):
    """Compare loss, statistics and gradient of `pool_losses` with the oracle, tighter than the contract.

    (The goal is 2e-6·L_ref for the loss, 1e-5·τ for weights at p ≥ 1.05 and q·2^-22·τ below.)
    On a GPU powers are approximations of about half of that, in the range of `solution.power_for`.
    """
    tolerance = 1e-6
    of_weights = 5e-6 if CUDA and 1.05 <= p <= 11 else tolerance
    ell = torch.as_tensor(losses, dtype=torch.float32, device=device)
    expected = oracle(ell, p, ratio)
    loss, weights, stats = solve(ell, p, ratio, scope="batch", **solver)
    # A result below 2^-126 has fewer bits: one step of 2^-149 then.
    assert abs(loss.item() - expected.loss) <= tolerance * expected.loss + 2.0**-149
    assert np.abs(weights.cpu().double().numpy() - expected.weights).max() <= of_weights * expected.tau
    assert stats.tau.item() == pytest.approx(expected.tau, rel=1e-6)
    assert stats.valid.item() == ell.numel()
    assert stats.total_weight.item() == pytest.approx(expected.weights.sum(), rel=of_weights)
    near = np.isclose(ell.double().cpu().numpy(), expected.alpha, rtol=1e-6, atol=2.0**-149).sum()
    assert abs(stats.saturated.item() - expected.saturated) <= near
    return stats, expected


@pytest.mark.parametrize("p", [*PS, *(pytest.param(p, marks=pytest.mark.slow) for p in BETWEEN)])
def test_against_the_oracle(rng, solver, device, p):
    for name, losses in distributions(rng):
        for ratio in (0.01, float(rng.uniform(0.05, 1.0)))[:: rng.choice([1, -1])][: 1 if len(solver) > 1 else 2]:
            print(name, ratio)
            stats, expected = check(losses, p, ratio, device, **solver)
            if p >= 1.05:  # below, α* may jump on a change of m in the last bit, the weights may not
                ulp = np.spacing(np.float32(min(expected.alpha, 3e38)))
                assert abs(stats.alpha.item() - expected.alpha) <= 6 * ulp


@pytest.mark.parametrize("p", [1.0499, 1.05, 10.99, 11.01])
def test_at_the_border_of_the_approximation(rng, configure, device, p):
    """Powers for any p on one side, approximate ones on the other, and for a p from a tensor: all to the contract."""
    pytest.importorskip("triton")
    from lmp_triton.kernels import solution

    assert (solution.power_for(solution.parameters(p, 0.5), "approx") == "approx") == (1.05 <= p <= 11)
    assert solution.power_for(solution.parameters(torch.tensor(1.3), 0.5), "approx") == "exact"
    if not CUDA:
        configure(select={"block": 256, "capacity": 64, "passes": (50,)})
    for name, losses in distributions(rng):
        ratio = float(rng.uniform(0.01, 1))
        print(name, ratio)
        stats, _ = check(losses, p, ratio, device, backend="triton", solver="select")
        losses = torch.as_tensor(losses, dtype=torch.float32, device=device)
        on_device = torch.tensor(p, dtype=torch.float64, device=device)
        _, exact = lmp_triton.optimal_weights(
            losses, p=on_device, ratio=ratio, scope="batch", backend="triton", solver="select"
        )
        torch.testing.assert_close(stats.alpha, exact.alpha, rtol=1e-6, atol=2.0**-149)


@pytest.mark.parametrize("p", [1.0, 1.3])
def test_every_small_n(rng, solver, device, p):
    for n in (2, 3, 5, 8):
        losses = np.round(rng.exponential(1, n), 1)
        for m in range(1, n + 1):
            check(losses, p, m / n, device, **solver)


def test_fifty_orders_apart(rng, solver, device):
    """What lies so far below α* that the ratio is no float32 still has nearly the weight τ where q is nearly 1."""
    check(np.append(np.full(9, 1e-20), 1e30), 1e8, 0.01, device, **solver)


@pytest.mark.parametrize("p", [1.0, 1.3])
def test_exact_counts(rng, solver, device, p):
    """ratio = 1 weighs every loss alike, a zero too; losses equal to a pivot that is α* are saturated, all of them."""
    ascending = np.repeat([0.0, 1.0, 3.0], [50, 150, 100])
    for losses in (ascending, rng.permutation(ascending)):  # of one run all are below the next; each has some of all
        losses = torch.tensor(losses, dtype=torch.float32, device=device)
        weights, stats = lmp_triton.optimal_weights(losses, p=p, ratio=1.0, scope="batch", **solver)
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 300))
        assert stats.saturated.item() == 300
        for m in (100, 250) if p == 1 else ():
            _, stats = lmp_triton.optimal_weights(losses, p=p, ratio=m / 300, scope="batch", **solver)
            assert stats.saturated.item() == m


def test_p_1_in_float64_shares_the_last_of_m(rng):
    """Weights 1/m on the largest ⌊m⌋ losses, the rest on the next: two float64s may have logarithms of one value."""
    losses = torch.as_tensor(rng.gamma(2.0, 1.0, (3000, 12)), dtype=torch.float64)
    weights, _ = lmp_triton.optimal_weights(losses, p=1.0, ratio=0.37, backend="eager")
    expected = torch.tensor([1.0] * 4 + [0.44] + [0.0] * 7, dtype=torch.float64) / 4.44
    assert torch.allclose(weights.sort(descending=True)[0], expected.expand_as(weights), atol=1e-12)


def test_m_next_to_the_number_of_positive_losses(rng, solver, device):
    losses = np.append(rng.exponential(1, 40), np.zeros(60))
    for m in (39, 39.999, 40, 40.001, 41):
        check(losses, 1.3, m / 100, device, **solver)


@pytest.mark.parametrize("passes", [(), (100,)])
def test_short_list_that_overflows(rng, configure, device, passes):
    """More losses in the bracket than the list holds: the last program walks all losses instead."""
    pytest.importorskip("triton")
    configure(select={"capacity": 16, "passes": passes})
    for p in (1.0, 1.05, 1.3):
        for losses in (2 + 0.1 * rng.random(5000), rng.lognormal(0, 1, 5000), np.full(3000, 0.7)):
            check(losses, p, 0.3, device, backend="triton", solver="select")


@pytest.mark.parametrize("p", [1.0, 1.0001, 1.05, 1.3, 50.0])
def test_a_short_list_sorted_or_in_rounds(rng, configure, device, p):
    """Up to `sorted` losses on the list are sorted, more are searched in rounds: both to the contract, α* to 2 ulp."""
    pytest.importorskip("triton")
    for name, losses in distributions(rng):
        ratio = float(rng.uniform(0.01, 1))
        print(name, ratio)
        found = []
        for length in (16, 1024):
            configure(select={"sorted": length})
            found.append(check(losses, p, ratio, device, backend="triton", solver="select")[0])
        in_rounds, by_sorting = (x.alpha.view(torch.int32) for x in found)
        assert (in_rounds - by_sorting).abs().max() <= 2


@pytest.mark.parametrize("p", [1.05, 1.3, 3.0])
def test_a_loss_next_to_alpha(rng, configure, device, p):
    """Whether it is above α* or below hangs on a sum of hundreds of powers, whose errors must not add up."""
    pytest.importorskip("triton")
    ell = np.sort((2.9 + 0.3 * rng.standard_normal(700)).astype(np.float32)).astype(np.float64)
    for length in (16, 1024):
        configure(select={"sorted": length})
        for place in rng.integers(150, 650, 6):
            powers = ((ell[: place + 1] / ell[place]) ** (p / (p - 1))).sum()
            m = len(ell) - 1 - place + powers * (1 + rng.choice([-3e-6, 3e-6]))
            print(length, place, m)
            check(ell, p, m / len(ell), device, backend="triton", solver="select")


def adversaries(rng, n):
    """Losses that make a threshold search take its time."""
    yield np.full(n, 0.7)
    yield np.where(np.arange(n) < n / 3, 3.0, 0.5)
    yield 10.0 ** -np.linspace(0, 30, n)
    yield 2.0 ** -np.linspace(-120, 148, n)  # all of float32, denormals included
    yield np.append(np.full(n - 1, 1e-6), 1e30)
    yield np.arange(n) * 1e-44
    yield np.float32(1) + np.arange(n) * 2.0**-23  # neighbours


@pytest.mark.slow
@pytest.mark.parametrize("which", ["select", "sort"])
@pytest.mark.parametrize("n", [1, 2, 1000, 70_000, 1_100_000])
def test_rounds_are_bounded(rng, configure, device, which, n):
    """At most 31 rounds (32 for the runs), whatever the losses, m and p; and the right result after them."""
    pytest.importorskip("triton")
    from lmp_triton.kernels import workspace

    from lmp_triton import fused

    if not CUDA:  # large blocks: the interpreter works on vectors
        size = 1 << min(17, max(4, n.bit_length() - 1))
        configure(
            select={
                "block": size,
                "solve_block": size,
                "exact_solve_block": size,
                "sorted": 2,
                "passes": (300, 20_000),
            },
            stream={"block": size},
            sort={"run": min(size, 1 << 14)},
        )
    most = 0
    every = list(adversaries(rng, n))
    if n > 1e6 and which == "sort" and not CUDA:
        every = [every[i] for i in rng.choice(len(every), 2, replace=False)]
    for losses in every:
        losses = torch.as_tensor(losses, dtype=torch.float32, device=device)
        positive = int((losses > 0).sum())
        for m in {1.0, float(n), max(1.0, positive - 0.5)} if n < 1e6 else {float(rng.uniform(1, n))}:
            p, ratio = float(rng.choice([1.0, 1.0000001, 1.3, 1e6])), min(m / n, 1.0)
            print(n, m, p, losses[:2])
            pool = Pool(p, ratio, reduction="none", solver=which)
            pixels, pooling = fused.pool_losses(losses.unsqueeze(0), None, pool)
            most = max(most, int(pixels.statistics[workspace.ROUNDS.value]))
            assert pooling.value.item() == pytest.approx(oracle(losses, p, ratio).loss, rel=1e-6, abs=2.0**-149)
    assert most <= 32


def test_several_segments_at_once(rng, solver, device):
    losses = torch.tensor(rng.lognormal(0, 2, (5, 3, 400)), dtype=torch.float32, device=device)
    mask = torch.tensor(rng.random((5, 3, 400)) < 0.8, device=device)
    mask[2] = False
    loss, stats = lmp_triton.pool_losses(losses, mask, reduction="none", **solver, return_stats=True)
    for i in range(5):
        valid = losses[i][mask[i]]
        assert stats.valid[i].item() == valid.numel()
        assert loss[i].item() == pytest.approx(oracle(valid, 1.3, 0.25).loss, rel=1e-6)
    mean = lmp_triton.pool_losses(losses, mask, **solver)
    assert mean.item() == pytest.approx(loss.sum().item() / 4, rel=1e-6)  # the empty segment does not count
    total = lmp_triton.pool_losses(losses, mask, reduction="sum", **solver)
    assert total.item() == pytest.approx(loss.sum().item(), rel=1e-6)
    batch = lmp_triton.pool_losses(losses, mask, scope="batch", **solver)
    assert batch.item() == pytest.approx(oracle(losses[mask], 1.3, 0.25).loss, rel=1e-6)


def test_gradient_of_pool_losses_is_the_weights(rng, solver, device):
    losses = torch.tensor(rng.lognormal(0, 1, (2, 300)), dtype=torch.float32, device=device, requires_grad=True)
    mask = torch.tensor(rng.random((2, 300)) < 0.9, device=device)
    lmp_triton.pool_losses(losses, mask, reduction="sum", **solver).backward()
    weights, _ = lmp_triton.optimal_weights(losses, mask, **solver)
    torch.testing.assert_close(losses.grad, weights, rtol=0, atol=0)
    assert not losses.grad[~mask].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_losses(rng, solver, device, dtype):
    if solver["backend"] == "triton" and dtype == torch.float64:
        pytest.skip("float64 is the eager backend's")
    losses = torch.tensor(rng.exponential(1, (2, 300)), device=device).to(dtype).requires_grad_()
    loss = lmp_triton.pool_losses(losses, reduction="none", **solver)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.sum().backward()
    assert losses.grad.dtype == dtype
    expected = oracle(losses[0], 1.3, 0.25)
    assert loss[0].item() == pytest.approx(expected.loss, rel=1e-6 if dtype != torch.float64 else 1e-13)
    error = np.abs(losses.grad[0].double().cpu().numpy() - expected.weights).max() / expected.tau
    assert error <= {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]


def test_p_and_ratio_as_tensors(rng, solver, device):
    losses = torch.tensor(rng.lognormal(0, 1, (3, 500)), dtype=torch.float32, device=device)
    for dtype in (torch.float32, torch.float64):
        p, ratio = torch.tensor(1.7, dtype=dtype, device=device), torch.tensor(0.3, dtype=dtype, device=device)
        got = lmp_triton.pool_losses(losses, p=p, ratio=ratio, **solver)
        want = lmp_triton.pool_losses(losses, p=p.item(), ratio=ratio.item(), **solver)
        # A float may take the approximate powers of `solution.power_for`, a tensor never does.
        assert got.item() == pytest.approx(want.item(), rel=2e-6 if solver.get("solver") == "select" else 0)


def test_strided_losses_and_masks(rng, solver, device):
    base = torch.tensor(rng.lognormal(0, 1, (3, 40, 2, 30)), dtype=torch.float32, device=device)
    mask = torch.tensor(rng.random((3, 40, 2, 30)) < 0.8, device=device)
    losses, valid = base[:, ::2, 1].transpose(1, 2), mask[:, ::2, 1].transpose(1, 2)
    got = lmp_triton.pool_losses(losses, valid, reduction="none", **solver)
    want = lmp_triton.pool_losses(losses.contiguous(), valid.contiguous(), reduction="none", **solver)
    assert torch.equal(got, want)
    expanded = base[:1, :1, 0].expand(2, 7, 30)
    got = lmp_triton.pool_losses(expanded, reduction="none", **solver)
    want = lmp_triton.pool_losses(expanded.contiguous(), reduction="none", **solver)
    assert torch.equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("p", [1.0, 1.001, 1.3, 1e6])
def test_a_million_losses(rng, device, p):
    check(rng.lognormal(0, 2, 1_000_000), p, 0.25, device, backend="eager")
