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

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from so8t_torch.core.config import Section
from so8t_torch.core.errors import DataError
from so8t_torch.data.labels import Label, parse_label

MAX_LINE_BYTES = 1 << 20
MAX_DEPTH = 32
PROMPT_NAMES = ("prompt", "instruction", "question")
ANSWER_NAMES = ("answer", "output", "completion", "response")
ROLES = ("system", "user", "assistant")


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


def read_records(
    path: str | Path,
    columns: Columns | None = None,
    *,
    need_answer: bool = True,
    need_label: bool = False,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> list[Record]:
    """Read every record of a ``.jsonl`` or ``.csv`` file.

    Args:
        path: the file; the suffix decides the format.
        columns: which column holds what; the usual names by default.
        need_answer: whether each conversation must end with an assistant turn.
        need_label: whether each record must carry a label.
        max_line_bytes: longest physical line accepted.

    Raises:
        DataError: ``file:line: reason`` for the first row that breaks the contract, or a file without records.
    """
    path = Path(path)
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: expected a .jsonl or .csv file; convert it or rename it.")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of a regular JSONL or CSV file.")
    columns = columns or Columns()
    rows = readers[path.suffix.lower()](path, max_line_bytes)
    records = [_record(row, columns, source, need_answer, need_label) for source, row in rows]
    if not records:
        raise DataError(f"{path}: the file holds no records.")
    return records


def _lines(path: Path, max_line_bytes: int) -> Iterator[tuple[str, str]]:
    """Yield (``file:line``, text with its line end) for every physical line."""
    with path.open("rb") as handle:
        number = 0
        while raw := handle.readline(max_line_bytes + 2):
            number += 1
            source = f"{path}:{number}"
            if len(raw.rstrip(b"\r\n")) > max_line_bytes:
                raise DataError(f"{source}: the line has more than {max_line_bytes} bytes; split the record.")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield source, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{source}: not valid UTF-8 at byte {error.start}; save the file as UTF-8.") from error


def _json_rows(path: Path, max_line_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for source, line in _lines(path, max_line_bytes):
        if line.strip():
            yield source, parse_json_object(line, source)


def parse_json_object(text: str, source: str) -> dict[str, Any]:
    """Read one JSON object without duplicate keys, NaN, Infinity, deep nesting, NUL or lone surrogates.

    Raises:
        DataError: ``source: reason``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise DataError(f"{source}: key {name!r} is given twice; keep one.")
            seen.add(name)
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise DataError(f"{source}: {constant} is not a JSON number.")

    try:
        row = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise DataError(f"{source}: nested deeper than {MAX_DEPTH} levels.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not a complete JSON object ({error.msg} at column {error.colno}).") from error
    except DataError:
        raise
    except ValueError as error:  # Python reads no integer of more than some thousand digits
        raise DataError(f"{source}: a number has too many digits to be read ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected a JSON object, got a {type(row).__name__}.")
    _check_values(row, source)
    return row


def _check_values(row: Mapping[str, Any], source: str) -> None:
    waiting: list[tuple[Any, int]] = [(row, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise DataError(f"{source}: nested deeper than {MAX_DEPTH} levels.")
        if isinstance(value, str):
            _check_text(value, source)
        elif isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{source}: a number is too large to be finite.")
        elif isinstance(value, dict):
            waiting += [(part, depth + 1) for item in value.items() for part in item]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]


def _check_text(text: str, source: str) -> None:
    if "\x00" in text:
        raise DataError(f"{source}: a text contains the NUL character.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{source}: a text contains a lone surrogate, which is not a character.")


def _csv_rows(path: Path, max_line_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader((line for _, line in _lines(path, max_line_bytes)), strict=True)
    header: list[str] | None = None
    while True:
        source = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{source}: not readable as CSV ({error}).") from error
        if not cells:
            continue
        for cell in cells:
            _check_text(cell, source)
        if header is None:
            header = _csv_header(cells, source)
        elif len(cells) != len(header):
            raise DataError(f"{source}: expected {len(header)} columns as in the header, got {len(cells)}.")
        else:
            yield source, dict(zip(header, cells, strict=True))


def _csv_header(cells: list[str], source: str) -> list[str]:
    if len(set(cells)) != len(cells) or not all(cells):
        raise DataError(f"{source}: the header needs one distinct non-empty name per column, got {cells}.")
    return cells


def _record(row: Mapping[str, Any], columns: Columns, source: str, need_answer: bool, need_label: bool) -> Record:
    messages = _messages(row, columns, source) if columns.messages in row else _turns(row, columns, source, need_answer)
    if need_answer and messages[-1].role != "assistant":
        raise DataError(f"{source}: the conversation must end with an assistant turn to learn from.")
    return Record(messages, _label(row, columns, source, need_label), _group(row, columns, source), source)


def _messages(row: Mapping[str, Any], columns: Columns, source: str) -> tuple[Message, ...]:
    turns = row[columns.messages]
    if isinstance(turns, str):  # a CSV cell
        turns = parse_json_object(f'{{"turns": {turns}}}', source)["turns"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{source}: {columns.messages!r} must be a list of turns, got {type(turns).__name__}.")
    messages = tuple(_message(turn, source) for turn in turns)
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)):
        raise DataError(f"{source}: turns must alternate user, assistant after an optional system turn, got {roles}.")
    return messages


def _message(turn: Any, source: str) -> Message:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        raise DataError(f"{source}: a turn is an object with the keys role and content, got {turn!r:.80}.")
    if turn["role"] not in ROLES:
        raise DataError(f"{source}: unknown role {turn['role']!r}; expected one of {', '.join(ROLES)}.")
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


def _usual(row: Mapping[str, Any], names: Sequence[str], role: str, source: str) -> str:
    found = [name for name in names if name in row]
    if len(found) != 1:
        state = "none of them is there" if not found else f"{' and '.join(found)} are both there"
        raise DataError(
            f"{source}: expected one column out of {', '.join(names)}, but {state}; name it in data.columns.{role}. "
            f"Columns of this row: {', '.join(row)}."
        )
    return found[0]


def _filled(row: Mapping[str, Any], column: str, source: str) -> str:
    names = re.findall(r"\{(\w+)\}", column) or [column]
    missing = [name for name in names if name not in row]
    if missing:
        raise DataError(f"{source}: no column {missing[0]!r}; columns of this row: {', '.join(row)}.")
    if names == [column]:
        return _text(row[column], column, source)
    return re.sub(r"\{(\w+)\}", lambda match: _text(row[match[1]], match[1], source), column)


def _text(value: Any, name: str, source: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{source}: {name} must be a non-empty text, got {value!r:.80}.")
    return value


def _label(row: Mapping[str, Any], columns: Columns, source: str, need_label: bool) -> Label | None:
    value = row.get(columns.label) if columns.label else None
    if value is None or value == "":
        if need_label:
            raise DataError(f"{source}: a label is needed here; give column {columns.label!r}.")
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{source}: a label is a name such as ALLOW, got {value!r}; if the column means something else, "
            "set data.columns.label to null."
        )
    try:
        return parse_label(value)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _group(row: Mapping[str, Any], columns: Columns, source: str) -> str:
    value = row.get(columns.group) if columns.group else None
    return "" if value is None or value == "" else _text(value, str(columns.group), source)
