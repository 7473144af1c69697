"""Loss max-pooling (Rota Bulò, Neuhold, Kontschieder, CVPR 2017) for PyTorch, fused into a few Triton launches.

    import lmp_triton

    loss = lmp_triton.loss_max_pooling(logits, target, p=1.3, ratio=0.25, ignore_index=255)

At the price of cross-entropy is the goal, which no GPU has shown yet. Nothing is compiled, read or started at import;
Triton itself is imported on the first call that uses it.
"""

from . import reference
from .api import loss_max_pooling, obstacle, optimal_weights, pool_losses, upsampled_loss_max_pooling
from .modules import LossMaxPooling, UpsampledLossMaxPooling
from .schedules import RatioSchedule, anneal
from .types import PoolingStats

__version__ = "0.1.0"

__all__ = [
    "LossMaxPooling",
    "PoolingStats",
    "RatioSchedule",
    "UpsampledLossMaxPooling",
    "anneal",
    "loss_max_pooling",
    "obstacle",
    "optimal_weights",
    "pool_losses",
    "reference",
    "upsampled_loss_max_pooling",
]
