"""A folder of saved logits: whole files under their final names or none, and never more than was granted.

A file is written beside its place under a hidden name, synced, linked to its final name (which never replaces another
file), and the folder is synced. Then the oldest ones beyond the count and the bytes are removed. What is on disk is
read anew each time, so a restart, another process or a hand that deletes files change nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from so8t_torch.train.logits.record import Form, LogitsRecord

NAME = re.compile(r"logits_step_(\d+)_epoch_(\d+)_(\d{8}_\d{6})(?:_(\d+))?\.(safetensors|pt)")
"""Final names: step, epoch, local time, a number where the name was taken, and the form."""

WAITING = re.compile(r"\.logits_step_.*\.part")
"""Names of files that are still being written."""

ABSURD = 1 << 40
"""Bytes that no run may write in logits: 1 TiB."""

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Projection:
    """What saving will take: bytes of one file, number of files in the run, bytes on disk at once.

    ``free`` are the bytes on the disk that are free or hold files which will make way.
    """

    file: int
    files: int
    at_once: int
    free: int

    @property
    def written(self) -> int:
        """Return the bytes that the whole run writes."""
        return self.file * self.files

    def sentence(self) -> str:
        """Return the projection in words."""
        return (
            f"{size(self.file)} a file, {self.files:,} files in this run ({size(self.written)} written), at most "
            f"{size(self.at_once)} on disk at once, {size(self.free)} free"
        )


def size(number: int) -> str:
    """Return a number of bytes in words, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024  # type: ignore[assignment]
    return f"{number:.1f} TiB"


class Store:
    """Writes records into a folder and keeps it within bounds.

    Args:
        folder: made when the first file is written.
        form: of the files written.
        max_files: how many of them are kept.
        max_bytes: how many bytes of them are kept.
    """

    def __init__(self, folder: Path, *, form: Form, max_files: int, max_bytes: int) -> None:
        self.folder, self._form = folder, form
        self._max_files, self._max_bytes = max_files, max_bytes
        self._order: dict[str, int] = {}
        self._ready = False

    def projection(self, file: int, files: int) -> Projection:
        """Return what ``files`` files of ``file`` bytes will take."""
        self.prepare()
        at_once = min(file * min(files, self._max_files), max(self._max_bytes, file))
        free = shutil.disk_usage(self.folder).free + sum(self.files().values())
        return Projection(file, files, at_once, free)

    def refusal(self, plan: Projection) -> str | None:
        """Return why this plan is absurd, or ``None``."""
        if plan.file > self._max_bytes:
            return f"one file is larger than the {size(self._max_bytes)} granted by save_logits_max_mb"
        if 2 * plan.at_once > plan.free:
            return "that is more than half of what is free"
        if plan.written > ABSURD:
            return f"that writes more than {size(ABSURD)}"
        return None

    def prepare(self) -> None:
        """Make the folder; the first time, remove what a killed process left half written and look what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._ready:
            for path in self.folder.iterdir():
                if WAITING.fullmatch(path.name):
                    _remove_if_abandoned(path)
            self.files()
            self._ready = True

    def write(self, record: LogitsRecord) -> Path:
        """Write one record and remove the oldest files beyond the bounds.

        Raises:
            OSError: the disk refused something; no file was changed.
        """
        data = record.encode(self._form)
        self.prepare()
        free, needed = shutil.disk_usage(self.folder).free, sum(piece.nbytes for piece in data)
        if free < 2 * needed:
            raise OSError(errno.ENOSPC, f"{size(needed)} to be written, but only {size(free)} are free")
        stem = f"logits_step_{record.step}_epoch_{record.epoch}_{record.timestamp}"
        with _waiting(self.folder / f".{stem}.{secrets.token_hex(4)}.part", data) as waiting:
            path = self._name(waiting, stem)
        _sync_folder(self.folder)
        self.prune()
        return path

    def _name(self, waiting: Path, stem: str) -> Path:
        """Give a finished file the first final name that is free."""
        for number in count(1):
            path = self.folder / f"{stem}{'' if number == 1 else f'_{number}'}.{self._form}"
            try:
                os.link(waiting, path)
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                # a file system without links; the one thread that writes here looks first
                if path.exists():
                    continue
                os.rename(waiting, path)
            return path
        raise AssertionError("unreachable: the numbers do not end")

    def files(self) -> dict[str, int]:
        """Return the bytes of each saved file, oldest first.

        Within this process the order is that of writing, which no clock disturbs; files found at the beginning are
        ordered by step and time.
        """
        with os.scandir(self.folder) as entries:
            found = {e.name: e.stat().st_size for e in entries if NAME.fullmatch(e.name) and e.is_file()}
        known = [name for name in self._order if name in found]
        fresh = sorted(found.keys() - self._order.keys(), key=_age)
        self._order = {name: found[name] for name in (*known, *fresh)}
        return dict(self._order)

    def prune(self) -> None:
        """Remove the oldest files beyond the count and the bytes; the newest one stays."""
        files = self.files()
        total = sum(files.values())
        for name in list(files)[:-1]:
            if len(files) <= self._max_files and total <= self._max_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / name)
            total -= files.pop(name)


def _age(name: str) -> tuple[int, str, int]:
    match = NAME.fullmatch(name)
    assert match, "only names that match are asked for"
    return int(match[1]), match[3], int(match[4] or 1)


@contextmanager
def _waiting(path: Path, data: Sequence[memoryview]) -> Iterator[Path]:
    """Write a file under a waiting name, synced; the name is gone after the block, whatever happens."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _lock(handle)
        for rest in data:
            while rest:
                rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
        yield path
    finally:
        os.close(handle)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _lock(handle: int) -> bool:
    """Whether this process got the lock, which ends with it; some file systems have none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_if_abandoned(path: Path) -> None:
    """Remove a half-written file whose writer is gone, which its lock tells."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        if _lock(handle):
            os.unlink(path)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
