"""Which backend serves a call: "auto" may fall back, a backend asked for by name serves or says why it can't."""

from __future__ import annotations

import importlib.util
import math
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import eager

BACKENDS = ("auto", "triton", "eager")
SOLVERS = ("auto", "select", "sort")
VARIABLE = "LMP_TRITON_BACKEND"
"""Environment variable that stands in for `backend="auto"`."""

COOPERATIVE = ("", "solve", "forward")
COOPERATIVE_VARIABLE = "LMP_TRITON_COOPERATIVE"
"""Environment variable: which part of the Triton backend is one cooperative launch, whose programs wait for each other.

"solve": the threshold search; "forward": the losses, too. Unset or empty: none, the default as long as no GPU run in
perf/results/ shows them right and not hanging. They fall back to separate launches where not all programs fit on the
device at once, and change no result. Read at each call; a CUDA graph keeps what it was captured with."""

FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_CLASSES = 1024
MAX_LEVELS = 3
MAX_PIXELS = 2**31 - 2**16
"""Losses of a segment that 32-bit offsets inside it reach."""

NOT_INTERPRETING = "the tensors are on the CPU and TRITON_INTERPRET=1 is not set"


def choose(
    values: Tensor, backend: str = "auto", solver: str = "auto", segments: int | None = None, group: Any = None
) -> str:
    """The backend that will serve a call on `values`: "triton" or "eager".

    Args:
        values: the logits (N, C, *spatial) or the losses (N, L).
        segments: N, or 1 if all rows are pooled together; None: N.
        backend: "auto" takes Triton on a CUDA GPU where it can serve, else eager, and eager under `torch.export`.
            `LMP_TRITON_BACKEND` replaces "auto"; a name in the call wins over it.
        solver: "auto", or one of the kernels' solvers, "select" and "sort".
        group: the process group to pool over, or None. A rank may bring no pixel at all: that is "eager".

    Raises:
        ValueError: an unknown name, or the backend asked for can't serve the call; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if backend == "auto":
        backend = os.environ.get(VARIABLE, "auto")
        if backend not in BACKENDS:
            raise ValueError(f"the environment variable {VARIABLE} must be one of {BACKENDS}, got {backend!r}")
    if backend == "triton":
        reason = obstacle(values, segments, group)
        if reason:
            raise ValueError(f'backend="triton" cannot serve this call: {reason}')
    elif backend == "auto":
        # What is exported is to run where this package and Triton are not installed.
        fit = values.device.type == "cuda" and not torch.compiler.is_exporting()
        backend = "triton" if fit and not obstacle(values, segments, group) else "eager"
        # Nobody has run the kernels on AMD yet: there they are used when asked for by name.
        if torch.version.hip:
            backend = "eager"
    if backend == "eager" and solver != "auto":
        raise ValueError(f'solver={solver!r} chooses among kernels; the eager backend takes solver="auto" only')
    if group is not None:
        if solver != "auto":
            raise ValueError(f'solver={solver!r} chooses among kernels; with a group it must be "auto"')
        if not values.numel():
            return "eager"  # there is nothing to launch a kernel on, but the other ranks wait in the collectives
    return backend


def obstacle(values: Tensor, segments: int | None = None, group: Any = None) -> str | None:
    """Why the kernels can't take `values`, or None if they can."""
    if not has_triton():
        return "Triton is not installed (it exists for Linux only)"
    if values.dtype not in FUSED_DTYPES:
        return f"it takes float16, bfloat16 and float32, not {values.dtype}"
    if values.ndim > 2:
        if values.shape[1] > MAX_CLASSES:
            return f"it takes up to {MAX_CLASSES} classes, not {values.shape[1]}"
        if values.ndim - 2 > MAX_LEVELS and _levels(values) > MAX_LEVELS:
            return (
                f"it takes up to {MAX_LEVELS} spatial dimensions that don't lie behind each other in memory, not "
                f"{_levels(values)}: logits.contiguous() makes them one"
            )
    length = math.prod(values.shape[2:] if values.ndim > 2 else values.shape[1:])
    length *= values.shape[0] if segments == 1 else 1
    if length > MAX_PIXELS:
        return f"it takes up to {MAX_PIXELS} losses a segment, not {length}"
    if group is not None and torch.compiler.is_compiling():
        return "with a group, compiled code takes the eager backend: the collectives lie between two kernels"
    # Dynamo can't trace into Triton's settings: in traced code the operators ask.
    if values.device.type == "cpu" and not torch.compiler.is_compiling() and not interpreting():
        return NOT_INTERPRETING
    if values.device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA devices, not on {values.device.type}"
    if (
        values.device.type == "cuda"
        and not torch.version.hip
        and torch.cuda.get_device_capability(values.device) < (8, 0)
    ):
        return "it takes GPUs of compute capability 8.0 and newer"
    return None


def cooperative() -> str:
    """What `COOPERATIVE_VARIABLE` asks for: "", "solve" or "forward".

    Raises:
        ValueError: something else.
    """
    asked = os.environ.get(COOPERATIVE_VARIABLE, "")
    if asked not in COOPERATIVE:
        raise ValueError(f"the environment variable {COOPERATIVE_VARIABLE} must be one of {COOPERATIVE}, got {asked!r}")
    return asked


def _levels(logits: Tensor) -> int:
    from .kernels.layout import layout_of

    return len(layout_of(logits).sizes)


_FOUND = importlib.util.find_spec("triton") is not None  # here, since Dynamo can't trace the search


def has_triton() -> bool:
    """Whether Triton can be imported."""
    return _FOUND


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1, set before Triton was imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def module(name: str) -> ModuleType:
    """The module of a backend that `choose` named. Triton is imported here, on first use.

    Traced code gets the kernels as operators (and the two differentiable functions from there, not from `autograd`).
    """
    if name == "eager":
        return eager
    if torch.compiler.is_compiling():
        from . import operators

        return operators
    from . import fused

    return fused
