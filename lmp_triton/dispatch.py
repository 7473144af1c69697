"""Which backend serves a call: "auto" may fall back, a backend asked for by name serves or says why it can't."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import eager, operators, settings
from .settings import BACKENDS, SOLVERS
from .types import Backend


def choose(
    values: Tensor,
    backend: str = "auto",
    solver: str = "auto",
    scope: str = "image",
    group: Any = None,
    target: Tensor | None = None,
) -> str:
    """The backend that will serve a call on `values`: "triton" or "eager".

    Args:
        values: the logits (N, C, *spatial) or the losses (N, L).
        scope: "image", or "batch" if all rows are pooled together.
        backend: "auto" takes Triton on a CUDA GPU where it can serve, else eager, and eager under `torch.export`.
            `LMP_TRITON_BACKEND` replaces "auto"; a name in the call wins over it.
        solver: "auto", or one of the kernels' solvers, "select" and "sort".
        group: the process group to pool over, or None. A rank may bring no pixel at all: that is "eager".
        target: (N, H, W), if the logits are to be upsampled to its size.

    Raises:
        ValueError: an unknown name, or the backend asked for can't serve the call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if backend == "auto":
        backend = settings.backend()
    if backend == "triton":
        reason = obstacle(values, scope, target)
        if reason:
            raise ValueError(f'backend="triton" cannot serve this call: {reason}')
    elif backend == "auto":
        fit = values.device.type == "cuda" and not settings.exporting()
        backend = "triton" if fit and not obstacle(values, scope, target) else "eager"
        # Nobody has run the kernels on AMD yet: there they are used when asked for by name.
        if torch.version.hip:
            backend = "eager"
    if backend == "eager" and solver != "auto":
        raise ValueError(f'solver={solver!r} chooses among kernels; the eager backend takes solver="auto" only')
    if group is not None:
        if solver != "auto":
            raise ValueError(f'solver={solver!r} chooses among kernels; with a group it must be "auto"')
        if not (values if target is None else target).numel():
            return "eager"  # there is nothing to launch a kernel on, but the other ranks wait in the collectives
    return backend


def obstacle(values: Tensor, scope: str = "image", target: Tensor | None = None) -> str | None:
    """Why the kernels can't take `values`, or None if they can; target: as in `choose`."""
    if settings.kernels_missing():
        return settings.kernels_missing()
    if values.dtype not in settings.FUSED_DTYPES:
        return f"it takes float16, bfloat16 and float32, not {values.dtype}"
    if values.ndim > 2:
        if values.shape[1] > settings.MAX_CLASSES:
            return f"it takes up to {settings.MAX_CLASSES} classes, not {values.shape[1]}"
        if values.ndim - 2 > settings.MAX_LEVELS and _levels(values) > settings.MAX_LEVELS:
            return (
                f"it takes up to {settings.MAX_LEVELS} spatial dimensions that don't lie behind each other in memory, "
                f"not {_levels(values)}: logits.contiguous() makes them one"
            )
    if target is not None:
        reached = _reach(values, target)
        if reached >= 1 << 31:
            return f"with upsampling it takes up to 2^31 sums for the small gradient of an image, not {reached}"
        values = target
    length = math.prod(values.shape[2:] if values.ndim > 2 and target is None else values.shape[1:])
    length *= values.shape[0] if scope == "batch" else 1
    if length > settings.MAX_PIXELS:
        return f"it takes up to {settings.MAX_PIXELS} losses a segment, not {length}"
    # Dynamo can't trace into Triton's settings: in traced code the operators ask.
    if settings.on_host(values) and not settings.interpreting():
        return settings.NOT_INTERPRETING
    if values.device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA devices, not on {values.device.type}"
    if (
        values.device.type == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(values.device) < (8, 0)
    ):
        return "it takes GPUs of compute capability 8.0 and newer"
    return None


def _reach(logits: Tensor, target: Tensor) -> int:
    """A bound for the numbers that the gradient of upsampled logits is added up from: 32-bit offsets reach them."""
    _, classes, height, width = logits.shape
    longest_cell = -(-target.shape[2] // width)  # of a bilinear.Axis, whose property torch 2.10 does not trace
    spans = -(-longest_cell // 8) + 1
    return 4 * classes * (height + 1) * (width + 1) * spans


def _levels(logits: Tensor) -> int:
    from .kernels.layout import layout_of

    return len(layout_of(logits).sizes)


def stages(name: str) -> Backend:
    """The backend that `choose` named; where a graph is made, the kernels as operators.

    Triton is imported here, on first use.
    """
    if name == "eager":
        return eager
    if settings.traced():
        return operators
    from . import fused

    return fused
