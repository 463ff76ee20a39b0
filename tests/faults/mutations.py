"""Mutations of sound inputs: edits of bytes drawn from a seed, applied to one file of every kind that is read.

A mutant may be sound or broken; the readers must either read it or refuse it by name, within their bounds. The one
command that reproduces a mutant is printed with it: its kind and its seed say everything.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults import hostile, hostile_models, hostile_rows, hostile_settings

TOKENS = (
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\t", b" ", b'"', b"'", b"\\", b",", b":"),
    *(b"[" * 40, b"]", b"{" * 40, b"}", b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"1e3", b"9" * 5000, b"true"),
    *(b'"a": 1, "a": 2', b"\\u0000", b"\\ud800", b"../..", b"/etc/passwd", b"&a ", b"*a", b"<<: ", b"!!python/none "),
    *(b"{}", b"[]", "青😀".encode(), b"\x1f\x8b", b"\xff" * 8, b"no", b"1:2", b"%", b"---\n", b"? ", b"- ", b"| "),
)
Edit = tuple[str, int, int]


@dataclass(frozen=True)
class Seed:
    """A sound input: which reader judges it, the files of its folder, and which of them is mutated."""

    kind: str
    files: dict[str, bytes]
    mutated: str

    def write(self, folder: Path, content: bytes) -> Path:
        """Write the input with one file replaced; return the path its reader is given."""
        for name, original in self.files.items():
            (folder / name).write_bytes(content if name == self.mutated else original)
        return folder / self.mutated if len(self.files) == 1 else folder


_TURNS = b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}\n'
_CELLS = b'question,answer,label\n"a ""quoted"" one",b,ALLOW\n"two\nlines",c,REFUSE\n'
_SETTINGS = hostile_settings.SOUND + "adapter: {layers_to_transform: [0, 1], r: 4, rank_pattern: {o_proj: 2}}\n"
_ADAPTER = json.dumps({**hostile_models.ADAPTER, "r": 2, "lora_alpha": 4, "rank_pattern": {"o_proj": 3}}).encode()
_MODEL = json.dumps(hostile_models.MODEL).encode()
_HALF = hostile_models.entry(4, 8, [2, 1], "BF16")
_TWO = hostile_models.stored({"a": hostile_models.entry(), "b": _HALF, "__metadata__": {"format": "pt"}}, b"\0" * 8)
_INDEX = json.dumps({"weight_map": dict.fromkeys("ab", hostile_models.SHARD)}).encode()

SEEDS = {
    "rows": Seed("rows", {"rows.jsonl": hostile_rows.GOOD + b"\n" + _TURNS}, "rows.jsonl"),
    "cells": Seed("rows", {"rows.csv": _CELLS}, "rows.csv"),
    "settings": Seed("settings", {"run.yaml": _SETTINGS.encode()}, "run.yaml"),
    "adapter": Seed(
        "adapter",
        {"adapter_config.json": _ADAPTER, "adapter_model.safetensors": hostile_models.SOUND},
        "adapter_config.json",
    ),
    "weights": Seed("weights", {"model.safetensors": _TWO}, "model.safetensors"),
    "index": Seed(
        "folder",
        {"config.json": _MODEL, hostile_models.SHARD: _TWO, hostile_models.INDEX: _INDEX},
        hostile_models.INDEX,
    ),
    "model": Seed("folder", {"config.json": _MODEL, "model.safetensors": _TWO}, "config.json"),
}
EDITS = ("flip", "insert", "delete", "repeat", "move", "cut", "number")


def drawn(seed: int) -> list[Edit]:
    """Return one to five edits drawn from a seed."""
    source = random.Random(seed)
    return [
        (source.choice(EDITS), source.randrange(1 << 16), source.randrange(1 << 16))
        for _ in range(source.choice((1, 1, 1, 2, 3, 5)))
    ]


def mutated(content: bytes, edits: Sequence[Edit]) -> bytes:
    """Apply edits, each a name, a place and a value; both numbers are taken modulo what there is."""
    for name, place, value in edits:
        at = place % (len(content) + 1)
        head, tail = content[:at], content[at:]
        if name == "flip" and tail:
            content = head + bytes([tail[0] ^ 1 << value % 8]) + tail[1:]
        elif name == "insert":
            content = head + TOKENS[value % len(TOKENS)] + tail
        elif name == "delete":
            content = head + tail[value % 40 :]
        elif name == "repeat":
            content = head + tail[: value % 60] * (2 + value % 7) + tail
        elif name == "move":
            content = tail + head
        elif name == "cut":
            content = head
        elif name == "number" and tail:
            content = head + str(value - (1 << 15)).encode() + tail[1:]
    return content


def judged(name: str, edits: Sequence[Edit], folder: Path) -> str | None:
    """Return what is wrong with the reader's answer to a mutant, ``None`` if nothing is."""
    seed = SEEDS[name]
    path = seed.write(folder, mutated(seed.files[seed.mutated], edits))
    return hostile.fault(seed.kind, path, "", measured=False)


def command(name: str, seed: int) -> str:
    """Return the command that reads one mutant again."""
    return f"python -m tests.faults.mutations --kind {name} --seed {seed}"


def main() -> None:
    """Read one mutant and print what comes out."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--kind", choices=sorted(SEEDS), required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    seed = SEEDS[arguments.kind]
    content = mutated(seed.files[seed.mutated], drawn(arguments.seed))
    print(content)
    with tempfile.TemporaryDirectory() as folder:
        path = seed.write(Path(folder), content)
        print(hostile.READERS[seed.kind][0](path))


if __name__ == "__main__":
    main()
