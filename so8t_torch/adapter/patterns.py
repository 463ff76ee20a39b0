"""Bounds the work of regular expressions that an adapter's configuration brings along.

Python's matcher goes back over every way to match. A repetition whose inside can match in several ways, such as
(a+)+ or (a|a)*, has 2ⁿ of them on n characters; k repetitions side by side have about nᵏ. Names of modules have some
sixty characters, so the first kind is refused and the second bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 1000
MAX_ENDLESS = 4
MAX_CHOICES = 10

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


def fault_of(pattern: str) -> str | None:
    """Return why a regular expression is not accepted, ``None`` where it is.

    Args:
        pattern: as Python's ``re`` reads it.
    """
    if len(pattern) > MAX_LENGTH:
        return f"it has {len(pattern):,} characters, at most {MAX_LENGTH:,} are read"
    try:
        tree = _parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"it is not a regular expression: {error}"
    work = _Work()
    work.walk(tree, inside=False)
    if work.nested:
        return "it repeats something that itself can match in several ways, which may take forever; name the modules"
    if work.endless > MAX_ENDLESS or work.choices > MAX_CHOICES:
        return f"it has more than {MAX_ENDLESS} endless repetitions or {MAX_CHOICES} optional parts; name the modules"
    return None


class _Work:
    """Counts what makes the matcher go back."""

    def __init__(self) -> None:
        self.endless = 0
        self.choices = 0
        self.nested = False

    def walk(self, tokens: Iterable[tuple[Any, Any]], inside: bool) -> None:
        for kind, value in tokens:
            if kind in _REPEATS:
                low, high, inner = value
                self.nested |= inside and low != high
                self.endless += high > MAX_LENGTH
                self.choices += low != high <= MAX_LENGTH
                self.walk(inner, inside or high > 1)
            elif kind is _constants.BRANCH:
                self.nested |= inside
                for part in value[1]:
                    self.walk(part, inside)
            elif kind is _constants.GROUPREF_EXISTS:
                for part in filter(None, value[1:]):
                    self.walk(part, inside)
            elif kind is _constants.SUBPATTERN or kind in (_constants.ASSERT, _constants.ASSERT_NOT):
                self.walk(value[-1], inside)
            elif kind is _constants.ATOMIC_GROUP:
                self.walk(value, inside)
