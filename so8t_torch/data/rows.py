"""Rows of JSONL and CSV files by column name, one bad row at a time.

As for the lines below them, the next call after a ``DataError`` goes on behind the bad row.
"""

from __future__ import annotations

import csv
from typing import Any, NamedTuple, Protocol

from so8t_torch.core.errors import DataError
from so8t_torch.core.json_text import check_text, parse_object, short
from so8t_torch.data.lines import FileError, Lines

_SHOWN_BYTES = 1024


class Row(NamedTuple):
    """A row by column name, and ``file:line`` where it begins."""

    source: str
    values: dict[str, Any]


class Rows(Protocol):
    """What a reader of one format offers: the next row, and where the last one stood and how it begins."""

    @property
    def source(self) -> str:
        """``file:line`` of the row last read, good or bad."""

    @property
    def raw(self) -> bytes:
        """The beginning of that row as it stands in the file."""

    def __next__(self) -> Row: ...


class JsonRows:
    """One object per line; blank lines are no rows.

    Args:
        lines: of the file.
    """

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    @property
    def source(self) -> str:
        """``file:line`` of the row last read, good or bad."""
        return self._lines.source

    @property
    def raw(self) -> bytes:
        """The beginning of that row as it stands in the file."""
        return self._lines.raw[:_SHOWN_BYTES]

    def __next__(self) -> Row:
        for line in self._lines:
            if line.strip():
                return Row(self.source, parse_object(line, self.source, DataError))
        raise StopIteration


class CsvRows:
    """Rows below a header of distinct names; a quoted cell may hold line ends.

    Args:
        lines: of the file.

    Raises:
        FileError: the header cannot be read; without it no row can.
    """

    def __init__(self, lines: Lines) -> None:
        self.source = ""
        self._pieces = _Pieces(lines)
        self._reader = csv.reader(self._pieces, strict=True)
        try:
            self._header = self._cells()
        except StopIteration:
            self._header = []
        except FileError:
            raise
        except DataError as error:
            raise FileError(f"{error} This is the header, without which no row can be read.") from error
        if len(set(self._header)) != len(self._header) or not all(self._header):
            raise FileError(
                f"{self.source}: the header needs one distinct non-empty name per column, got {short(self._header)}."
            )

    @property
    def raw(self) -> bytes:
        """The beginning of that row as it stands in the file."""
        return self._pieces.raw

    def __next__(self) -> Row:
        cells = self._cells()
        if len(cells) != len(self._header):
            raise DataError(f"{self.source}: expected {len(self._header)} columns as in the header, got {len(cells)}.")
        return Row(self.source, dict(zip(self._header, cells, strict=True)))

    def _cells(self) -> list[str]:
        cells: list[str] = []
        while not cells:
            self.source = self._pieces.begin()
            try:
                cells = next(self._reader)
            except csv.Error as error:
                raise DataError(f"{self.source}: not readable as CSV ({error}).") from error
        for cell in cells:
            check_text(cell, self.source, DataError)
        return cells


class _Pieces:
    """The lines of a row as the CSV reader asks for them, together no longer than one line may be."""

    def __init__(self, lines: Lines) -> None:
        self.raw = b""
        self._lines = lines
        self._bytes = 0

    def begin(self) -> str:
        """Begin a row; return ``file:line`` of its first line."""
        self.raw, self._bytes = b"", 0
        return f"{self._lines.path}:{self._lines.number + 1}"

    def __iter__(self) -> _Pieces:
        return self

    def __next__(self) -> str:
        try:
            text = next(self._lines)
        except DataError:
            self._keep()
            raise
        self._keep()
        self._bytes += len(self._lines.raw)
        most = self._lines.limits.line_bytes
        if self._bytes > most + 2:
            raise DataError(f"{self._lines.source}: the row has more than {most} bytes; close its quotes or split it.")
        return text

    def _keep(self) -> None:
        self.raw += self._lines.raw[: _SHOWN_BYTES - len(self.raw)]
