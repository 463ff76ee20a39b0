"""Physical lines of a data file: bytes in, text out, each one capped, counted and decoded.

The iterator raises ``DataError`` for a bad line and goes on with the next one when it is asked again, so that the
caller decides whether the first one ends the reading. What concerns the whole file raises ``FileError``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, BinaryIO

from pydantic import Field

from so8t_torch.core.config import Section
from so8t_torch.core.errors import DataError
from so8t_torch.core.files import refuse_packed, shown

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 1 << 20

Positive = Annotated[int, Field(ge=1)]


class FileError(DataError):
    """A data file that cannot be read on at all, whatever its other lines hold."""


class Limits(Section):
    """What a data file may have at most.

    Bytes of a line without its end (of all lines of a CSV row together), bytes and lines of the file, characters of
    one text.
    """

    line_bytes: Positive = 1 << 20
    file_bytes: Positive = 1 << 30
    lines: Positive = 1_000_000
    text_characters: Positive = 1 << 19


class Lines:
    """Decoded physical lines with their ends, capped and counted.

    Args:
        handle: a regular file at its beginning, opened for reading bytes.
        path: named in errors.
        limits: what is accepted.

    Raises:
        FileError: the file is larger than the limit.
    """

    def __init__(self, handle: BinaryIO, path: str | Path, limits: Limits) -> None:
        self.path = shown(path)
        self.limits = limits
        self.number = 0
        self.raw = b""
        self._handle = handle
        self._size = os.fstat(handle.fileno()).st_size
        self._read = 0
        self._unfinished = False
        if self._size > limits.file_bytes:
            raise FileError(
                f"{self.path}: the file has {self._size:,} bytes, expected at most {limits.file_bytes:,}; split it, or "
                "raise data.reading.limits.file_bytes."
            )

    @property
    def source(self) -> str:
        """``file:line`` of the line last read."""
        return f"{self.path}:{self.number}"

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        while self._unfinished:
            self._unfinished = not self._piece(_CHUNK).endswith(b"\n")
        most = self.limits.line_bytes
        self.raw = self._piece(most + 2)
        self.number += 1
        if self.number > self.limits.lines:
            raise FileError(f"{self.source}: the file has more than {self.limits.lines:,} lines; split it.")
        if self.number == 1:
            refuse_packed(self.raw, self.path, FileError)
            self.raw = self.raw.removeprefix(BYTE_ORDER_MARK)
        ended = self.raw.endswith(b"\n")
        if len(self.raw) - ended - self.raw.endswith(b"\r\n") > most:
            self._unfinished = not ended
            raise DataError(f"{self.source}: the line has more than {most} bytes; split the record.")
        try:
            return self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.source}: not valid UTF-8 at byte {error.start}; save the file as UTF-8.") from error

    def _piece(self, most: int) -> bytes:
        """Return bytes up to a line end, at most so many; a file that another process writes to is refused."""
        piece = self._handle.readline(most)
        self._read += len(piece)
        if self._read > self._size or (not piece and self._read < self._size):
            raise FileError(f"{self.source}: the size of the file changed while it was read; wait until it is written.")
        if not piece:
            raise StopIteration
        return piece


def count_lines(handle: BinaryIO) -> int:
    """Return the number of physical lines, the last one with or without its end, and go back to the beginning.

    Args:
        handle: a file at its beginning.
    """
    count, last = 0, b""
    while piece := handle.read(_CHUNK):
        count += piece.count(b"\n")
        last = piece[-1:]
    handle.seek(0)
    return count + (last not in (b"", b"\n"))
