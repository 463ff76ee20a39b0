"""JSON objects as the project reads them: every key once, every number finite, bounded depth, whole characters."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from so8t_torch.core.errors import SO8TError
from so8t_torch.core.files import read_text, shown

MAX_DEPTH = 32
MAX_FILE_BYTES = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


def read_object(path: str | Path, error: type[SO8TError], *, limit: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: of a regular UTF-8 file, with or without byte order mark.
        error: the class of what is raised.
        limit: largest size in bytes.

    Raises:
        SO8TError: of the class given, naming the file and what is wrong in it.
    """
    return parse_object(read_text(path, error, limit=limit), shown(path), error)


def parse_object(text: str, source: str, error: type[SO8TError]) -> dict[str, Any]:
    """Read one JSON object.

    Args:
        text: of the object.
        source: with which the error begins.
        error: the class of what is raised.

    Raises:
        SO8TError: ``source: reason``; see ``parse_value``, or the text is another value.
    """
    row = parse_value(text, source, error)
    if not isinstance(row, dict):
        raise error(f"{source}: expected a JSON object, got a {type(row).__name__}.")
    return row


def parse_value(text: str, source: str, error: type[SO8TError]) -> Any:
    """Read one JSON value without duplicate keys, NaN, Infinity, deep nesting, NUL or lone surrogates.

    Args:
        text: of the value.
        source: with which the error begins.
        error: the class of what is raised.

    Raises:
        SO8TError: ``source: reason``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = Counter(name for name, _ in pairs)
            raise error(f"{source}: key {short(names.most_common(1)[0][0])} is given twice; keep one.")
        return found

    constants: list[str] = []

    def note(constant: str) -> float:
        constants.append(constant)
        return math.nan

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=note)
    except RecursionError as problem:
        raise error(f"{source}: nested deeper than {MAX_DEPTH} levels.") from problem
    except json.JSONDecodeError as problem:
        raise error(f"{source}: not a complete JSON object ({problem.msg} at {_place(problem)}).") from problem
    except SO8TError:
        raise
    except ValueError as problem:  # Python reads no integer of more than some thousand digits
        raise error(f"{source}: a number has too many digits to be read ({problem}).") from problem
    if (reason := _fault(value, constants)) is not None:
        raise error(f"{source}: {reason}")
    return value


def nonfinite(whole: Any) -> Iterator[tuple[str, float]]:
    """Yield (place, number) for every number in nested dicts and lists that is NaN or infinite.

    Args:
        whole: nested to any depth.
    """
    waiting: list[tuple[str, Any]] = [("", whole)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield place, value
        elif isinstance(value, dict):
            waiting += [(f"{place}.{key}" if place else str(key), item) for key, item in reversed(value.items())]
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{place}[{i}]", item) for i, item in reversed(list(enumerate(value)))]


def check_text(text: str, source: str, error: type[SO8TError]) -> None:
    """Refuse a text with NUL or a lone surrogate.

    Args:
        text: to check.
        source: with which the error begins.
        error: the class of what is raised.

    Raises:
        SO8TError: ``source: reason``.
    """
    if (reason := _unreadable(text)) is not None:
        raise error(f"{source}: {reason}")


def short(value: object) -> str:
    """Return what ``repr`` says with long parts left out, for error texts."""
    return _SHORT.repr(value)


def _place(problem: json.JSONDecodeError) -> str:
    return f"column {problem.colno}" if problem.lineno == 1 else f"line {problem.lineno}, column {problem.colno}"


def _unreadable(text: str) -> str | None:
    if "\x00" in text:
        return "a text contains the NUL character."
    if not text.isascii() and _SURROGATE.search(text):
        return "a text contains a lone surrogate, which is not a character."
    return None


def _fault(whole: Any, constants: list[str]) -> str | None:
    """Return what is wrong with a value that was read, level by level, or ``None``."""
    level = [whole]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, str):
                if (reason := _unreadable(value)) is not None:
                    return reason
            elif isinstance(value, float):
                if not math.isfinite(value):
                    return _not_finite(whole, constants)
            elif isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        if not inner:
            return None
        level = inner
    return f"nested deeper than {MAX_DEPTH} levels."


def _not_finite(whole: Any, constants: list[str]) -> str:
    place, _ = next(nonfinite(whole))
    where = f" (in {short(place)})" if place else ""
    if constants:
        return f"{constants[0]} is not a JSON number{where}."
    return f"a number is too large to be finite{where}."
