"""Checks of stored models before a library opens them: headers of safetensors files, and whole folders.

A safetensors file is 8 bytes n, a JSON header of n bytes {name: {dtype, shape, data_offsets}}, and the numbers. The
library that reads them checks offsets, shapes and sizes; here stand the bounds it does not have, and the refusal of
what is no regular file. Only headers are read, and nothing is ever unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from so8t_torch.core.errors import SO8TError
from so8t_torch.core.files import opened, shown
from so8t_torch.core.json_text import parse_object, read_object, short

MAX_HEADER_BYTES = 4 << 20
MAX_TENSORS = 20_000
MAX_NAME = 512
MAX_TEXT_BYTES = 1 << 28
MAX_ENTRIES = 10_000
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_PARTS_PER_TENSOR = 16
"""Brackets, braces and commas that the header of one tensor needs at most: a shape of a dozen dimensions."""
_TEXT = (".json", ".jinja", ".txt", ".model")
_SEPARATOR = re.compile(r"[/\\:\x00]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_weights(path: str | Path, error: type[SO8TError]) -> list[str]:
    """Check the header of a safetensors file and return the names of its tensors.

    Args:
        path: of the file.
        error: the class of what is raised.

    Raises:
        SO8TError: of the class given: no regular file, cut off, a header that is too long or not one JSON object with
            every name once, too many tensors, or a name that is none.
    """
    with opened(path, error) as handle:
        size = os.fstat(handle.fileno()).st_size
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise error(
                f"{shown(path)}: not a complete safetensors file (a header of {length:,} bytes is announced, the file "
                f"has {size:,}); copy it again."
            )
        if length > MAX_HEADER_BYTES:
            raise error(f"{shown(path)}: expected a header of at most {MAX_HEADER_BYTES:,} bytes, got {length:,}.")
        header = handle.read(length)
    return _names(header, path, error)


def _names(header: bytes, path: str | Path, error: type[SO8TError]) -> list[str]:
    # counted in the bytes, before any of it becomes an object
    if sum(map(header.count, (b"[", b"{", b","))) > _PARTS_PER_TENSOR * MAX_TENSORS:
        raise error(f"{shown(path)}: its header describes more than {MAX_TENSORS:,} tensors; store them in shards.")
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{shown(path)}: not a complete safetensors file (header: {problem.reason}).") from problem
    entries = parse_object(text, f"{shown(path)}: not a complete safetensors file; its header", error)
    names = [name for name in entries if name != "__metadata__"]
    if len(names) > MAX_TENSORS:
        raise error(
            f"{shown(path)}: expected at most {MAX_TENSORS:,} tensors, got {len(names):,}; store them in shards."
        )
    _check_names(names, path, error)
    return names


def _check_names(names: Iterable[str], path: str | Path, error: type[SO8TError]) -> None:
    for name in names:
        if not name or len(name) > MAX_NAME or ".." in name or _CONTROL.search(name):
            raise error(
                f"{shown(path)}: expected names of tensors like model.layers.0.weight of at most {MAX_NAME} "
                f"characters, got {short(name)}."
            )


def is_plain_name(name: object) -> bool:
    """Whether a name leads to an entry of the folder it is joined to, on every system.

    Args:
        name: as a file says it.
    """
    return isinstance(name, str) and name not in ("", ".", "..") and not _SEPARATOR.search(name)


def read_index(path: Path, error: type[SO8TError]) -> dict[str, str]:
    """Return which file of a folder holds which tensor, as ``model.safetensors.index.json`` says.

    Args:
        path: of the index.
        error: the class of what is raised.

    Raises:
        SO8TError: of the class given: unreadable, or it names something else than files beside it.
    """
    tree = read_object(path, error, limit=MAX_HEADER_BYTES)
    files: Any = tree.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise error(f"{shown(path)}: expected a JSON index with a weight_map, got {short(tree)}; copy it again.")
    _check_names(files, path, error)
    for name in sorted(set(map(str, files.values()))):
        if not is_plain_name(name) or not os.path.isfile(path.parent / name):
            raise error(
                f"{shown(path.parent)}: the index names {short(name)}, which is not a file there; complete the "
                "checkpoint."
            )
    return {key: str(name) for key, name in files.items()}


def check_folder(folder: Path, error: type[SO8TError]) -> None:
    """Check a stored model before a library reads it: configuration, index, headers, and that files are files.

    Args:
        folder: with ``config.json`` and safetensors weights, whole or in shards.
        error: the class of what is raised.

    Raises:
        SO8TError: of the class given, naming the file.
    """
    for name in _entries(folder, error):
        if name.endswith(_TEXT):
            with opened(folder / name, error, limit=MAX_TEXT_BYTES):
                pass
    read_object(folder / "config.json", error)
    stored_tensors(folder, error)


def stored_tensors(folder: Path, error: type[SO8TError]) -> dict[str, str]:
    """Return which file of a folder holds which tensor; the header of every file was checked.

    Args:
        folder: with safetensors weights, whole or in shards.
        error: the class of what is raised.

    Raises:
        SO8TError: of the class given, naming the file.
    """
    if os.path.lexists(folder / INDEX):
        files = read_index(folder / INDEX, error)
        for name in sorted(set(files.values())):
            check_weights(folder / name, error)
        return files
    if os.path.lexists(folder / WEIGHTS):
        return dict.fromkeys(check_weights(folder / WEIGHTS, error), WEIGHTS)
    raise error(
        f"{shown(folder)}: expected {WEIGHTS} or {INDEX}; other formats are not read. "
        "Save the model again with save_pretrained."
    )


def _entries(folder: Path, error: type[SO8TError]) -> set[str]:
    names: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                names.add(entry.name)
                if len(names) > MAX_ENTRIES:
                    raise error(f"{shown(folder)}: expected at most {MAX_ENTRIES:,} entries in a model's folder.")
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or "not a path"
        raise error(f"{shown(folder)}: the folder cannot be read ({reason}).") from problem
    return names
