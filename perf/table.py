"""The long table of results: a CSV file that grows by whole rows and outlives the process that writes it.

A row is one line, written by one call and synced; a killed process leaves whole rows. What is torn all the same (a full
disk, an earlier version of this program) is moved to FILE.torn, with a message, so that the rest stays of use.
"""

from __future__ import annotations

import csv
import fcntl
import io
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

MACHINE = ("device", "capability", "driver", "torch", "triton", "python", "commit")
COLUMNS = (
    *MACHINE,
    "workload",
    "provider",
    "pass",
    "clock",
    "date",
    "status",
    "ms",
    "p20",
    "p80",
    "count",
    "logits_bytes",
    "effective_gb_s",
    "device_gb_s",
    "percent_of_device",
    "peak_mib",
    "launches",
    "first_call_s",
    "kernels_us",
)
NUMBERS = COLUMNS[COLUMNS.index("ms") : COLUMNS.index("kernels_us")]


class Unusable(Exception):
    """A file is no table, or can't be read or written; the message is one line and names the file."""


def parse(content: bytes, path: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The whole rows of a table, and what is torn.

    Raises:
        Unusable: it is something else than a table of `bench run`.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content[: content.rfind(b"\n") + 1].decode(errors="replace")
        if "\ufffd" in text or "\0" in text or not text:
            raise Unusable(f"{path} is no table of `bench run`: it is not text") from None
        text += content[content.rfind(b"\n") + 1 :].decode(errors="replace")
    header, newline, _rest = text.partition("\n")
    expected = ",".join(COLUMNS)
    if not newline and expected.startswith(header.rstrip("\r")):
        return [], [header] if header else []  # killed while it was new
    if header.rstrip("\r") != expected:
        raise Unusable(f"{path} is no table of `bench run`: its first line is {header[:60]!r}")
    whole, torn = [], []
    ends_whole = text.endswith("\n")
    try:
        rows = list(csv.reader(io.StringIO(text.replace("\0", "\ufffd"))))[1:]
    except csv.Error as error:
        raise Unusable(f"{path} is no table of `bench run`: {error}") from None
    for number, values in enumerate(rows):
        row = dict(zip(COLUMNS, values, strict=False))
        if len(values) != len(COLUMNS) or not _numeric(row) or (number == len(rows) - 1 and not ends_whole):
            torn.append(_line(values))
        else:
            whole.append(row)
    return whole, torn


def read(path: Path) -> list[dict[str, str]]:
    """The whole rows of a table; says on standard error if some are torn, and leaves the file as it is.

    Raises:
        Unusable: there is none, or it is something else.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Unusable(f"{path} can't be read: {error.strerror}") from None
    if not content:
        raise Unusable(f"{path} is empty")
    whole, torn = parse(content, path)
    if torn:
        print(f"{path}: {len(torn)} torn row(s) left out", file=sys.stderr)
    return whole


class Table:
    """A table open for growing; one process at a time.

    with Table(path) as table: table.rows, what it holds; table.append(rows).

    Raises:
        Unusable: the file is something else, can't be written, or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        self.file = -1

    def __enter__(self) -> Table:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
            content = self.path.read_bytes()
            self.rows, torn = parse(content, self.path)
            if torn:
                self._set_aside(torn)
            elif not content:
                self._write(_text(COLUMNS))
        except BlockingIOError:
            self._close()
            raise Unusable(f"{self.path} is being written by another process") from None
        except OSError as error:
            self._close()
            raise Unusable(f"{self.path} can't be written: {error.strerror}") from None
        except BaseException:
            self._close()
            raise
        return self

    def _open(self) -> None:
        self.file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _set_aside(self, torn: list[str]) -> None:
        """Put the table without them in its place; killed meanwhile, it is as it was."""
        aside, fresh = (self.path.with_name(self.path.name + end) for end in (".torn", ".new"))
        with aside.open("a") as file:
            file.write("\n".join(torn) + "\n")
        fresh.write_bytes(_text(COLUMNS, *(row.values() for row in self.rows)))
        os.replace(fresh, self.path)
        self._close()
        self._open()
        print(f"{self.path}: {len(torn)} torn row(s) set aside in {aside}", file=sys.stderr)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def append(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Add rows, all or none of them; columns they don't name are empty.

        Raises:
            Unusable: the disk is full, or the like; the table is as it was.
        """
        written = [{name: _field(row.get(name, "")) for name in COLUMNS} for row in rows]
        self._write(_text(*(row.values() for row in written)))
        self.rows += written

    def _write(self, content: bytes) -> None:
        size = os.fstat(self.file).st_size
        try:
            if os.write(self.file, content) != len(content):
                raise OSError(0, "there is no more room")
            os.fsync(self.file)
        except OSError as error:
            os.ftruncate(self.file, size)
            raise Unusable(f"{self.path} can't be written: {error.strerror}") from None


def _text(*rows: Iterable[str]) -> bytes:
    return "".join(_line(row) + "\n" for row in rows).encode()


def _line(values: Iterable[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue()


def _field(value: object) -> str:
    """Five digits of a number; a text on one line."""
    return f"{value:.5g}" if isinstance(value, float) else " ".join(str(value).split())


def _numeric(row: Mapping[str, str]) -> bool:
    try:
        return all(math.isfinite(float(row[name])) for name in NUMBERS if row.get(name))
    except ValueError:
        return False
