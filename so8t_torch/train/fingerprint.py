"""What tells one frozen base from another without reading all of it.

    of a folder       sizes; config.json; of each weights file the header, and its numbers or 1,024 pieces of them
    of a repository   the commit that was loaded

A header names every tensor with its kind, shape and place. Files of at most 16 MiB are hashed whole; of a larger one
1 MiB in pieces evenly spread, first and last bytes included, whatever its size. A base that was trained on, merged,
rounded or cut off differs there. A change of a few numbers between two pieces of a large file is not seen, nor is one
in generation_config.json; the tokenizer is not looked at, since the token ids it gives are hashed with the samples.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from so8t_torch.core.errors import ConfigError
from so8t_torch.core.files import opened, read_bytes
from so8t_torch.core.json_text import MAX_FILE_BYTES
from so8t_torch.core.weights import stored_tensors
from so8t_torch.data.chat import Encoded

WHOLE = 16 << 20
"""Bytes up to which a file is hashed whole."""

PIECES, PIECE = 1024, 1024
"""Number and bytes of the pieces of a larger one."""

CONFIG = "config.json"

Fingerprint = Mapping[str, Any]
"""What JSON can say: of each file its facts, or of a repository the commit."""


def of_folder(folder: Path) -> dict[str, Any]:
    """Return the fingerprint of a stored model.

    Args:
        folder: with ``config.json`` and safetensors weights, whole or in shards.

    Raises:
        ConfigError: a file is absent or damaged, and named.
    """
    config = read_bytes(folder / CONFIG, ConfigError, limit=MAX_FILE_BYTES)
    found: dict[str, Any] = {CONFIG: {"bytes": len(config), "content": hashlib.sha256(config).hexdigest()}}
    for name in sorted(set(stored_tensors(folder, ConfigError).values())):
        found[name] = _of_weights(folder / name)
    return found


def _of_weights(path: Path) -> dict[str, Any]:
    with opened(path, ConfigError) as handle:
        size = os.fstat(handle.fileno()).st_size
        # the length was checked with the rest of the header
        length = 8 + int.from_bytes(handle.read(8), "little")
        handle.seek(0)
        header = hashlib.sha256(handle.read(length)).hexdigest()
        numbers = hashlib.sha256()
        for start, count in _places(length, size):
            numbers.update(_piece(handle, start, count))
    return {"bytes": size, "header": header, "numbers": numbers.hexdigest()}


def _places(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield place and length of what is read between two places."""
    if end - start <= WHOLE:
        yield start, end - start
        return
    for number in range(PIECES):
        yield start + (end - start - PIECE) * number // (PIECES - 1), PIECE


def _piece(handle: BinaryIO, start: int, count: int) -> bytes:
    handle.seek(start)
    return handle.read(count)


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Return what differs, a phrase for each file or fact.

    Args:
        before: as it was written down.
        now: as it is.
    """
    found = []
    for name in sorted(before.keys() | now.keys()):
        one, other = before.get(name), now.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            facts = [fact for fact in other if one.get(fact) != other[fact]]
            found.append(f"{name} (other {', '.join(facts)})")
        else:
            found.append(f"{name} ({_shown(one)} before, {_shown(other)} now)")
    return found


def _shown(fact: Any) -> str:
    return "absent" if fact is None else "there" if isinstance(fact, Mapping) else str(fact)


def digest(rows: Sequence[Encoded]) -> str:
    """Return a SHA-256 over what is learned from: token ids, supervised ids and labels, in order."""
    found = hashlib.sha256()
    for row in rows:
        name = "" if row.label is None else row.label.name
        found.update(f"{len(row.input_ids)} {name};".encode())
        found.update(array("q", row.input_ids).tobytes() + array("q", row.labels).tobytes())
    return found.hexdigest()
