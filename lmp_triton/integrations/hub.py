"""Write this package as a kernel of the Hugging Face Hub, to be loaded by the `kernels` package:

    python -m lmp_triton.integrations.hub FOLDER

    import kernels
    lmp = kernels.get_local_kernel(Path(FOLDER))
    weights, stats = lmp.optimal_weights(losses, p=1.3)
    loss = lmp.loss_max_pooling(logits, target, ignore_index=255)

FOLDER gets build/torch-cuda and build/torch-cpu, each the modules and kernels of this package with relative imports
only. There is nothing to compile: Triton does that on first use, and on a CPU the eager backend serves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from .. import kernels

VERSION = 1
"""Of the interface, as the Hub counts: one number, raised when callers must change."""

BACKENDS = ("cuda", "cpu")

LEFT_OUT = ("__init__.py", "cli.py", "reference.py")
"""Modules for the command line and the oracle: a kernel may import the standard library, torch and Triton alone."""

INIT = '''"""Loss max-pooling (Rota Bulò, Neuhold, Kontschieder, CVPR 2017), fused into a few Triton launches."""

from . import layers
from .api import loss_max_pooling, obstacle, optimal_weights, pool_losses
from .modules import LossMaxPooling
from .types import PoolingStats

__all__ = [
    "LossMaxPooling",
    "PoolingStats",
    "layers",
    "loss_max_pooling",
    "obstacle",
    "optimal_weights",
    "pool_losses",
]
'''

LAYERS = '''"""The layers, by the names that a mapping of the Hub gives."""

from .integrations.layers import LossMaxPoolingForward as LossMaxPooling
from .integrations.layers import PoolLossesForward as PoolLosses

__all__ = ["LossMaxPooling", "PoolLosses"]
'''


def build(folder: Path) -> list[Path]:
    """Write the build folder below `folder`; returns the variants.

    Raises:
        FileExistsError: there is one already.
    """
    target = folder / "build"
    if target.exists():
        raise FileExistsError(
            f"{target} exists: remove it first, so that nothing of an older build stays in the new one"
        )
    here, device_code = Path(__file__).parent, Path(kernels.__file__).parent
    files = {path.name: path.read_text() for path in sorted(here.parent.glob("*.py")) if path.name not in LEFT_OUT}
    files |= {f"kernels/{path.name}": path.read_text() for path in sorted(device_code.glob("*.py"))}
    files |= {f"integrations/{name}": (here / name).read_text() for name in ("__init__.py", "layers.py")}
    files |= {"__init__.py": INIT, "layers.py": LAYERS}
    unique = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    variants = []
    for backend in BACKENDS:
        # Several versions may be loaded into one process, this package beside them: each has its name and operators.
        identity = f"lmp_triton_{backend}_{unique}"
        variant = target / f"torch-{backend}"
        for name, text in files.items():
            path = variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = text.replace('"lmp_triton::', f'"{identity}::').replace(
                "torch.ops.lmp_triton.", f"torch.ops.{identity}."
            )
            path.write_text(text)
        metadata = {
            "id": identity,
            "name": "lmp-triton",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        variants.append(variant)
    return variants


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lmp_triton.integrations.hub", description="Write a Hugging Face Hub kernel."
    )
    parser.add_argument("folder", type=Path, help="gets a folder build/")
    for variant in build(parser.parse_args(arguments).folder):
        print(variant)


if __name__ == "__main__":
    main()
