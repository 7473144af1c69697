"""`lmp-triton demo`: cross-entropy and loss max-pooling side by side, on composed digits or on a land-cover scene.

Importing this needs nothing of the `demo` extra, so that the command line works without it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from .requirements import MissingRequirement, require_modules

__all__ = ["add_arguments", "run"]


class Defaults(NamedTuple):
    """What a scene takes where the command line says nothing."""

    steps: int
    ratio: float


SCENES = {"digits": Defaults(2000, 0.05), "land-cover": Defaults(1000, 0.25)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the demo to a parser."""
    steps, ratios = (", ".join(f"{getattr(d, n)} on {s}" for s, d in SCENES.items()) for n in ("steps", "ratio"))
    parser.add_argument(
        "--scene",
        choices=SCENES,
        default="digits",
        help="handwritten digits on noisy canvases, some of them rare, or the land cover of the Earth (%(default)s)",
    )
    parser.add_argument("--steps", type=_count, help=f"training steps with each loss ({steps})")
    parser.add_argument(
        "--quick", dest="steps", action="store_const", const=40, help="the same as --steps 40: only shows that it runs"
    )
    parser.add_argument("--seeds", type=_count, default=1, metavar="N", help="how many seeds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="the first of them (%(default)s)")
    parser.add_argument("--p", type=float, default=1.3, help="p of loss max-pooling (%(default)s)")
    parser.add_argument("--ratio", type=float, help=f"ratio of loss max-pooling ({ratios})")
    parser.add_argument("--output", type=Path, default=Path("lmp-demo.png"), help="the picture (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0, or with the reason on standard error 2 if something is not installed or an option is wrong, and
    1 if the picture could not be written, when all else is printed."""
    defaults = SCENES[args.scene]
    try:
        require_modules("matplotlib", "PIL", "rich", "sklearn", "torchmetrics")
        from lmp_triton import LossMaxPooling

        from .comparison import check_output, compare
        from .scene import Scene

        ratio = defaults.ratio if args.ratio is None else args.ratio
        pooling = LossMaxPooling(p=args.p, ratio=ratio, ignore_index=255)
        check_output(args.output)
        scene: Scene
        if args.scene == "digits":
            from .digits import Digits

            scene = Digits()
        else:
            from .land_cover import LandCover

            scene = LandCover()
    except (MissingRequirement, ValueError) as error:
        print(f"lmp-triton demo: {error}", file=sys.stderr)
        return 2
    seeds = range(args.seed, args.seed + args.seeds)
    try:
        compare(scene, pooling, steps=args.steps or defaults.steps, seeds=seeds, output=args.output)
    except OSError as error:
        print(f"lmp-triton demo: {error}", file=sys.stderr)
        return 1
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
