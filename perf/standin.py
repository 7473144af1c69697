"""A GPU that is not there: Triton compiles for it and launches on it, and nothing runs.

    with StandIn(90) as gpu:
        lmp_triton.loss_max_pooling(logits, target, backend="triton").backward()
    gpu.launches

Tensors are on the CPU and hold whatever was in memory. What can be seen: what is compiled and when, the launches with
their grids, how long the host takes up to the driver's call. In a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import itertools
import types
from typing import Any, NamedTuple
from unittest import mock

from lmp_triton.kernels import configs, launcher
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lmp_triton import checks, settings

from .compiled import resources

NUMBERS = itertools.count()


class Launch(NamedTuple):
    """One launch."""

    name: str
    programs: int
    cooperative: bool
    arguments: tuple[Any, ...]
    """Groups of tensors and numbers, then constants, as the kernel declares them."""
    compiled: Any
    """What Triton made of it."""


class StandIn(contextlib.ExitStack):
    """Stands in for the driver of one GPU while the context lasts.

    Args:
        architecture: compute capability, 10 · major + minor; or the name of an AMD architecture.
        multiprocessors: 132 as an H100 has.
        refuse: cooperative launches fail, as too large ones do.
        remember: keep the launches, and so every tensor that one was given; otherwise memory is free when it is.
    """

    def __init__(
        self,
        architecture: int | str = 90,
        multiprocessors: int = 132,
        refuse: bool = False,
        remember: bool = True,
    ) -> None:
        super().__init__()
        self.number = next(NUMBERS)
        self.launches: list[Launch] = []
        self.compiled: list[str] = []
        nvidia = isinstance(architecture, int)
        self.target = GPUTarget("cuda", architecture, 32) if nvidia else GPUTarget("hip", architecture, 64)
        self.table = configs.table_for(architecture if isinstance(architecture, int) else 0)
        self.multiprocessors = multiprocessors
        self.refuse = refuse
        self.remember = remember
        self.utils = types.SimpleNamespace(
            load_binary=self._load, unload_module=lambda module: None, get_device_properties=lambda device: self._limits
        )
        self._limits = {"max_shared_mem": 232_448}

    def __enter__(self) -> StandIn:
        super().__enter__()
        self.callback(driver.set_active, driver._active)  # type: ignore[attr-defined]
        driver.set_active(self)  # type: ignore[arg-type]
        self.enter_context(mock.patch.object(launcher, "_compiled", {}))
        self.enter_context(mock.patch.object(launcher, "multiprocessors", lambda device: self.multiprocessors))
        self.enter_context(mock.patch.object(configs, "multiprocessors", lambda device: self.multiprocessors))
        self.enter_context(configs.using(self.table))
        self.enter_context(mock.patch.object(settings, "interpreting", lambda: True))
        self.enter_context(mock.patch.object(checks, "on_host", lambda tensor: False))  # nothing was computed
        return self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What calls the driver for one compiled kernel."""

        def call(programs: int, *rest: Any) -> None:
            if self.refuse and metadata.launch_cooperative_grid:
                raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
            compiled = next(built for built in launcher._compiled.values() if built.metadata is metadata)
            arguments = rest[-len(source.fn.arg_names) :]
            if self.remember:
                cooperative = metadata.launch_cooperative_grid
                self.launches.append(Launch(metadata.name, programs, cooperative, arguments, compiled))

        return call

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.compiled.append(name)
        return object(), object(), resources(binary)["REG"] if self.target.backend == "cuda" else 0, 0, 1024

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return self.target

    def get_current_device(self) -> int:
        """A number of its own, by which Triton keeps what it compiled apart."""
        return self.number

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0
