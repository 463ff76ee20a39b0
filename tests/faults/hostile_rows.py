"""Named hostile data files: JSONL and CSV, what they are written in, and what stands in a file's place."""

from __future__ import annotations

import gzip
import json
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.faults.hostile import FILE_CAP, MIB, Case

GOOD = b'{"question": "Why?", "answer": "Because.", "label": "ALLOW"}'
QA = b'"question": "a", "answer": "b"'


def _file(content: bytes, name: str = "rows.jsonl") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _csv(content: bytes) -> Callable[[Path], Path]:
    return _file(content, "rows.csv")


def _sparse(size: int, beginning: bytes = b"") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with (folder / "rows.jsonl").open("wb") as handle:
            handle.write(beginning)
            handle.truncate(size)
        return folder / "rows.jsonl"

    return make


def _row(extra: bytes, beginning: bytes = QA) -> Callable[[Path], Path]:
    return _file(b"{" + beginning + b", " + extra + b"}\n")


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "rows.jsonl")
    return folder / "rows.jsonl"


def _socket(folder: Path) -> Path:
    here = os.getcwd()
    os.chdir(folder)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("rows.jsonl")
    finally:
        os.chdir(here)
    return folder / "rows.jsonl"


def _directory(folder: Path) -> Path:
    (folder / "rows.jsonl").mkdir()
    return folder / "rows.jsonl"


def _link(target: str, name: str = "rows.jsonl") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def _circle(folder: Path) -> Path:
    (folder / "one.jsonl").symlink_to(folder / "two.jsonl")
    (folder / "two.jsonl").symlink_to(folder / "one.jsonl")
    return folder / "one.jsonl"


def _long_name(folder: Path) -> Path:
    return _file(GOOD, "青" * 80 + ".jsonl")(folder)


def _colliding(folder: Path) -> Path:
    (folder / "ROWS.jsonl").write_bytes(b"not rows")
    return _file(GOOD)(folder)


def _zip_bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "rows.csv", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", b"\0" * (32 * MIB))
    return folder / "rows.csv"


BOMB = gzip.compress(b"\0" * (64 * MIB), 9)
DEEP = b'"x": ' + b"[" * 5000 + b"]" * 5000
WIDE = '{{"question": "{}青😀", "answer": 1}}\n'.format("a" * 500_000).encode()
COLUMNS = json.dumps({f"column {i}": i for i in range(40_000)}).encode()

