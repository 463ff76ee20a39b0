"""Running text to learn a language from: the standard library's sources, or the user's own file or folder.

A text is a list of documents, as bytes. Of a folder a document is held out by the hash of its path, so that no part of
a held-out document is ever learned; of a single file the end is held out. ``max_bytes`` takes documents in an order
drawn from the same hash, so that a part of the text is a sample of it.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from so8t_torch.core.config import Section
from so8t_torch.core.errors import DataError
from so8t_torch.core.files import read_bytes, refuse_packed, shown

SUFFIXES = (".md", ".py", ".rst", ".txt")
"""Of the files that a folder's text is made of."""

LARGEST = 1 << 30
"""Bytes of one file at most."""

STDLIB = "stdlib"
_LEFT_OUT = {
    "test",
    "tests",
    "encodings",
    "idlelib",
    "pydoc_data",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "turtledemo",
}


class TextSection(Section):
    """Text to learn as it stands: every token is predicted.

    ``source`` is ``stdlib``, a file, or a folder of .md, .py, .rst and .txt files; ``vocabulary`` is that of the
    tokenizer ``bpe``, which is trained on the training part; ``length`` is the number of tokens a row predicts;
    ``max_bytes`` bounds training and held-out part together.
    """

    source: str = STDLIB
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    vocabulary: Annotated[int, Field(ge=300)] | None = None
    length: Annotated[int, Field(ge=2)] = 512
    held_out_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    max_bytes: Annotated[int, Field(ge=1000)] | None = None


@dataclass(frozen=True)
class Text:
    """The two parts of a text: documents as bytes, and where they come from."""

    train: tuple[bytes, ...]
    held_out: tuple[bytes, ...]
    source: str


def read(section: TextSection) -> Text:
    """Read the text of a section.

    Raises:
        DataError: nothing can be read there, a part is empty, or a file is packed.
    """
    if section.source == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        found = _folder(root, (".py",))
    else:
        root = Path(section.source).expanduser()
        if not root.is_dir():
            return _file(root, section)
        found = _folder(root, SUFFIXES)
    share, most = section.held_out_share, section.max_bytes
    held = [path for path in found if _hash(path, root, 0) < share]
    learned = [path for path in found if _hash(path, root, 0) >= share]
    parts = []
    for paths, part in ((learned, 1 - share), (held, share)):
        drawn = sorted(paths, key=lambda path: _hash(path, root, 1))
        parts.append(_documents(drawn, None if most is None else int(part * most)))
    return _checked(Text(parts[0], parts[1], section.source))


def _folder(root: Path, suffixes: Sequence[str]) -> list[Path]:
    paths = (path for path in root.rglob("*") if path.suffix in suffixes and path.is_file())
    kept = sorted(path for path in paths if not set(path.relative_to(root).parts[:-1]) & _LEFT_OUT)
    if not kept:
        raise DataError(f"{shown(root)}: expected files that end in {', '.join(suffixes)}, found none.")
    return kept


def _file(path: Path, section: TextSection) -> Text:
    """Return a file's beginning and end; the cut lies behind a line end."""
    whole = _content(path)[: section.max_bytes]
    cut = whole.find(b"\n", int((1 - section.held_out_share) * len(whole))) + 1
    return _checked(Text((whole[:cut],), (whole[cut:],), section.source))


def _content(path: Path) -> bytes:
    content = read_bytes(path, DataError, limit=LARGEST)
    refuse_packed(content, path, DataError)
    return content


def _documents(paths: Sequence[Path], most: int | None) -> tuple[bytes, ...]:
    """Return the files' contents, together no more than ``most`` bytes; the last one may be cut."""
    found: list[bytes] = []
    room = most
    for path in paths:
        if room is not None and room <= 0:
            break
        content = _content(path)[:room]
        if content:
            found.append(content)
        room = None if room is None else room - len(content)
    return tuple(found)


def _checked(text: Text) -> Text:
    for name, part in (("training", text.train), ("held-out", text.held_out)):
        if not sum(map(len, part)):
            raise DataError(
                f"data.text.source {text.source!r:.200}: the {name} part is empty; give more text, or another "
                "data.text.held_out_share."
            )
    return text


def _hash(path: Path, root: Path, place: int) -> float:
    """Return a number from 0 to 1 that depends on a path below ``root`` alone; ``place`` chooses one of two."""
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[8 * place : 8 * place + 8], "big") / 2**64
