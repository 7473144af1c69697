"""The command line: `lmp-triton demo`, `lmp-triton bench`, `lmp-triton info`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

from . import __version__, demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 with the reason on standard error."""
    parser = argparse.ArgumentParser(prog="lmp-triton", description="Loss max-pooling at the price of cross-entropy.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    help_demo = "train with cross-entropy and with loss max-pooling side by side, on digits or on a land-cover scene"
    command = commands.add_parser("demo", help=help_demo, description=help_demo)
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)
    help_bench = "time the loss and its peers on this machine, report the results, compare two of them"
    command = commands.add_parser("bench", help=help_bench, description=help_bench)
    try:
        from .perf import bench
    except ImportError as error:  # an optional extra
        reason = f"lmp-triton bench needs pandas and matplotlib ({error}): pip install 'lmp-triton[perf]'"
        command.add_argument("rest", nargs=argparse.REMAINDER)
        command.set_defaults(run=lambda options: print(reason, file=sys.stderr) or 2)
    else:
        bench.add_arguments(command)
    help_info = "versions, devices, and which backend serves them"
    command = commands.add_parser("info", help=help_info, description=help_info)
    command.set_defaults(run=info)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def info(options: argparse.Namespace) -> int:
    """Print what would serve a call, and why not Triton where it would not."""
    import torch

    from . import dispatch, settings

    print(f"lmp-triton {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for package in ("torch", "triton", "numpy"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        logits = torch.empty(1, 19, 16, device=device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        reason = dispatch.obstacle(logits)
        print(f"{device} ({name}): {dispatch.choose(logits)}" + (f"; not triton: {reason}" if reason else ""))
    if settings.has_triton():
        from .kernels import configs

        for device in devices:
            table = configs.table(device)
            print(f"{device}: what the kernels use there (nothing was tuned on a GPU yet):")
            for classes in (2, 19, 32, 150, 1024):
                print(f"  {classes} classes: {configs.pixel_config(table, classes)}")
            for name in ("rows", "stream", "select", "sort"):
                print(f"  {name}: {getattr(table, name)}")
        asked = settings.cooperative()
        print(f"cooperative launches ({settings.COOPERATIVE}): {asked or 'none, the default'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
