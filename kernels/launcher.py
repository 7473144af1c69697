"""How kernels are launched: through Triton the first time, by what it compiled from then on.

The arguments of a kernel are groups (NamedTuples) of tensors, None, numbers and groups; its constants come last.
A number, field or argument, is annotated with its type.
"""

import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .configs import multiprocessors
from .occupancy import LIMITS, programs_a_multiprocessor

_compiled: dict[tuple[Any, ...], Any] = {}
"""What Triton compiled so far; nothing is kept in the interpreter."""


TYPICAL = {tl.int32: 3, tl.int64: 2**40 + 1, tl.float32: 0.5}
"""The types of numbers, and a number of each that Triton compiles for as it does for any other. For a 1 and for what
16 divides it would compile anew, in a group also where `do_not_specialize` says not to."""


DEPENDENT = tl.constexpr(False)
"""Programmatic dependent launch, for compute capability 9.0 and newer: a launch that is not cooperative starts while
the one before it ends, and waits before it touches memory. Off until a GPU run shows it right; to be set before
anything is compiled (perf/static.py --dependent)."""


class TooLarge(RuntimeError):
    """The programs of a cooperative launch can't be on the device all at once. Nothing was launched."""


@triton.jit
def wait_for_launch_before():
    """The first thing a kernel does: with DEPENDENT what the launch before it wrote is not there yet."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch(
    kernel: Any,
    grid: int,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    cooperative: bool = False,
    registers: int | None = None,
) -> None:
    """Launch `grid` programs of `kernel` on the current device, where its tensors are.

    Triton looks at every argument of every launch, to find what it compiled for the like: about 20 µs. What is compiled
    here depends on the constants, warps, registers and the way to launch, the types of the tensors and whether they are
    aligned to 16 bytes, and on nothing else: that is the key. A launch then goes through
    `CompiledKernel.__getitem__`, which is public and runs the hooks of profilers; settings of Triton that change how it
    compiles count for what is compiled after them.

    Args:
        arguments, constants: of the kernel, in this order.
        cooperative: all programs are on the device at once, or the launch fails.
        registers: a thread may have on an NVIDIA GPU. Without, the compiler spills some where one more program fits on
            a multiprocessor then.

    Raises:
        TooLarge: they don't fit on it.
    """
    compiled = _ready(kernel, arguments, constants, warps, cooperative, registers)
    if compiled is None:
        kernel[grid,](*arguments, *constants)  # the interpreter
        return
    try:
        compiled[grid, 1, 1](*arguments, *constants)
    except RuntimeError as error:
        if cooperative and "cooperative" in str(error):
            raise TooLarge(str(error)) from error
        raise


def resident_programs(
    kernel: Any, arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int, device: torch.device
) -> int | None:
    """How many programs of a cooperative launch are on the device at once; None in the interpreter.

    From the registers and the shared memory of the compiled kernel. On a device whose limits are not known: 0.
    """
    compiled = _ready(kernel, arguments, constants, warps, True)
    if compiled is None:
        return None
    target = compiled.metadata.target
    limits = LIMITS.get(target.arch) if target.backend == "cuda" else None
    if limits is None:
        return 0
    compiled[1, 1, 1]  # loads it, which is when its registers are known
    room = programs_a_multiprocessor(limits, compiled.n_regs, compiled.metadata.shared, warps)
    return room * multiprocessors(device)


def _ready(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    cooperative: bool,
    registers: int | None = None,
) -> Any | None:
    """What was compiled for the like of these arguments, compiled now if need be; None in the interpreter."""
    key = [kernel, constants, warps, cooperative, registers]
    _describe(arguments, key)
    compiled = _compiled.get(tuple(key))
    if compiled is None and isinstance(kernel, triton.JITFunction):
        compiled = _compile(kernel, arguments, constants, warps, cooperative, registers)
        compiled = _compiled.setdefault(tuple(key), compiled)  # another thread may have been first
    return compiled


def _describe(arguments: tuple[Any, ...], key: list[Any]) -> None:
    """What a compiled kernel depends on: of tensors their type, of numbers nothing."""
    for x in arguments:
        if isinstance(x, Tensor):
            key += (x.dtype, x.get_device(), x.data_ptr() & 15 == 0)
        elif isinstance(x, tuple):
            _describe(x, key)
        elif x is None:
            key.append(None)


def _compile(
    kernel: Any,
    arguments: tuple[Any, ...],
    constants: tuple[Any, ...],
    warps: int,
    cooperative: bool,
    registers: int | None,
) -> Any:
    kinds = [parameter.annotation for parameter in inspect.signature(kernel.fn).parameters.values()]
    assert kinds[len(arguments) :] == [tl.constexpr] * len(constants), kernel
    typical = [_typical(x, kind) for x, kind in zip(arguments, kinds[: len(arguments)], strict=True)]
    options = {"launch_cooperative_grid": True} if cooperative else {"launch_pdl": True} if DEPENDENT.value else {}
    nvidia = driver.active.get_current_target().backend == "cuda"
    limit = {"maxnreg": registers} if registers and nvidia else {}
    return kernel.warmup(*typical, *constants, grid=(1,), num_warps=warps, enable_fp_fusion=True, **options, **limit)


def _typical(x: Any, kind: Any) -> Any:
    """An argument with the numbers of `TYPICAL` in place of its own; kind: its annotation."""
    if isinstance(x, tuple):
        kinds = inspect.get_annotations(kind)
        assert tuple(kinds) == x._fields, (x, kind)  # type: ignore[attr-defined]
        return kind(*(_typical(field, kinds[name]) for name, field in zip(kinds, x, strict=True)))
    assert isinstance(x, int | float) == (kind in TYPICAL), (x, kind)
    return TYPICAL.get(kind, x)
