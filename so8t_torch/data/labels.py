"""The three decisions of triage, ordered by severity, and the one table of other names for them.

Labels are written to disk by name, never by number, so that two files can never disagree about an order.
"""

from __future__ import annotations

import difflib
import functools
import re
from enum import Enum

from so8t_torch.core.errors import DataError
from so8t_torch.core.json_text import short


@functools.total_ordering
class Label(Enum):
    """A decision; ``ALLOW < ESCALATE < REFUSE`` by severity."""

    ALLOW = "ALLOW"
    ESCALATE = "ESCALATE"
    REFUSE = "REFUSE"

    @property
    def severity(self) -> int:
        """Place in the order of severity, 0 for ALLOW; for arithmetic only, never for files."""
        return list(Label).index(self)

    def __lt__(self, other: object) -> bool:
        return self.severity < other.severity if isinstance(other, Label) else NotImplemented

    def __str__(self) -> str:
        return self.value


ALIASES = {
    "COMPLY": Label.ALLOW,
    "COMPLIANCE": Label.ALLOW,
    "ESCALATION": Label.ESCALATE,
    "DENY": Label.REFUSE,
    "REFUSAL": Label.REFUSE,
}
"""Names found in data of other origin; DENY and REFUSE of four-class data both project onto REFUSE."""

_NAMES = {label.value: label for label in Label} | ALIASES
_LEADING_WORD = re.compile(r"[\s\"'*`(\[「【]*([A-Za-z]+)")


def parse_label(text: str) -> Label:
    """Read a label written by name, in any case and with surrounding blanks.

    Args:
        text: one of the three names or an alias.

    Raises:
        DataError: the text is no known name (a number is none); the message gives the nearest name.
    """
    name = text.strip().upper()
    if name in _NAMES:
        return _NAMES[name]
    near = difflib.get_close_matches(name[:80], _NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "labels are stored by name, never by number."
    raise DataError(f"Expected a label out of {', '.join(_NAMES)}, but got {short(text)}; {hint}")


def leading_label(answer: str) -> Label | None:
    """Return the label with which a generated answer begins, or ``None`` where its first word is no label."""
    word = _LEADING_WORD.match(answer)
    return _NAMES.get(word.group(1).upper()) if word else None
