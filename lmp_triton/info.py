"""`lmp-triton info`: what would serve a call on this machine, and why not Triton where it would not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform

import torch

from . import __version__, dispatch, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(options: argparse.Namespace) -> int:
    """Print it. Whatever a call would raise is printed, too: this is where one looks for the reason."""
    print(f"lmp-triton {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "numpy"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    for variable in (settings.BACKEND, settings.COOPERATIVE, settings.CHECK, "TRITON_INTERPRET"):
        if os.environ.get(variable):
            print(f"{variable}={os.environ[variable]}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        print(f"{device} ({name}): {_served(torch.empty(1, 19, 16, device=device))}")
    if settings.kernels_missing() is None:
        _configurations(devices)
    return 0


def _served(logits: torch.Tensor) -> str:
    reason = dispatch.obstacle(logits)
    try:
        backend = dispatch.choose(logits)
    except ValueError as error:
        return f"none: {error}"
    return backend + (f"; not triton: {reason}" if reason else "")


def _configurations(devices: list[torch.device]) -> None:
    from .kernels import configs

    for device in devices:
        table = configs.table(device)
        print(f"{device}: what the kernels use there (nothing was tuned on a GPU yet):")
        for classes in (2, 19, 32, 150, settings.MAX_CLASSES):
            print(f"  {classes} classes: {configs.pixel_config(table, classes)}")
        for name in ("rows", "stream", "select", "sort"):
            print(f"  {name}: {getattr(table, name)}")
    try:
        print(f"cooperative launches ({settings.COOPERATIVE}): {settings.cooperative() or 'none, the default'}")
    except ValueError as error:
        print(f"cooperative launches: {error}")
