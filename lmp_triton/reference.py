"""The oracle: Algorithm 1 of the paper in NumPy, float64, in the log domain, one segment at a time.

It is written to be read next to Section 3 of the paper and to be right, not to be fast. Two slips of the printed
algorithm are mended: line 14 must test i > 1 (with m = n it would read π_0), and line 15's set is {π_j : i ≤ j ≤ n}.
All-zero losses and empty segments, which the paper leaves open, have loss 0 and α = 0; their weights are 0,
except that m = n always gives the uniform weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Solution", "dual_value", "solve", "support"]


class Solution(NamedTuple):
    """What `solve` returns: the optimum of equation (4) of the paper for one segment."""

    alpha: float
    """The largest root of η (equation 9); 0 where fewer than m losses are positive."""
    tau: float
    """The bound on each weight: τ = γ·m^(-1/p) with γ = n^(-1/q)."""
    saturated: int
    """How many weights are equal to τ."""
    weights: NDArray[np.float64]
    """w*, shape (n,), in the order of the losses."""
    loss: float
    """L_W = w*·ℓ (equation 10)."""


def conjugate(p: float) -> float:
    """The conjugate exponent q = p/(p-1): ∞ for p = 1 and 1 for p = ∞."""
    if p == 1:
        return math.inf
    return 1.0 if math.isinf(p) else p / (p - 1)


def support(n: int, ratio: float) -> float:
    """m = clamp(ratio·n, 1, n): the least number of pixels the weights must spread over; real, never rounded."""
    return min(max(ratio * n, 1.0), float(n))


def solve(losses: ArrayLike, m: float, p: float) -> Solution:
    """Solve max {w·ℓ : ‖w‖_p ≤ γ, ‖w‖_∞ ≤ τ} for one segment (Theorem 1 and Section 3.2 of the paper).

    Args:
        losses: ℓ, shape (n,), finite and not negative.
        m: real, 1 ≤ m ≤ n (ignored for n = 0).
        p: 1 ≤ p ≤ ∞.

    Returns:
        `Solution(alpha, tau, saturated, weights, loss)`; for n = 0 all are 0 and `weights` is empty.

    Raises:
        ValueError: a loss is negative or not finite, p < 1, or m is outside [1, n].
    """
    ell = np.asarray(losses, dtype=np.float64)
    n = ell.size
    if ell.ndim != 1 or not np.all(np.isfinite(ell)) or np.any(ell < 0):
        raise ValueError("losses must be a vector of finite numbers that are not negative")
    if not p >= 1:
        raise ValueError(f"p must be at least 1, got {p}")
    if n == 0:
        return Solution(0.0, 0.0, 0, ell, 0.0)
    if not 1 <= m <= n:
        raise ValueError(f"m must lie in [1, n] = [1, {n}], got {m}")

    tau = math.exp(-(math.log(n) / conjugate(p) + math.log(m) / p))
    if p == 1:
        return _solve_top_m(ell, m, tau)

    q = conjugate(p)
    order = np.argsort(ell, kind="stable")  # line 1
    first = _first_saturated(ell[order], m, q)  # lines 4 to 10: J* = {π_j : j ≥ first}
    below, saturated = order[:first], order[first:]
    c = m - saturated.size
    peak = ell[below].max(initial=0.0)
    weights = np.zeros(n)
    weights[saturated] = tau
    alpha = 0.0
    if peak > 0:  # line 11, with the powers taken relative to the largest loss that is not in J*
        log_excess = (math.log(np.sum(_power(ell[below] / peak, q))) - math.log(c)) / q  # log(α/peak)
        alpha = peak * math.exp(log_excess)
        # −∞/∞ at p = ∞ is overwritten just below.
        with np.errstate(divide="ignore", invalid="ignore"):
            # q − 1 = 1/(p − 1), without the cancellation.
            weights[below] = tau * np.exp(np.minimum(np.log(ell[below] / peak) - log_excess, 0.0) / (p - 1))
    if m == n or q == 1:
        weights[:] = tau  # the uniform weights, zero losses included
    # A loss at α has the weight τ as well; α carries a rounding error, so it is compared up to one. (Comparing weights
    # would not do: for q − 1 = 1e-8 all of them are close to τ.)
    at_alpha = (ell[below] >= alpha * (1 - 1e-12)) & (ell[below] > 0)
    count = n if m == n or q == 1 else saturated.size + int(at_alpha.sum())
    loss = math.fsum(weights * ell)
    return Solution(alpha, tau, count, weights, loss)


def _power(ratio: NDArray[np.float64], q: float) -> NDArray[np.float64]:
    """ratio^q for ratios in [0, 1]; underflow to 0 is meant."""
    with np.errstate(divide="ignore", under="ignore"):
        return np.exp(q * np.log(ratio))


def _first_saturated(ascending: NDArray[np.float64], m: float, q: float) -> int:
    """The first index i (from 0) of ascending losses with η(ℓ_i) > 0, or n: from there on everything is in J*.

    η(ℓ_i) > 0 ⇔ m − n + i > Σ_{j≤i} (ℓ_j/ℓ_i)^q with i counted from 1. The sum is built up along the order by
    A_i = A_{i−1}·(ℓ_{i−1}/ℓ_i)^q + 1, which neither overflows nor loses the small terms to underflow.
    """
    n = ascending.size
    total, previous = 0.0, 0.0
    for i, value in enumerate(ascending):
        if value == 0:
            continue
        # Where the step is small its logarithm comes from the difference, which is exact.
        step = (previous - value) / value
        log_ratio = math.log1p(step) if step > -0.5 else math.log(previous) - math.log(value) if previous else -math.inf
        total = total * math.exp(q * log_ratio) + 1.0
        previous = value
        # Ties count together: η at a value sees every loss that does not exceed it.
        if (i + 1 == n or ascending[i + 1] > value) and m - n + i + 1 > total:
            return int(np.searchsorted(ascending, value, side="left"))
    return n


def _solve_top_m(ell: NDArray[np.float64], m: float, tau: float) -> Solution:
    """p = 1 (Section 3.2): the m largest losses, the last of them in part; losses tied there share equally."""
    n = ell.size
    alpha = float(np.sort(ell)[n - math.ceil(m)])
    above, tied = ell > alpha, ell == alpha
    share = tau * (m - above.sum()) / tied.sum()
    weights = np.where(above, tau, np.where(tied & ((alpha > 0) | (m == n)), share, 0.0))
    count = int(np.sum(weights >= tau * (1 - 1e-12)))
    return Solution(alpha, tau, count, weights, math.fsum(weights * ell))


def dual_value(losses: ArrayLike, m: float, p: float, alpha: float) -> float:
    """g(λ) = τ·Σλ + γ·‖ℓ−λ‖_q at λ = (ℓ−α)₊ (equation 7): an upper bound of L_W, equal to it at α = α*.

    Args:
        losses: ℓ, shape (n,), n ≥ 1.
        m: real, 1 ≤ m ≤ n.
        p: 1 ≤ p ≤ ∞.
        alpha: any number that is not negative.
    """
    ell = np.asarray(losses, dtype=np.float64)
    q, n = conjugate(p), ell.size
    gamma = math.exp(-math.log(n) / q)
    tau = gamma * math.exp(-math.log(m) / p)
    excess = np.maximum(ell - alpha, 0.0)
    rest = np.minimum(ell, alpha)
    peak = rest.max()
    if peak == 0:
        norm = 0.0
    elif math.isinf(q):
        norm = peak
    else:
        norm = peak * math.exp(math.log(np.sum(_power(rest / peak, q))) / q)
    return tau * float(excess.sum()) + gamma * norm
