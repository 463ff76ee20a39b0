"""Hostile inputs: what a case is, which reader judges it, and the guard that bounds time and memory.

Time is processor time of this process, so that a loaded machine changes nothing; waiting for something that never
comes (a pipe without a writer) is ended by the clock on the wall.
"""

from __future__ import annotations

import re
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_torch.adapter.loading import check_weights_file, read_adapter_config
from so8t_torch.core.config import load_config
from so8t_torch.core.errors import DataError, SO8TError
from so8t_torch.core.weights import check_folder
from so8t_torch.data.intake import ReadingSection
from so8t_torch.data.lines import Limits
from so8t_torch.data.records import read_records
from so8t_torch.models.checkpoint_folder import model_class, open_checkpoint, tensors_of
from so8t_torch.train.config import TrainConfig

MIB = 1 << 20
SECONDS = 2.0
WAITING_SECONDS = 60.0
LONGEST_ERROR = 3000
FILE_CAP = 16 * MIB
SMALL_CAP = 2 * MIB
"""Caps under which data files are read here; the other kinds have caps of their own."""


@dataclass(frozen=True)
class Case:
    """One input: how it is made in an empty folder, who reads it, and what the error must say.

    ``says`` is a regular expression; ``None`` means that the input is sound and must be read.
    """

    name: str
    kind: str
    make: Callable[[Path], str | Path]
    says: str | None


def _rows(path: str | Path) -> Any:
    return read_records(path, reading=ReadingSection(limits=Limits(file_bytes=FILE_CAP, lines=200_000)))


def _few_rows(path: str | Path) -> Any:
    return read_records(path, reading=ReadingSection(limits=Limits(file_bytes=SMALL_CAP)))


def _labelled(path: str | Path) -> Any:
    return read_records(path, need_label=True)


def _settings(path: str | Path) -> Any:
    return load_config(TrainConfig, path)


def _adapter(path: str | Path) -> Any:
    config = read_adapter_config(path)
    check_weights_file(path)
    return config


def _weights(path: str | Path) -> Any:
    return tensors_of(Path(path))


def _folder(path: str | Path) -> Any:
    check_folder(Path(path), DataError)
    found = open_checkpoint(Path(path))
    model_class(Path(path))
    for key in found.files:
        found.read(key)
    return found


READERS: dict[str, tuple[Callable[[str | Path], Any], int]] = {
    "rows": (_rows, 2 * FILE_CAP),
    "few rows": (_few_rows, 2 * SMALL_CAP),
    "labelled rows": (_labelled, 2 * FILE_CAP),
    "settings": (_settings, 2 * MIB),
    "adapter": (_adapter, 32 * MIB),
    "weights": (_weights, 32 * MIB),
    "folder": (_folder, 32 * MIB),
}
"""Reader of each kind and the most memory in bytes that it may take on an input it refuses."""


class TooSlow(BaseException):
    """No reader may catch this."""


@contextmanager
def guarded(seconds: float) -> Iterator[None]:
    """End what takes more processor time than allowed, or waits without end.

    Args:
        seconds: of processor time.

    Raises:
        TooSlow: it did.
    """

    def stop(number: int, _frame: object) -> None:
        raise TooSlow(f"{'processor' if number == signal.SIGPROF else 'waiting'} time is used up")

    before = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAITING_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def fault(kind: str, path: str | Path, says: str | None, *, measured: bool = True) -> str | None:
    """Read an input and return what is wrong with the reader's answer, ``None`` if nothing is.

    Args:
        kind: key of ``READERS``.
        path: of the input.
        says: what the error must say; ``None`` if the input must be read; ``""`` if either will do.
        measured: whether to read a second time with memory traced, which makes Python several times slower.
    """
    reader, most = READERS[kind]
    try:
        with guarded(SECONDS):
            reader(path)
    except SO8TError as error:
        found = _fault_of(str(error), path, says)
    except TooSlow as error:
        found = str(error)
    except Exception as error:  # whatever else comes out is the finding
        found = f"{type(error).__name__} came out instead of an error of the library: {error!s:.300}"
    else:
        found = f"it was read, expected an error that says {says!r}" if says else None
    if found or not measured:
        return found
    peak = _peak(reader, path)
    return f"{peak:,} bytes of memory, expected at most {most:,}" if peak > most else None


def _peak(reader: Callable[[str | Path], Any], path: str | Path) -> int:
    tracemalloc.start()
    try:
        with suppress(SO8TError):
            reader(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _fault_of(text: str, path: str | Path, says: str | None) -> str | None:
    if says is None:
        return f"it was refused, expected to be read: {text:.500}"
    if len(text) > LONGEST_ERROR:
        return f"an error of {len(text):,} characters: {text:.300}"
    if says and not re.search(says, text):
        return f"expected an error that says {says!r}, got: {text:.500}"
    if says == "" and Path(path).name[:60] not in text:
        return f"the error does not name {Path(path).name[:60]}: {text:.500}"
    return None
