"""What becomes of bad rows: the first one ends the reading, or they are put aside and counted.

``strict`` stops with ``file:line: reason``. ``quarantine`` leaves a bad row out and writes it down in
``FILE.refused.jsonl``, one object per row: where it stood, why it was refused, and its first bytes. More bad rows than
the allowed share end the reading all the same.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from so8t_torch.core.config import Section
from so8t_torch.core.errors import DataError
from so8t_torch.core.files import shown
from so8t_torch.data.lines import FileError, Limits


class ReadingSection(Section):
    """How data files are read.

    ``refused_share`` is the largest share of bad rows that quarantine accepts; ``refused_folder`` is where they are
    written down, ``None`` for beside the data.
    """

    mode: Literal["strict", "quarantine"] = "strict"
    limits: Limits = Limits()
    refused_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    refused_folder: Path | None = None


@dataclass(frozen=True)
class Refusal:
    """A row that was left out: the error about it, which begins with ``file:line``, and its first bytes."""

    reason: str
    beginning: bytes

    def as_json(self) -> str:
        """Return one line for the file of refused rows; bytes that are no UTF-8 are written as ``\\\\xff``."""
        text = self.beginning.decode("utf-8", "backslashreplace")
        return json.dumps({"reason": self.reason, "beginning": text}, ensure_ascii=False)


class Quarantine:
    """Collects refused rows of one file and ends the reading when there are too many.

    Args:
        path: of the data file.
        section: how it is read.
        lines: how many physical lines it has, at least the number of its rows.
    """

    def __init__(self, path: Path, section: ReadingSection, lines: int) -> None:
        self.refusals: list[Refusal] = []
        self.file = (section.refused_folder or path.parent) / f"{path.name}.refused.jsonl"
        self._path = path
        self._share = section.refused_share
        self._lines = lines

    def add(self, error: DataError, beginning: bytes) -> None:
        """Put a row aside.

        Args:
            error: why.
            beginning: its first bytes.

        Raises:
            FileError: there are too many by now.
        """
        self.refusals.append(Refusal(str(error), beginning))
        self._check(self._lines)

    def close(self, rows: int) -> Path | None:
        """Write the refused rows down and return where, ``None`` if there are none; an older file of them goes.

        Args:
            rows: number of rows in the data, good and bad.

        Raises:
            FileError: there are too many, or the file cannot be written.
        """
        self._check(rows)
        return self._write()

    def _check(self, rows: int) -> None:
        if len(self.refusals) > self._share * rows:
            first = "\n".join(f"  {refusal.reason}" for refusal in self.refusals[:3])
            raise FileError(
                f"{shown(self._path)}: {len(self.refusals)} bad rows are more than {self._share:.2%} of {rows}; mend "
                f"the file or raise data.reading.refused_share. {self._write() or ''} lists them. The first:\n{first}"
            )

    def _write(self) -> Path | None:
        try:
            if not self.refusals:
                self.file.unlink(missing_ok=True)
                return None
            write_lines(self.file, (refusal.as_json() for refusal in self.refusals))
        except OSError as error:
            raise FileError(
                f"{shown(self.file)}: bad rows cannot be written down there ({error.strerror}); set "
                "data.reading.refused_folder to a folder that can be written to."
            ) from error
        return self.file


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file whole: to a temporary name, then renamed.

    Args:
        path: replaced if it is there; its folder is made.
        lines: without their ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".refused-", encoding="utf-8", newline="\n", delete=False
    ) as handle:
        try:
            handle.writelines(f"{line}\n" for line in lines)
            handle.flush()
            os.fsync(handle.fileno())
        except OSError:
            Path(handle.name).unlink()
            raise
    Path(handle.name).replace(path)
