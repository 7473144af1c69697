"""Logarithms of ratios of losses, of which powers are made."""

from __future__ import annotations

from torch import Tensor

LOG2E = 1.4426950408889634


def log2_ratio_near(x: Tensor, t: Tensor | float) -> Tensor:
    """log2(x/t) for 0 ≤ x ≤ 2t: from the difference, which is exact near 1. Nothing overflows.

    With d = x/t − 1 it is 2·atanh(d/(2 + d)). (log1p(d) would do as well; PyTorch's CPU code takes thirteen times
    as long for it as for atanh.)
    """
    d = (x - t).div_(t)
    return d.div_(d + 2).atanh_().mul_(2 * LOG2E)
