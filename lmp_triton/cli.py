"""The command line, `lmp-triton COMMAND`. A command's module is imported when it is named, and only then."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from . import __version__


class Command(NamedTuple):
    """A module with `add_arguments(parser)` and `run(options) -> int`, and the extra that brings what it imports."""

    module: str
    extra: str
    help: str


COMMANDS = {
    "demo": Command(
        "lmp_triton.demo",
        "demo",
        "train with cross-entropy and with loss max-pooling side by side, on digits or on a land-cover scene",
    ),
    "train": Command(
        "lmp_triton.segmentation.train",
        "segmentation",
        "train a segmentation network by a recipe or a configuration of yours (PyTorch Lightning)",
    ),
    "bench": Command(
        "lmp_triton.perf.bench",
        "perf",
        "time the loss and its peers on this machine, report the results, compare two of them",
    ),
    "info": Command("lmp_triton.info", "", "versions, devices, and which backend serves them"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 with the reason on standard error."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="lmp-triton", description="Loss max-pooling (Rota Bulò et al., CVPR 2017).")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    try:
        for name, (module, _, help_text) in COMMANDS.items():
            command = commands.add_parser(name, help=help_text, description=help_text)
            if name in arguments[:1]:
                code = importlib.import_module(module)
                command.set_defaults(run=code.run)
                code.add_arguments(command)
        options = parser.parse_args(arguments)
        return int(options.run(options))
    except ImportError as error:
        name = arguments[0]
        missing = (error.name or "").split(".")[0]
        if missing in ("", "lmp_triton", "torch", "numpy") or not COMMANDS[name].extra:
            raise
        extra = COMMANDS[name].extra
        print(f"lmp-triton {name} needs {missing}: pip install 'lmp-triton[{extra}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
