"""What a call depends on besides its arguments: the environment, the limits of the kernels, whether a graph is made."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager")
SOLVERS = ("auto", "select", "sort")

BACKEND = "LMP_TRITON_BACKEND"
"""Environment variable that stands in for `backend="auto"`."""

CHECK = "LMP_TRITON_CHECK"
"""Environment variable: 1 checks every target, also on a GPU, as check_targets=True does."""

COOPERATIVE = "LMP_TRITON_COOPERATIVE"
"""Environment variable: which part of the Triton backend is one cooperative launch, whose programs wait for each other.

"solve": the threshold search; "forward": the losses, too. Unset or empty: none, the default as long as no GPU run in
perf/results/ shows them right and not hanging. They fall back to separate launches where not all programs fit on the
device at once, and change no result. Read at each call; a CUDA graph keeps what it was captured with."""

WAYS = ("", "solve", "forward")
"""What `COOPERATIVE` may be."""

FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MAX_CLASSES = 1024
"""Classes that the kernels take: with more, the table of `kernels.configs` has no entry."""

MAX_LEVELS = 3
"""Spatial dimensions that the kernels walk, after those that lie behind each other in memory count as one."""

MAX_PIXELS = 2**31 - 2**16
"""Losses of a segment that 32-bit offsets inside it reach."""

NOT_INTERPRETING = "the tensors are on the CPU, and TRITON_INTERPRET=1 was not set when Triton was imported"


def backend() -> str:
    """What `BACKEND` asks for; an empty variable is an unset one.

    Raises:
        ValueError: no such backend.
    """
    return _variable(BACKEND, BACKENDS, "auto")


def cooperative() -> str:
    """What `COOPERATIVE` asks for: "", "solve" or "forward".

    Raises:
        ValueError: something else.
    """
    return _variable(COOPERATIVE, WAYS, "")


def check_targets() -> bool:
    """Whether `CHECK` asks for every target to be checked."""
    return os.environ.get(CHECK) == "1"


def _variable(name: str, values: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name) or default
    if value not in values:
        raise ValueError(f"the environment variable {name} must be one of {values}, got {value!r}")
    return value


def _kernels_found() -> bool:
    """Whether the kernels can be imported.

    A checkout in the current folder hides an installed package, and has beside it what an installation has inside:
    there the folder of the checkout is made a part of the package.
    """
    if importlib.util.find_spec(f"{__package__}.kernels") is not None:
        return True
    checkout = Path(__file__).parents[1]
    if not (checkout / "pyproject.toml").exists() or not (checkout / "kernels").exists():
        return False
    sys.modules[__package__].__path__.append(str(checkout))
    return True


# Here, since Dynamo can't trace the search.
_TRITON = importlib.util.find_spec("triton") is not None
_KERNELS = _kernels_found()


def has_triton() -> bool:
    """Whether Triton can be imported."""
    return _TRITON


def kernels_missing() -> str | None:
    """Why there are no kernels to launch, or None."""
    if not has_triton():
        return "Triton is not installed (it exists for Linux only)"
    if not _KERNELS:
        return f"{__package__} was imported from {Path(__file__).parent}, which has no kernels: a part of a checkout?"
    return None


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU: TRITON_INTERPRET=1 was set when it was imported.

    That, and not what the variable says now, made its own functions what they are; `lmp_triton.kernels` refuses to be
    imported where the two differ.
    """
    import triton
    import triton.language as tl

    return not isinstance(tl.sum, triton.JITFunction)


_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def compiling() -> bool:
    """Whether Dynamo goes through this code: then a size may be a symbol, and what it can't trace must not be asked."""
    return torch.compiler.is_compiling()


def exporting() -> bool:
    """Whether the graph is to run where this package and Triton are not installed."""
    return torch.compiler.is_exporting()


def traced() -> bool:
    """Whether a graph is being made of what happens: values and the memory behind tensors are out of reach.

    By torch.compile or torch.export, or by what they are made of: a FakeTensorMode, make_fx. (For the latter two there
    is no public question.)
    """
    if compiling():
        return True
    mode = torch._C._get_dispatch_mode  # not any(): asked a dozen times a call
    return mode(_FAKE) is not None or mode(_PROXY) is not None


def on_host(x: Tensor) -> bool:
    """Whether reading a value of x costs nothing: it is on the CPU, and nobody traces."""
    return x.device.type == "cpu" and not traced()
