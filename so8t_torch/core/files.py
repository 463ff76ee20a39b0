"""Reading of files that may be anything: regular files only, opened without waiting, never more than a stated size.

A path is opened once and judged by what was opened, so that nothing can be exchanged between the check and the
reading. A pipe does not block, a folder, a device or a circle of links is named as what it is.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from so8t_torch.core.errors import SO8TError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_REASONS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "a part of the path is a file and not a folder",
    errno.ELOOP: "its links lead in a circle",
    errno.ENAMETOOLONG: "the path is longer than the system allows",
    errno.ENXIO: "a socket, not a regular file",
    errno.EACCES: "not permitted to read it",
    errno.EPERM: "not permitted to read it",
}
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
}
_SHOWN = 200


def shown(path: str | Path) -> str:
    """Return a path for an error text: a very long one with its middle left out."""
    text = str(path).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}…{text[-_SHOWN:]}"


@contextmanager
def opened(path: str | Path, error: type[SO8TError], *, limit: int | None = None) -> Iterator[BinaryIO]:
    """Open a regular file for reading bytes.

    Args:
        path: followed through links.
        error: the class of what is raised.
        limit: largest size in bytes, ``None`` for any.

    Raises:
        SO8TError: of the class given: it is absent, no regular file, unreadable, or larger than the limit.
    """
    try:
        # a named pipe without a writer would otherwise wait for one
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as problem:
        raise error(f"{shown(path)}: {_reason(problem)}; give the path of a regular file.") from problem
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise error(f"{shown(path)}: expected a regular file, got {kind}.")
        if limit is not None and found.st_size > limit:
            raise error(f"{shown(path)}: expected at most {limit:,} bytes, got {found.st_size:,}.")
    except error:
        os.close(number)
        raise
    with os.fdopen(number, "rb") as handle:
        try:
            yield handle
        except OSError as problem:
            raise error(f"{shown(path)}: reading failed ({_reason(problem)}).") from problem


def read_bytes(path: str | Path, error: type[SO8TError], *, limit: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: of the file.
        error: the class of what is raised.
        limit: largest size in bytes.

    Raises:
        SO8TError: as for ``opened``, or the size changed while it was read.
    """
    with opened(path, error, limit=limit) as handle:
        size = os.fstat(handle.fileno()).st_size
        content = handle.read(size + 1)
        if len(content) != size or os.fstat(handle.fileno()).st_size != size:
            raise error(f"{shown(path)}: its size changed while it was read; wait until it is written.")
    return content


def read_text(path: str | Path, error: type[SO8TError], *, limit: int) -> str:
    """Return the text of a UTF-8 file, with or without byte order mark.

    Args:
        path: of the file.
        error: the class of what is raised.
        limit: largest size in bytes.

    Raises:
        SO8TError: as for ``read_bytes``, or the content is no UTF-8 text.
    """
    content = read_bytes(path, error, limit=limit)
    refuse_packed(content, path, error)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{shown(path)}: not valid UTF-8 at byte {problem.start}; save the file as UTF-8.") from problem


def refuse_packed(beginning: bytes, path: str | Path, error: type[SO8TError]) -> None:
    """Refuse a compressed file by its first bytes; it is never unpacked, whatever it would become.

    Args:
        beginning: at least six bytes, or the whole file.
        path: named in the error.
        error: the class of what is raised.

    Raises:
        SO8TError: of the class given.
    """
    for mark, name in _PACKED.items():
        if beginning.startswith(mark):
            raise error(f"{shown(path)}: expected plain text, got a {name} file; unpack it first.")


def _reason(problem: OSError | ValueError) -> str:
    if isinstance(problem, OSError):
        return _REASONS.get(problem.errno or 0, problem.strerror or type(problem).__name__)
    return f"not a path ({problem})"
