"""Sums over the ranks of a process group: all that pooling over several processes adds to the eager solver.

Every function is a collective: all ranks of the group must call it. The results have the same bits on every rank.
torch.distributed is imported on first use.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def sum_of_integers(x: Tensor, group: Any) -> Tensor:
    """Σ over the ranks of x, int64, in place: exact, so in whatever order the backend adds."""
    import torch.distributed as dist

    dist.all_reduce(x, group=group)
    return x


def sum_of_reals(x: Tensor, group: Any) -> Tensor:
    """Σ over the ranks of x, floating: gathered and added in the order of the ranks, by every rank alike."""
    import torch.distributed as dist

    parts = x.new_empty(dist.get_world_size(group), *x.shape)
    dist.all_gather(list(parts.unbind()), x, group=group)
    return parts.sum(0)
