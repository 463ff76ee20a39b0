"""Damage done to a checkpoint on purpose, each drawn from a seed.

Kinds: cut a file short, delete one, fill one with zeros, turn one bit, put other JSON in the place of JSON, empty
the folder. ``python -m tests.faults.damage FOLDER SEED`` does the damage of one seed.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

WRONG_JSON = ("", "{}", "[]", "null", "{", '{"step": 1}', '{"version": 2}', "NaN", "[" * 5000)


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file() and path.stat().st_size)


def truncate(folder: Path, source: random.Random) -> str:
    """Cut a file short."""
    path = source.choice(_files(folder))
    content = path.read_bytes()
    path.write_bytes(content[: source.randrange(len(content))])
    return f"{path.name} cut to {path.stat().st_size} of {len(content)} bytes"


def delete(folder: Path, source: random.Random) -> str:
    """Delete a file."""
    path = source.choice(_files(folder))
    path.unlink()
    return f"{path.name} deleted"


def zero_fill(folder: Path, source: random.Random) -> str:
    """Keep a file's size and lose its content."""
    path = source.choice(_files(folder))
    path.write_bytes(bytes(path.stat().st_size))
    return f"{path.name} filled with zeros"


def one_bit(folder: Path, source: random.Random) -> str:
    """Turn one bit of a file."""
    path = source.choice(_files(folder))
    content = bytearray(path.read_bytes())
    bit = source.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit} of {path.name} turned"


def wrong_json(folder: Path, source: random.Random) -> str:
    """Put JSON, or nearly, in the place of a JSON file."""
    path, text = source.choice(_files(folder, "*.json")), source.choice(WRONG_JSON)
    path.write_text(text)
    return f"{path.name} holds {text[:20]!r}"


def empty(folder: Path, source: random.Random) -> str:
    """Empty the folder."""
    del source
    shutil.rmtree(folder)
    folder.mkdir()
    return "emptied"


KINDS: tuple[Callable[[Path, random.Random], str], ...] = (truncate, delete, zero_fill, one_bit, wrong_json, empty)


def damage(folder: Path, seed: int) -> str:
    """Damage a checkpoint in the way of a seed; return what was done."""
    return KINDS[seed % len(KINDS)](folder, random.Random(f"damage {seed}"))


if __name__ == "__main__":
    print(damage(Path(sys.argv[1]), int(sys.argv[2])))
