"""Named hostile configuration files."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from tests.faults.hostile import MIB, Case

SOUND = "output_dir: run\nbase: {kind: scratch}\ndata: {scenarios: {}}\ntraining: {max_steps: 1}\n"
BOMB = "\n".join(
    [
        "a: &a [x, x, x, x, x, x, x, x, x]",
        *(f"{outer}: &{outer} [{', '.join(['*' + inner] * 9)}]" for inner, outer in pairwise("abcdefghi")),
    ]
)
MERGED = "\n".join(
    [
        "a: &a {x: 1}",
        *(f"{outer}: &{outer} {{<<: [{', '.join(['*' + inner] * 9)}]}}" for inner, outer in pairwise("abcdefghi")),
    ]
)


def _yaml(content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / "run.yaml"

    return make


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "run.yaml")
    return folder / "run.yaml"


def _folder(folder: Path) -> Path:
    (folder / "run.yaml").mkdir()
    return folder / "run.yaml"


def _circle(folder: Path) -> Path:
    (folder / "run.yaml").symlink_to(folder / "run.yaml")
    return folder / "run.yaml"


def _set(line: str) -> Callable[[Path], Path]:
    return _yaml(f"{SOUND}{line}\n")


def _runs_code(tag: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return _yaml(f"{SOUND}card: {tag} ['touch {folder}/executed']\n")(folder)

    return make


CASES = [
    Case("YAML that is sound", "settings", _yaml(b"\xef\xbb\xbf" + SOUND.replace("\n", "\r\n").encode()), None),
    Case("YAML aliases that multiply", "settings", _yaml(BOMB), r"run\.yaml: line 4: more than 2000 values"),
    Case("YAML merges that multiply", "settings", _yaml(MERGED), r"run\.yaml: line \d+: .*(twice|2000 values)"),
    Case("YAML alias inside itself", "settings", _yaml("card: &a [*a]"), r"line 1: \*a stands for nothing"),
    Case("YAML alias of nothing", "settings", _set("card: *b"), r"line 5: \*b stands for nothing"),
    Case("YAML object of Python", "settings", _runs_code("!!python/object/apply:os.system"), r"line 5: tags"),
    Case("YAML module of Python", "settings", _runs_code("!!python/module:os"), r"line 5: tags"),
    Case("YAML time without end", "settings", _set("seed: !!float " + "1:" * 20_000 + "1"), r"line 5: tags"),
    Case("YAML of a megabyte", "settings", _yaml("#" * MIB), r"expected at most 65,536 bytes, got 1,048,576"),
    Case("YAML of 3,000 keys", "settings", _yaml("".join(f"k{i}: 1\n" for i in range(3000))), r"more than 2000 values"),
    Case("YAML of 20,000 lists", "settings", _yaml("card: [" + "[]," * 20_000 + "]"), r"more than 2000 values"),
    Case("YAML of 60,000 levels", "settings", _yaml("[" * 60_000), r"run\.yaml: line 1: more than .* 32 levels"),
    Case("YAML of dashes", "settings", _yaml("- " * 30_000), r"run\.yaml: line 1: more than .* 32 levels"),
    Case("YAML key of 60,000 characters", "settings", _set("k" * 60_000 + ": 1"), r"run\.yaml is not readable"),
    Case(
        "YAML value of 60,000 characters",
        "settings",
        _set("seed: " + "x" * 60_000),
        r"seed: Input should be a valid in",
    ),
    Case(
        "YAML list of wide characters", "settings", _set("card: [" + "'青😀'," * 1900 + "]"), r"card: Input should be"
    ),
    Case("YAML endless integer", "settings", _set("seed: " + "9" * 60_000), r"not readable as UTF-8 YAML"),
    Case("YAML key twice", "settings", _set("seed: 1\nseed: 2"), r"run\.yaml: line 6: key 'seed' is given twice"),
    Case("YAML unknown key", "settings", _set("sead: 1"), r"sead: unknown key; did you mean 'seed'"),
    Case("YAML list as key", "settings", _set("? [1]\n: 2"), r"line 5: a key must be a name"),
    Case("YAML list of sections", "settings", _yaml("- 1"), r"must hold a mapping of sections"),
    Case(
        "YAML two documents",
        "settings",
        _yaml(f"{SOUND}---\n{SOUND}"),
        r"not readable as UTF-8 YAML: expected a single",
    ),
    Case("YAML cut off", "settings", _set("training: {max_steps:"), r"not readable as UTF-8 YAML"),
    Case("YAML with tabs", "settings", _set("training:\n\tmax_steps: 1"), r"not readable as UTF-8 YAML"),
    Case("YAML no is a word", "settings", _set("card: no"), None),
    Case("YAML no as a number", "settings", _set("seed: no"), r"seed: Input should be a valid integer.*'no'"),
    Case("YAML 1e3 as a number", "settings", _set("seed: 1e3"), r"seed: Input should be a valid integer.*'1e3'"),
    Case("YAML 12:30 as a number", "settings", _set("seed: 12:30"), r"seed: Input should be a valid integer.*'12:30'"),
    Case("YAML not a number", "settings", _set("training: {lr: .nan}"), r"training"),
    Case("YAML UTF-16", "settings", _yaml(SOUND.encode("utf-16")), r"run\.yaml: not valid UTF-8 at byte 0"),
    Case("YAML with NUL", "settings", _set("card: a\0b"), r"not readable as UTF-8 YAML"),
    Case("YAML gzip", "settings", _yaml(b"\x1f\x8b" + b"\0" * 99), r"expected plain text, got a gzip file"),
    Case("YAML named pipe", "settings", _pipe, r"expected a regular file, got a named pipe"),
    Case("YAML folder", "settings", _folder, r"expected a regular file, got a folder"),
    Case("YAML circle of links", "settings", _circle, r"its links lead in a circle"),
    Case("YAML name of 5,000 characters", "settings", lambda folder: folder / ("a" * 5000), r"longer than the system"),
]