ENCODING = [
    Case("byte order mark", "rows", _file(b"\xef\xbb\xbf" + GOOD), None),
    Case("CRLF", "rows", _file(GOOD + b"\r\n" + GOOD + b"\r\n"), None),
    Case("blank lines", "rows", _file(b"\n \n\r\n" + GOOD + b"\n\n"), None),
    Case("CR alone", "rows", _file(GOOD + b"\r" + GOOD), r":1: not a complete JSON object"),
    Case("line separator inside a text", "rows", _file('{"question": "a\u2028b", "answer": "c"}'.encode()), None),
    Case("mark in the middle", "rows", _file(GOOD + b"\n\xef\xbb\xbf" + GOOD), r":2: not a complete JSON object"),
    Case("UTF-16", "rows", _file(GOOD.decode().encode("utf-16")), r":1: not valid UTF-8 at byte 0"),
    Case("UTF-32", "rows", _file(GOOD.decode().encode("utf-32")), r":1: not valid UTF-8"),
    Case("invalid UTF-8", "rows", _file(GOOD + b'\n{"question": "\xff"}'), r":2: not valid UTF-8 at byte 14"),
    Case("overlong UTF-8", "rows", _row(b'"x": "\xc0\xaf"'), r":1: not valid UTF-8"),
    Case("surrogate in UTF-8", "rows", _row(b'"x": "\xed\xa0\x80"'), r":1: not valid UTF-8"),
    Case("lone surrogate", "rows", _row(b'"x": "\\ud800"'), r":1: a text contains a lone surrogate"),
    Case("lone surrogate in a key", "rows", _row(b'"\\udfff": 1'), r":1: a text contains a lone surrogate"),
    Case("raw NUL", "rows", _row(b'"x": "\0"'), r":1: not a complete JSON object"),
    Case("escaped NUL", "rows", _row(b'"x": "\\u0000"'), r":1: a text contains the NUL character"),
    Case("zeros", "rows", _sparse(FILE_CAP // 2), r":1: the line has more than 1048576 bytes"),
]
VALUES = [
    Case("truncated last line", "rows", _file(GOOD + b"\n" + GOOD[:-9]), r":2: not a complete JSON object"),
    Case("two objects on a line", "rows", _file(GOOD + GOOD), r":1: not a complete JSON object \(Extra data"),
    Case("a list of rows", "rows", _file(b"[" + GOOD + b"]"), r":1: expected a JSON object, got a list"),
    Case("a web page", "rows", _file(b"<!DOCTYPE html>\n<html>404"), r":1: not a complete JSON object"),
    Case("a Python dictionary", "rows", _file(b"{'question': 'a'}"), r":1: not a complete JSON object"),
    Case("NaN", "rows", _row(b'"x": [1, NaN]'), r":1: NaN is not a JSON number \(in 'x\[1\]'\)"),
    Case("minus Infinity", "rows", _row(b'"x": -Infinity'), r":1: -Infinity is not a JSON number"),
    Case("1e999", "rows", _row(b'"x": 1e999'), r":1: a number is too large"),
    Case("endless integer", "rows", _row(b'"x": ' + b"9" * 500_000), r":1: a number has too many digits"),
    Case("duplicate key", "rows", _row(b'"question": "b"'), r":1: key 'question' is given twice"),
    Case(
        "duplicate key of a megabyte",
        "rows",
        _row(b", ".join([b'"' + b"k" * 400_000 + b'": 1'] * 2)),
        r":1: key 'k+\.\.\.k+' is given twice",
    ),
    Case("5,000 levels", "rows", _row(DEEP), r":1: nested deeper than 32"),
    Case("half a million levels", "rows", _row(b'"x": ' + b'{"a":' * 100_000), r":1: nested deeper than 32"),
    Case(
        "200,000 empty lists",
        "rows",
        _row(b'"x": [' + b"[]," * 200_000 + b"[]]", b'"question": "a"'),
        r":1: expected one column out of answer",
    ),
    Case("40,000 columns", "rows", _file(COLUMNS), r":1: expected one column out of prompt.* and 39980 more"),
    Case("missing label", "labelled rows", _file(b"{" + QA + b"}"), r":1: a label is needed"),
    Case("label of another type", "labelled rows", _row(b'"label": 2'), r":1: a label is a name such as ALLOW, got 2"),
    Case("label outside the set", "labelled rows", _row(b'"label": "DENIED"'), r":1: Expected a label out of ALLOW"),
    Case("label of a megabyte", "rows", _row(b'"label": "' + b"A" * 900_000 + b'"'), r":1: Expected a label out of"),
    Case("answer of another type", "rows", _file(b'{"question": "a", "answer": ["b"]}'), r":1: answer must be a non-"),
    Case("turns of another type", "rows", _file(b'{"messages": {"role": "user"}}'), r":1: 'messages' must be a list"),
]
SIZES = [
    Case("line of 30 MB", "rows", _sparse(FILE_CAP, b'{"question": "'), r":1: the line has more than 1048576 bytes"),
    Case(
        "text of 600,000 characters",
        "rows",
        _file(b'{"question": "a", "answer": "' + b"b" * 600_000 + b'"}'),
        "at most",
    ),
    Case("file of 4 GiB", "rows", _sparse(4 << 30), r"the file has 4,294,967,296 bytes, expected at most"),
    Case("a million lines", "rows", _file(b"\n" * 1_000_000), r":200001: the file has more than 200,000 lines"),
    Case(
        "small rows", "few rows", _file(b'{"question":1,"answer":2}\n' * 60_000), r"records take more than 3,145,728 by"
    ),
    Case("one wide character in each text", "rows", _file(WIDE * 30), r"records take more than 25,165,824 bytes"),
    Case("empty file", "rows", _file(b""), r"the file holds no records"),
    Case("gzip bomb", "rows", _file(BOMB), r"expected plain text, got a gzip file"),
    Case("gzip bomb with its name", "rows", _file(BOMB, "rows.jsonl.gz"), r"expected a \.jsonl or \.csv file"),
    Case("zip bomb", "rows", _zip_bomb, r"expected plain text, got a zip file"),
]
PLACES = [
    Case("folder", "rows", _directory, r"expected a regular file, got a folder"),
    Case("named pipe", "rows", _pipe, r"expected a regular file, got a named pipe"),
    Case("socket", "rows", _socket, r"rows\.jsonl: a socket, not a regular file"),
    Case("device without end", "rows", _link("/dev/zero"), r"expected a regular file, got a device"),
    Case("circle of links", "rows", _circle, r"its links lead in a circle"),
    Case("link to nothing", "rows", _link("absent"), r"no such file"),
    Case("link to a file", "rows", lambda folder: _link(str(_file(GOOD, "a.jsonl")(folder)))(folder), None),
    Case("name of 240 bytes", "rows", _long_name, None),
    Case("names that differ in case", "rows", _colliding, None),
    Case(
        "name of 5,000 characters", "rows", lambda folder: folder / ("a" * 5000 + ".jsonl"), r"longer than the system"
    ),
    Case("path of 5,000 folders", "rows", lambda folder: folder / ("a/" * 5000 + "rows.jsonl"), r"longer than the sys"),
    Case("file as folder", "rows", lambda folder: _file(GOOD)(folder) / "rows.jsonl", r"is a file and not a folder"),
    Case("path with NUL", "rows", lambda folder: f"{folder}/a\0b.jsonl", r"not a path"),
    Case("path of Windows", "rows", lambda _: r"D:\data\rows.jsonl", r"D:\\data\\rows\.jsonl: no such file"),
]
CELLS = [
    Case("CSV with mark and CRLF", "rows", _csv(b"\xef\xbb\xbfquestion,answer\r\na,b\r\n"), None),
    Case(
        "CSV quote never closed",
        "rows",
        _csv(b'question,answer\na,"b\n' + b"c,d\n" * 20_000),
        r":2: not readable as CSV",
    ),
    Case(
        "CSV row of many lines", "rows", _csv(b'question,answer\n"' + b'aaaa","\n' * 150_000), r"the row has more than"
    ),
    Case(
        "CSV cell of half a megabyte", "rows", _csv(b"question,answer\na," + b"b" * 500_000), r":2: .*field larger than"
    ),
    Case("CSV text behind a quote", "rows", _csv(b'question,answer\n"a"x,b\n'), r":2: not readable as CSV"),
    Case("CSV with too many cells", "rows", _csv(b"question,answer\na" + b",b" * 200_000), r":2: expected 2 columns"),
    Case("CSV with a name twice", "rows", _csv(b"question,question\na,b\n"), r":1: the header needs one distinct"),
    Case("CSV with 200,000 names", "rows", _csv(b"a" + b",a" * 200_000), r":1: the header needs one distinct"),
    Case("CSV header no UTF-8", "rows", _csv(b"question,\xff\na,b\n"), r":1: not valid UTF-8.*the header"),
    Case("CSV cell no UTF-8", "rows", _csv(b"question,answer\na,b\na,\xff\n"), r":3: not valid UTF-8 at byte 2"),
    Case("CSV with NUL", "rows", _csv(b"question,answer\na,\0\n"), r":2: "),
    Case("CSV turns cut off", "rows", _csv(b'messages\n"[{""role"": ""user"""\n'), r":2: not a complete JSON object"),
    Case("CSV turns with more keys", "rows", _csv(b'messages\n"[], ""x"": 1"\n'), r":2: not a complete JSON object"),
]
CASES = [*ENCODING, *VALUES, *SIZES, *PLACES, *CELLS]
