"""Rows appended to a JSONL file, whole or not at all; while the disk refuses them they wait, and training goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from so8t_torch.core.errors import DataError, TrainingError
from so8t_torch.core.files import read_text
from so8t_torch.core.json_text import parse_object

WAITING = 10_000
"""Rows that wait at most for a disk that refuses them; older ones are lost, and that is told."""

MAX_BYTES = 1 << 28
"""Of a file of rows: more than a row of 1 KiB at each of 200,000 steps."""


def on_terminal(text: str) -> None:
    """Print one line for the user, beside a progress bar."""
    Console(stderr=True).print(text, soft_wrap=True, markup=False, highlight=False)


def json_line(row: dict[str, Any], path: Path) -> str:
    """Return a row as a line.

    Raises:
        TrainingError: a number is not finite; such a number is an error, never a record.
    """
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise TrainingError(f"A number to be written to {path} is not finite: {row}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file.

    Args:
        path: of at most ``MAX_BYTES``, where each line is one JSON object.

    Raises:
        DataError: it is absent or larger, or a line is something else; the text names it.
    """
    lines = read_text(path, DataError, limit=MAX_BYTES).split("\n")
    return [parse_object(line, f"{path}:{number}", DataError) for number, line in enumerate(lines, 1) if line]


def append_whole(path: Path, text: str) -> None:
    """Append a text; where the disk takes only a part of it, that part is removed again.

    Raises:
        OSError: the disk refuses it; the file is as it was.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        before = os.fstat(handle).st_size
        rest = memoryview(text.encode())
        try:
            while rest:
                rest = rest[os.write(handle, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


class Journal:
    """The rows of one file.

    Args:
        path: the file.
        tell: prints one line for the user.
    """

    def __init__(self, path: Path, tell: Callable[[str], None] = on_terminal) -> None:
        self.path, self._tell = path, tell
        self._waiting: deque[str] = deque(maxlen=WAITING)
        self._refused = self._full = self._lost = False

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, and those that wait before it; it waits too where the disk refuses.

        Raises:
            TrainingError: a number in it is not finite.
        """
        if len(self._waiting) == WAITING and not self._full:
            self._tell(f"the oldest rows for {self.path} are lost from now on: {WAITING:,} wait for the disk already")
            self._full = True
        self._waiting.append(json_line(row, self.path))
        error = self._write()
        if error is not None and not self._refused:
            self._tell(f"training goes on, rows for {self.path} wait in memory: {error}")
        self._refused = error is not None

    def close(self) -> None:
        """Write what waits, for the last time; where the disk still refuses it, say what is lost."""
        if self._waiting and (error := self._write()) is not None and not self._lost:
            self._tell(f"the last {len(self._waiting):,} rows for {self.path} are lost: {error}")
            self._lost = True

    def _write(self) -> OSError | None:
        try:
            append_whole(self.path, "".join(self._waiting))
        except OSError as error:
            return error
        self._waiting.clear()
        self._full = False
        return None
