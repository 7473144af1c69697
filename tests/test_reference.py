"""The oracle solves the problem of the paper: checked against general convex solvers, and against its own dual."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from lmp_triton import reference
from lmp_triton.reference import dual_value, solve, support

PS = (1.0, 1.0001, 1.01, 1.1, 1.3, 2.0, 5.0, 100.0, 1e6, math.inf)


def bounds(n, m, p):
    q = reference.conjugate(p)
    gamma = n ** (-1 / q)
    return gamma, gamma * m ** (-1 / p)


def p_norm(weights, p):
    peak = weights.max(initial=0.0)
    if peak == 0 or math.isinf(p):
        return peak
    return peak * np.sum((weights / peak) ** p) ** (1 / p)


@pytest.mark.parametrize("p", [1.1, 1.3, 2.0, 5.0])
def test_against_a_convex_solver(rng, p):
    for _ in range(5):
        n = int(rng.integers(2, 9))
        ell, m = rng.lognormal(0, 1.5, n), float(rng.uniform(1, n))
        gamma, tau = bounds(n, m, p)
        found = minimize(
            lambda w, ell=ell: -w @ ell / ell.max(),
            np.full(n, 1 / n),
            jac=lambda w, ell=ell: -ell / ell.max(),
            bounds=[(0, tau)] * n,
            constraints={
                "type": "ineq",
                "fun": lambda w, gamma=gamma: 1 - np.sum((np.abs(w) / gamma) ** p),
                "jac": lambda w, gamma=gamma: -p * (np.abs(w) / gamma) ** (p - 1) / gamma,
            },
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert solve(ell, m, p).loss == pytest.approx(-found.fun * ell.max(), rel=2e-6)


def test_p_1_against_a_linear_program(rng):
    for _ in range(10):
        n = int(rng.integers(1, 12))
        ell, m = np.round(rng.lognormal(0, 1, n), 1), float(rng.uniform(1, n))
        _, tau = bounds(n, m, 1.0)
        found = linprog(-ell, A_ub=np.ones((1, n)), b_ub=[1.0], bounds=(0, tau))
        assert solve(ell, m, 1.0).loss == pytest.approx(-found.fun, rel=1e-9, abs=1e-12)


def cases(rng):
    yield rng.lognormal(0, 1, 200)
    yield rng.lognormal(0, 4, 300)
    yield rng.exponential(1, 50) * (rng.random(50) < 0.5)  # half of them zero
    yield np.round(rng.exponential(1, 100), 1)  # many ties
    yield np.full(20, 0.7)
    yield 10.0 ** -np.linspace(0, 30, 61)
    yield np.array([3.0, 2.0, 1.0])
    yield np.array([0.4])


@pytest.mark.parametrize("p", PS)
def test_optimality(rng, p):
    """Both norm bounds hold, and the dual value equals the loss: no other weights do better."""
    for ell in cases(rng):
        n = ell.size
        for m in {1.0, float(n), support(n, 0.25), float(rng.uniform(1, n)), float(int(rng.integers(1, n + 1)))}:
            alpha, tau, saturated, weights, loss = solve(ell, m, p)
            gamma, expected_tau = bounds(n, m, p)
            assert tau == pytest.approx(expected_tau, rel=1e-12)
            assert weights.max() <= tau * (1 + 1e-12)
            assert p_norm(weights, p) <= gamma * (1 + 1e-9)
            assert weights.sum() <= 1 + 1e-12
            assert loss == pytest.approx(weights @ ell, rel=1e-13)
            assert loss >= ell.mean() * (1 - 1e-12)
            assert dual_value(ell, m, p, alpha) == pytest.approx(loss, rel=1e-12)
            if p < 1e3:  # beyond, weights far below α are τ but for rounding
                # A loss at α up to rounding has the weight τ up to q − 1 times that.
                rounding = 1e-12 * max(1.0, min(reference.conjugate(p) - 1, 1e4))
                assert saturated == np.sum(weights >= tau * (1 - rounding))


def test_the_mean(rng):
    ell = rng.exponential(1, 40) * (rng.random(40) < 0.7)
    for p, m in [(math.inf, 7.3), (1.0, 40.0), (1.3, 40.0), (3.0, 40.0)]:
        solution = solve(ell, m, p)
        np.testing.assert_allclose(solution.weights, 1 / 40, rtol=1e-13)
        assert solution.saturated == 40
        assert solution.loss == pytest.approx(ell.mean(), rel=1e-13)


def test_m_equal_to_n_does_not_read_before_the_first_loss():
    """Line 14 of the printed algorithm would read π_0."""
    assert solve([2.0, 1.0], 2.0, 1.0).alpha == 1.0
    assert solve([2.0, 1.0], 2.0, 1.0).loss == pytest.approx(1.5)


@pytest.mark.parametrize("p", [1.0, 1.3, math.inf])
def test_what_the_paper_leaves_open(p):
    empty = solve([], 1.0, p)
    assert (empty.loss, empty.alpha, empty.saturated, empty.weights.size) == (0, 0, 0, 0)
    zeros = solve(np.zeros(5), 2.0, p)
    assert (zeros.loss, zeros.alpha) == (0, 0)
    assert np.all(zeros.weights == (0.2 if math.isinf(p) else 0))
    few = solve([0.0, 0.0, 0.0, 5.0], 2.0, p)  # fewer positive losses than m
    if p < math.inf:
        assert few.alpha == 0 and few.saturated == 1 and few.weights[3] == few.tau


def test_ties_share_equally_at_p_1():
    solution = solve([5.0, 2.0, 2.0, 2.0, 1.0], 2.5, 1.0)
    np.testing.assert_allclose(solution.weights * 2.5, [1, 0.5, 0.5, 0.5, 0], rtol=1e-14)


def test_equivariance_and_monotony(rng):
    ell = rng.lognormal(0, 2, 100)
    order = rng.permutation(100)
    base = solve(ell, 17.3, 1.3)
    assert solve(ell * 1e-20, 17.3, 1.3).loss == pytest.approx(base.loss * 1e-20, rel=1e-12)
    np.testing.assert_allclose(solve(ell[order], 17.3, 1.3).weights, base.weights[order], rtol=1e-12)
    by_p = [solve(ell, 17.3, p).loss for p in PS]
    by_m = [solve(ell, m, 1.3).loss for m in np.linspace(1, 100, 30)]
    assert all(a >= b * (1 - 1e-12) for sequence in (by_p, by_m) for a, b in itertools.pairwise(sequence))


def test_near_an_integer_m():
    """α* jumps there, the loss and the weights do not (the example of the design)."""
    at, past = solve([3.0, 2.0, 1.0], 2.0, 1.01), solve([3.0, 2.0, 1.0], 2 + 1e-9, 1.01)
    assert at.alpha == pytest.approx(2.0) and past.alpha == pytest.approx(1.23, abs=0.01)
    assert at.loss == pytest.approx(past.loss, rel=1e-8)
    np.testing.assert_allclose(at.weights, past.weights, atol=1e-8)


def test_p_near_1_keeps_small_losses():
    """Prefix sums of (ℓ/max)^q underflow here: 69 saturated pixels instead of about 990."""
    ell = np.random.default_rng(0).lognormal(0, 1, 4000)
    assert solve(ell, 1000.0, 1.02).saturated > 950


@pytest.mark.parametrize("losses, m, p", [([-1.0], 1, 1.3), ([math.nan], 1, 1.3), ([1.0], 2, 1.3), ([1.0], 1, 0.9)])
def test_bad_input(losses, m, p):
    with pytest.raises(ValueError, match=r"losses|m must|p must"):
        solve(losses, m, p)
