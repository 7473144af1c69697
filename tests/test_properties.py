"""What must hold for any losses, p and m, on whatever Hypothesis comes up with."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import oracle, solve

from lmp_triton import reference

# Sums of hundreds of losses must not overflow float32, nor weights fall below its normal numbers.
LOSS = st.one_of(
    st.just(0.0),
    st.sampled_from([0.5, 1.0, 2.0, 3.0]),  # ties
    st.floats(0, 20, width=32, allow_subnormal=False),
    st.floats(-25, 25, width=16).map(lambda x: float(np.float32(10.0**x))),
)
LOSSES = st.lists(LOSS, min_size=1, max_size=150)
P = st.one_of(
    st.sampled_from([1.0, math.inf, 1.3]),
    st.floats(1e-6, 1, exclude_min=True).map(lambda x: 1 + x),
    st.floats(1, 1e8),
)
RATIO = st.floats(0.004, 1)


def examples(count):
    """Fresh ones on every run; the failing one is printed."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=checks, print_blob=True)


def numbers(losses, p, ratio, solver):
    """The loss, the weights, and the statistics."""
    loss, weights, stats = solve(torch.tensor(losses, dtype=torch.float32), p, ratio, scope="batch", **solver)
    return loss.item(), weights.double().numpy(), [x.item() for x in stats]


@examples(30)
@given(losses=LOSSES, p=P, ratio=RATIO)
def test_optimal_and_as_the_oracle(solver, losses, p, ratio):
    ell = torch.tensor(losses, dtype=torch.float32).double().numpy()
    n, m = ell.size, reference.support(ell.size, ratio)
    expected = oracle(torch.tensor(losses, dtype=torch.float32), p, ratio)
    loss, weights, (_, tau, valid, _, total) = numbers(losses, p, ratio, solver)
    assert loss == pytest.approx(expected.loss, rel=1e-6, abs=2.0**-149)
    assert np.abs(weights - expected.weights).max() <= 1e-6 * expected.tau
    assert valid == n
    # Both norm bounds of the feasible set, and its consequences.
    assert weights.max() <= tau * (1 + 1e-6)
    peak = weights.max()
    if peak > 0 and p < 1e4:
        norm = peak * np.sum((weights / peak) ** p) ** (1 / p)
        assert norm <= n ** (-1 / reference.conjugate(p)) * (1 + 2e-6)
    assert total <= 1 + 2e-6
    assert loss >= ell.mean() * (1 - 2e-6)
    # No weights do better: the dual value of the oracle's λ*.
    gap = reference.dual_value(ell, m, p, expected.alpha) - loss
    assert abs(gap) <= 2e-6 * loss + 2.0**-148


@pytest.mark.slow
@examples(15)
@given(losses=LOSSES, p=P, ratio=RATIO, exponent=st.integers(-20, 20), seed=st.integers(0, 2**32 - 1))
def test_scale_and_order(solver, losses, p, ratio, exponent, seed):
    """L(2^k·ℓ) = 2^k·L(ℓ), the weights stay; and they follow the pixels."""
    assume(max(losses) > 1e-20)
    scaled = np.float32(losses) * np.float32(2.0**exponent)
    assume(np.all(scaled / np.float32(2.0**exponent) == np.float32(losses)) and scaled.max() < 1e30)
    loss, weights, _ = numbers(losses, p, ratio, solver)
    scaled_loss, scaled_weights, (_, tau, *_) = numbers(scaled.tolist(), p, ratio, solver)
    assert scaled_loss == pytest.approx(loss * 2.0**exponent, rel=1e-6)
    assert np.abs(scaled_weights - weights).max() <= 2e-6 * tau
    order = np.random.default_rng(seed).permutation(len(losses))
    loss_again, weights_again, _ = numbers(np.float32(losses)[order].tolist(), p, ratio, solver)
    assert loss_again == pytest.approx(loss, rel=1e-6)
    assert np.abs(weights_again - weights[order]).max() <= 2e-6 * tau


@pytest.mark.slow
@examples(15)
@given(losses=LOSSES, p=st.tuples(P, P), ratio=st.tuples(RATIO, RATIO))
def test_monotone(solver, losses, p, ratio):
    """A larger p and a larger m shrink the feasible set."""
    low, high = (numbers(losses, p_i, ratio[0], solver)[0] for p_i in sorted(p))
    assert low >= high * (1 - 2e-6)
    low, high = (numbers(losses, p[0], r, solver)[0] for r in sorted(ratio))
    assert low >= high * (1 - 2e-6)
