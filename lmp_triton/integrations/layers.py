"""The loss as layers of the Hugging Face Hub: without state or constructor, they lend their `forward` to other modules.

`kernels.kernelize` puts them in place of the `forward` of a module that carries the options as attributes. In the Hub
kernel that `lmp_triton.integrations.hub` writes they are `layers.LossMaxPooling` and `layers.PoolLosses`.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..api import loss_max_pooling, pool_losses


class LossMaxPoolingForward(nn.Module):
    """`lmp_triton.loss_max_pooling` with the options that the adopting module has."""

    can_torch_compile: bool = True

    p: float
    ratio: float
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    scope: str
    reduction: str

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (N, C, *spatial) and target (N, *spatial)."""
        names = ("p", "ratio", "weight", "ignore_index", "label_smoothing", "scope", "reduction")
        options = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return loss_max_pooling(logits, target, **options)  # type: ignore[return-value]  # without return_stats


class PoolLossesForward(nn.Module):
    """`lmp_triton.pool_losses` with the options that the adopting module has."""

    can_torch_compile: bool = True

    p: float
    ratio: float
    scope: str
    reduction: str

    def forward(self, losses: Tensor) -> Tensor:
        """The pooled loss of losses (N, *spatial)."""
        options = {name: getattr(self, name) for name in ("p", "ratio", "scope", "reduction") if hasattr(self, name)}
        return pool_losses(losses, **options)  # type: ignore[return-value]
