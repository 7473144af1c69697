"""How kernels are launched: through Triton the first time, by what it compiled from then on."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .configs import multiprocessors
from .occupancy import LIMITS, programs_a_multiprocessor

_compiled: dict[tuple[Any, ...], Any] = {}
"""What Triton compiled so far; nothing is kept in the interpreter."""


TYPES = {tl.int32: "i32", tl.int64: "i64", tl.float32: "fp32"}
"""What numbers among the arguments of a kernel may be annotated with, and what Triton calls it."""


class TooLarge(RuntimeError):
    """The programs of a cooperative launch can't be on the device all at once. Nothing was launched."""


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a kernel whose numbers change from call to call and never compile it anew.

    Its arguments are tensors (or None), numbers, each annotated with its type, and constants, in this order.
    """
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[x.name for x in parameters if x.annotation in TYPES])


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
    warps: int,
    cooperative: bool = False,
) -> None:
    """Launch `kernel` on the current device, where its tensors are.

    Triton looks at every argument of every launch, to find what it compiled for the like: about 20 µs. A kernel made by
    `kernel` depends on its constants, the types of its tensors and whether they are aligned to 16 bytes, and on nothing
    else: that is the key here. A launch then goes through `CompiledKernel.__getitem__`, which is public and runs the
    hooks of profilers; settings of Triton that change how it compiles count for what is compiled after them.

    Args:
        programs: the size of the grid.
        tensors, numbers, constants: the arguments of the kernel, in this order.
        cooperative: all programs are on the device at once, or the launch fails.

    Raises:
        TooLarge: they don't fit on it.
    """
    key = _key(kernel, tensors, constants, warps, cooperative)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compile(key, kernel, tensors, numbers, constants, warps, cooperative)
        if compiled is None:
            kernel[programs,](*tensors, *numbers, **constants)  # the interpreter
            return
    try:
        compiled[programs, 1, 1](*tensors, *numbers, *constants.values())
    except RuntimeError as error:
        if cooperative and "cooperative" in str(error):
            raise TooLarge(str(error)) from error
        raise


def resident_programs(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
    warps: int,
) -> int | None:
    """How many programs of a cooperative launch are on the device at once; None in the interpreter.

    From the registers and the shared memory of the compiled kernel. On a device whose limits are not known: 0.
    """
    key = _key(kernel, tensors, constants, warps, True)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compile(key, kernel, tensors, numbers, constants, warps, True)
        if compiled is None:
            return None
    target = compiled.metadata.target
    limits = LIMITS.get(target.arch) if target.backend == "cuda" else None
    if limits is None:
        return 0
    compiled[1, 1, 1]  # loads it, which is when its registers are known
    room = programs_a_multiprocessor(limits, compiled.n_regs, compiled.metadata.shared, warps)
    assert tensors[0] is not None
    return room * multiprocessors(tensors[0].device)


def _key(
    kernel: Any, tensors: tuple[Tensor | None, ...], constants: dict[str, Any], warps: int, cooperative: bool
) -> tuple[Any, ...]:
    key: list[Any] = [kernel, warps, cooperative]
    for x in tensors:
        if x is None:
            key.append(None)
        else:
            key += (x.dtype, x.get_device(), x.data_ptr() & 15 == 0)
    key += constants.values()
    return tuple(key)


def _compile(
    key: tuple[Any, ...],
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
    warps: int,
    cooperative: bool,
) -> Any:
    """Compile, and check that the key holds all the compiled kernel depends on; None in the interpreter."""
    parameters = list(inspect.signature(kernel.fn).parameters.values())
    kinds = [x.annotation in TYPES for x in parameters]
    names = [x.name for x in parameters]
    count = len(tensors) + len(numbers)
    assert kinds == [False] * len(tensors) + [True] * len(numbers) + [False] * len(constants), (kernel, names)
    assert names[count:] == list(constants), (kernel, names, list(constants))
    if not isinstance(kernel, triton.JITFunction):
        return None
    options = {"launch_cooperative_grid": True} if cooperative else {}
    compiled = kernel.warmup(
        *tensors, *numbers, grid=(1,), **constants, num_warps=warps, enable_fp_fusion=True, **options
    )
    _compiled[key] = compiled
    return compiled
