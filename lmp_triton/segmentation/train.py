"""`lmp-triton train`: PyTorch Lightning's command line over `SegmentationTask` and `SegmentationData`.

    lmp-triton train --config cityscapes --data.train.root DATA --data.val.root DATA
    lmp-triton train --config digits --trainer.max_steps 100
    lmp-triton train --config mine.yaml --ckpt_path last

A configuration is a file, or the name of one of the recipes that come with the package. Later options override it. With
`--ckpt_path last` a run goes on from its newest checkpoint, or starts if it has none.
"""

from __future__ import annotations

import argparse
import sys
import warnings
import zipfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jsonargparse  # noqa: F401  # what Lightning's command line stands on: if it is missing, say so at once
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .data import SegmentationData
from .datasets import DatasetError
from .task import SegmentationTask
from .tiling import TooSmall

__all__ = ["add_arguments", "main", "recipes", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take all arguments as they are, --help among them: Lightning's own parser reads them."""
    parser.prefix_chars = "\0"
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(options: argparse.Namespace) -> int:
    """See `main`."""
    return main(options.arguments)


def recipes() -> dict[str, Path]:
    """The recipes of the package by their names."""
    folder = Path(str(resources.files(__package__))) / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def main(arguments: Sequence[str]) -> int:
    """Train; 0, or 2 with the reason on standard error if an option or the data are wrong."""
    try:
        with warnings.catch_warnings():
            # Recipes keep their checkpoints in one folder, which a resumed run finds full.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
            _CommandLine(
                SegmentationTask,
                SegmentationData,
                args=["fit", *_named(arguments)],
                save_config_kwargs={"overwrite": True},
                parser_kwargs={"prog": "lmp-triton train"},
            )
    except (DatasetError, TooSmall, _UsageError) as error:
        print(f"lmp-triton train: {error}", file=sys.stderr)
        return 2
    return 0


class _CommandLine(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in ("classes", "ignore_index"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (MisconfigurationException, OSError, TypeError, ValueError) as error:
            raise _UsageError(str(error)) from error

    def parse_arguments(self, *arguments: Any, **options: Any) -> None:
        """Look at the checkpoint before anything is built."""
        super().parse_arguments(*arguments, **options)
        path = str(self.config["fit"]["ckpt_path"] or "last")
        if path in ("best", "last", "hpc") or ":" in path:
            return
        if not Path(path).exists():
            raise _UsageError(f"--ckpt_path {path}: no such file")
        if Path(path).is_file() and not zipfile.is_zipfile(path):
            raise _UsageError(f"--ckpt_path {path}: not a checkpoint, or not all of one")


class _UsageError(Exception):
    """An option is wrong."""


def _named(arguments: Sequence[str]) -> list[str]:
    """The arguments with the names of recipes replaced by their files."""
    out: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if out and out[-1] in ("--config", "-c"):
            out.append(_configuration(argument))
        elif equals and option in ("--config", "-c"):
            out.append(f"{option}={_configuration(value)}")
        else:
            out.append(argument)
    return out


def _configuration(name: str) -> str:
    if Path(name).is_file():
        return name
    if name not in recipes():
        raise _UsageError(f"--config must be a file or one of {', '.join(recipes())}; there is no {name}")
    return str(recipes()[name])
