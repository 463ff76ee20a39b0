"""Running text that every machine with Python has: the documentation strings of its standard library.

Files are parsed, never imported; a module belongs to the held-out part by the hash of its path, so that no text of a
held-out module is ever trained on. The text depends on the Python version, which the environment record names.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from so8t_torch.core.errors import DataError

SHORTEST = 80
"""Characters; shorter strings are captions, not running text."""

HELD_OUT_IN = 20
"""One module in this many is held out."""

_LEFT_OUT = ("test", "tests", "idlelib", "site-packages", "lib2to3", "turtledemo")


@functools.cache
def documentation_strings(split: Literal["train", "held_out"], root: Path | None = None) -> tuple[str, ...]:
    """Return the documentation strings of a split, in path and line order.

    Args:
        split: ``"train"`` or ``"held_out"``.
        root: directory of Python files; default: the standard library of this interpreter.

    Raises:
        DataError: the directory holds no documentation string of the split.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    files = [p for p in sorted([*root.glob("*.py"), *root.glob("*/*.py")]) if not set(p.parts) & set(_LEFT_OUT)]
    texts = [text for path in files if _held_out(path, root) == (split == "held_out") for text in _strings(path)]
    if not texts:
        raise DataError(f"{root}: no documentation string of {SHORTEST} characters or more for the {split} part.")
    return tuple(dict.fromkeys(texts))


def _held_out(path: Path, root: Path) -> bool:
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_IN == 0


def _strings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a distribution may ship templates that are not Python of this version
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield text
