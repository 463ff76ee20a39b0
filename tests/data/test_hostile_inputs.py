"""Every named hostile input is refused by name, place and reason, in bounded time and memory, and runs nothing."""

import sys

import pytest

from so8t_torch import cli
from so8t_torch.core.errors import DataError
from so8t_torch.data.lines import FileError, Limits, Lines
from tests.faults import hostile, hostile_models, hostile_rows, hostile_settings

CASES = [*hostile_rows.CASES, *hostile_settings.CASES, *hostile_models.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_a_hostile_input_is_refused_with_its_reason(tmp_path, case):
    path = case.make(tmp_path)
    assert hostile.fault(case.kind, path, case.says) is None
    assert not (tmp_path / "executed").exists()


def test_every_case_has_a_name_of_its_own():
    assert len({case.name for case in CASES}) == len(CASES) > 60


def busy(_path):
    while True:
        sum(range(1000))


def hungry(path):
    kept = bytes(100)
    raise DataError(f"{path}: {len(kept * 100_000)} bytes")


@pytest.mark.parametrize(
    ("reader", "finding"),
    [
        (busy, "processor time is used up"),
        (hungry, "bytes of memory, expected at most"),
        (lambda path: path.read_text(), "UnicodeDecodeError came out"),
        (lambda path: str(path), "it was read, expected an error"),
        (lambda path: (_ for _ in ()).throw(DataError(f"{path}: {'x' * 5000}")), "an error of 5"),
        (lambda _: (_ for _ in ()).throw(DataError("bad file")), "expected an error that says"),
    ],
    ids=["time", "memory", "another error", "silence", "an endless text", "another reason"],
)
def test_the_judge_finds_a_reader_that_fails(tmp_path, monkeypatch, reader, finding):
    monkeypatch.setitem(hostile.READERS, "planted", (reader, 1000))
    monkeypatch.setattr(hostile, "SECONDS", 0.1)
    (tmp_path / "a.txt").write_bytes(b"\xff")
    assert finding in hostile.fault("planted", tmp_path / "a.txt", r"a\.txt: ")


@pytest.mark.parametrize(
    ("change", "lines"), [(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n', 2), (b"", 1)], ids=["grows", "shrinks"]
)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change, lines):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n')
    with path.open("rb", buffering=0) as handle:
        found = Lines(handle, path, Limits())
        next(found)
        path.write_bytes(change)
        with pytest.raises(FileError, match=rf"rows\.jsonl:{lines}: the size of the file changed while it was read"):
            list(found)


def test_the_command_prints_one_line_and_no_traceback(tmp_path, monkeypatch, capsys):
    path = hostile_settings.CASES[1].make(tmp_path)
    monkeypatch.setattr(sys, "argv", ["so8t", "train", str(path), "--print-config"])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith(f"error: {path}: line 4: more than 2000 values")
    assert text.count("\n") == 1
