"""Training and evaluation records: a conversation, an optional label, a group, and where it was read.

Files are JSONL or CSV in UTF-8, with or without a byte order mark, with LF or CRLF ends; blank lines are skipped.
Whatever breaks the contract stops the reading with ``file:line: reason``: invalid UTF-8, a line over the cap, a
duplicate key, NaN or Infinity, a line that is not an object, nesting deeper than 32, NUL or lone surrogates in a
text, a missing key, an unknown label. Nothing is repaired and nothing is skipped silently.

Two forms of row are understood::

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], "label": "ALLOW"}
    {"question": "…", "input": "…", "answer": "…", "label": "REFUSE"}

``Columns`` says which column holds what; a value with braces, ``"{question}\\n{choices}"``, is a text to fill.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from so8t_torch.core.config import Section
from so8t_torch.core.errors import DataError
from so8t_torch.core.files import opened, shown
from so8t_torch.core.json_text import parse_object, parse_value, short
from so8t_torch.data.intake import Quarantine, ReadingSection, Refusal
from so8t_torch.data.labels import Label, parse_label
from so8t_torch.data.lines import FileError, Limits, Lines, count_lines
from so8t_torch.data.rows import CsvRows, JsonRows, Row, Rows

PROMPT_NAMES = ("prompt", "instruction", "question")
ANSWER_NAMES = ("answer", "output", "completion", "response")
ROLES = ("system", "user", "assistant")

_FORMATS: dict[str, Callable[[Lines], Rows]] = {".jsonl": JsonRows, ".csv": CsvRows}
_RECORD_BYTES = 700
"""Memory of a record of two short turns without their texts."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """One conversation, its label if it has one, the group it is held out with, and where it came from.

    ``source`` is ``file:line`` for a record read from disk; every error about the record begins with it.
    """

    messages: tuple[Message, ...]
    label: Label | None = None
    group: str = ""
    source: str = ""


class Columns(Section):
    """Which column of a row holds what.

    ``prompt`` and ``answer`` name a column or, with braces, a text to fill such as ``"{question} {choice0}"``;
    ``None`` takes the one column whose name is usual. ``label: null`` ignores a column called label.
    """

    messages: str = "messages"
    system: str = "system"
    prompt: str | None = None
    input: str = "input"
    answer: str | None = None
    label: str | None = "label"
    group: str | None = "group"


@dataclass(frozen=True)
class Intake:
    """The records of one file, how many rows and lines it had, and what was left out."""

    path: Path
    records: list[Record]
    lines: int
    refusals: tuple[Refusal, ...] = ()
    refused_file: Path | None = None

    def summary(self) -> str:
        """Return what was read, and in quarantine what was not, as text for a terminal."""
        text = f"{shown(self.path)}: {len(self.records):,} records from {self.lines:,} lines"
        if not self.refusals:
            return text
        first = "".join(f"\n  {refusal.reason}" for refusal in self.refusals[:3])
        return f"{text}; {len(self.refusals):,} bad rows left out, written down in {self.refused_file}:{first}"


def read_records(
    path: str | Path,
    columns: Columns | None = None,
    *,
    need_answer: bool = True,
    need_label: bool = False,
    reading: ReadingSection | None = None,
) -> list[Record]:
    """Read the records of a ``.jsonl`` or ``.csv`` file; see ``read_file``."""
    return read_file(path, columns, need_answer=need_answer, need_label=need_label, reading=reading).records


def read_file(
    path: str | Path,
    columns: Columns | None = None,
    *,
    need_answer: bool = True,
    need_label: bool = False,
    reading: ReadingSection | None = None,
) -> Intake:
    """Read every record of a ``.jsonl`` or ``.csv`` file.

    Args:
        path: a regular file; the suffix decides the format.
        columns: which column holds what; the usual names by default.
        need_answer: whether each conversation must end with an assistant turn.
        need_label: whether each record must carry a label.
        reading: what a file may have at most, and whether bad rows end the reading; by default they do.

    Raises:
        DataError: ``file:line: reason`` for the first row that breaks the contract (in quarantine: for too many of
            them), a file that is none, too large, changes while it is read, or holds no records.
    """
    path, reading = Path(path), reading or ReadingSection()
    if path.suffix.lower() not in _FORMATS:
        raise FileError(f"{shown(path)}: expected a .jsonl or .csv file; convert it or rename it.")
    build = partial(_record, columns=columns or Columns(), need_answer=need_answer, need_label=need_label)
    with opened(path, FileError) as handle:
        lines = Lines(handle, path, reading.limits)
        aside = Quarantine(path, reading, count_lines(handle)) if reading.mode == "quarantine" else None
        records = _collect(_FORMATS[path.suffix.lower()](lines), build, reading.limits, aside)
    refusals = () if aside is None else tuple(aside.refusals)
    refused_file = None if aside is None else aside.close(len(records) + len(refusals))
    if not records:
        raise FileError(f"{shown(path)}: the file holds no records.")
    return Intake(path, records, lines.number, refusals, refused_file)


def _collect(rows: Rows, build: Callable[[Row], Record], limits: Limits, aside: Quarantine | None) -> list[Record]:
    records: list[Record] = []
    held, most = 0, limits.file_bytes * 3 // 2
    while True:
        try:
            record = build(next(rows))
            _check_lengths(record, limits)
        except StopIteration:
            return records
        except FileError:
            raise
        except DataError as error:
            if aside is None:
                raise
            aside.add(error, rows.raw)
        else:
            records.append(record)
            held += _RECORD_BYTES + sum(sys.getsizeof(message.content) for message in record.messages)
            if held > most:
                raise FileError(
                    f"{rows.source}: the records take more than {most:,} bytes of memory up to here; "
                    "split the file, or raise data.reading.limits.file_bytes."
                )


def _check_lengths(record: Record, limits: Limits) -> None:
    for message in record.messages:
        if len(message.content) > limits.text_characters:
            raise DataError(
                f"{record.source}: expected texts of at most {limits.text_characters:,} characters, got "
                f"{len(message.content):,} in a {message.role} turn; split it."
            )


def parse_json_object(text: str, source: str) -> dict[str, Any]:
    """Read one JSON object without duplicate keys, NaN, Infinity, deep nesting, NUL or lone surrogates.

    Raises:
        DataError: ``source: reason``.
    """
    return parse_object(text, source, DataError)


def _record(found: Row, columns: Columns, need_answer: bool, need_label: bool) -> Record:
    source, row = found
    messages = _messages(row, columns, source) if columns.messages in row else _turns(row, columns, source, need_answer)
    if need_answer and messages[-1].role != "assistant":
        raise DataError(f"{source}: the conversation must end with an assistant turn to learn from.")
    return Record(messages, _label(row, columns, source, need_label), _group(row, columns, source), source)


def _messages(row: Mapping[str, Any], columns: Columns, source: str) -> tuple[Message, ...]:
    turns = row[columns.messages]
    if isinstance(turns, str):  # a CSV cell
        turns = parse_value(turns, source, DataError)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{source}: {columns.messages!r} must be a list of turns, got {type(turns).__name__}.")
    messages = tuple(_message(turn, source) for turn in turns)
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise DataError(
            f"{source}: turns must alternate user, assistant after an optional system turn, got {short(roles)}."
        )
    return messages


def _message(turn: Any, source: str) -> Message:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        raise DataError(f"{source}: a turn is an object with the keys role and content, got {short(turn)}.")
    if turn["role"] not in ROLES:
        raise DataError(f"{source}: unknown role {short(turn['role'])}; expected one of {', '.join(ROLES)}.")
    return Message(turn["role"], _text(turn["content"], f"content of a {turn['role']} turn", source))


def _turns(row: Mapping[str, Any], columns: Columns, source: str, need_answer: bool) -> tuple[Message, ...]:
    prompt = _filled(row, columns.prompt or _usual(row, PROMPT_NAMES, "prompt", source), source)
    extra = row.get(columns.input)
    if extra:
        prompt = f"{prompt}\n{_text(extra, columns.input, source)}"
    messages = [Message("user", prompt)]
    if row.get(columns.system):
        messages.insert(0, Message("system", _text(row[columns.system], columns.system, source)))
    if need_answer or columns.answer or any(name in row for name in ANSWER_NAMES):
        answer = _filled(row, columns.answer or _usual(row, ANSWER_NAMES, "answer", source), source)
        messages.append(Message("assistant", answer))
    return tuple(messages)


def _names(row: Mapping[str, Any]) -> str:
    some = ", ".join(name if len(name) <= 40 else short(name) for name in list(row)[:20])
    return some if len(row) <= 20 else f"{some} and {len(row) - 20} more"


def _usual(row: Mapping[str, Any], names: Sequence[str], role: str, source: str) -> str:
    found = [name for name in names if name in row]
    if len(found) != 1:
        state = "none of them is there" if not found else f"{' and '.join(found)} are both there"
        raise DataError(
            f"{source}: expected one column out of {', '.join(names)}, but {state}; name it in data.columns.{role}. "
            f"Columns of this row: {_names(row)}."
        )
    return found[0]


def _filled(row: Mapping[str, Any], column: str, source: str) -> str:
    names = re.findall(r"\{(\w+)\}", column) or [column]
    missing = [name for name in names if name not in row]
    if missing:
        raise DataError(f"{source}: no column {missing[0]!r}; columns of this row: {_names(row)}.")
    if names == [column]:
        return _text(row[column], column, source)
    return re.sub(r"\{(\w+)\}", lambda match: _text(row[match[1]], match[1], source), column)


def _text(value: Any, name: str, source: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{source}: {name} must be a non-empty text, got {short(value)}.")
    return value


def _label(row: Mapping[str, Any], columns: Columns, source: str, need_label: bool) -> Label | None:
    value = row.get(columns.label) if columns.label else None
    if value is None or value == "":
        if need_label:
            raise DataError(f"{source}: a label is needed here; give column {columns.label!r}.")
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{source}: a label is a name such as ALLOW, got {short(value)}; if the column means something else, "
            "set data.columns.label to null."
        )
    try:
        return parse_label(value)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _group(row: Mapping[str, Any], columns: Columns, source: str) -> str:
    value = row.get(columns.group) if columns.group else None
    return "" if value is None or value == "" else _text(value, str(columns.group), source)
