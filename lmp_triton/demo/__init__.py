"""`lmp-triton demo`: cross-entropy and loss max-pooling side by side on a real scene.

Importing this needs nothing of the `demo` extra, so that the command line works without it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .requirements import MissingRequirement, require_modules

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo to a parser."""
    parser.add_argument("--steps", type=_count, default=1000, help="training steps with each loss (%(default)s)")
    parser.add_argument(
        "--quick", dest="steps", action="store_const", const=40, help="the same as --steps 40: only shows that it runs"
    )
    parser.add_argument("--seeds", type=_count, default=1, metavar="N", help="how many seeds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="the first of them (%(default)s)")
    parser.add_argument("--p", type=float, default=1.3, help="p of loss max-pooling (%(default)s)")
    parser.add_argument("--ratio", type=float, default=0.25, help="ratio of loss max-pooling (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("lmp-demo.png"), help="the picture (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0, or 2 with the reason on standard error if something is not installed or an option is wrong."""
    try:
        require_modules("matplotlib", "PIL", "rich", "torchmetrics")
        from lmp_triton import LossMaxPooling

        from .comparison import compare
        from .scene import IGNORE_INDEX, load_scene

        pooling = LossMaxPooling(p=args.p, ratio=args.ratio, ignore_index=IGNORE_INDEX)
        scene = load_scene()
    except (MissingRequirement, ValueError) as error:
        print(f"lmp-triton demo: {error}", file=sys.stderr)
        return 2
    seeds = range(args.seed, args.seed + args.seeds)
    compare(scene, pooling, steps=args.steps, seeds=seeds, output=args.output)
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
