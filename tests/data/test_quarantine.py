"""Bad rows put aside: counted, written down with their reasons, and too many of them refused."""

import json

import pytest
from typer.testing import CliRunner

from so8t_torch import cli
from so8t_torch.core.errors import DataError
from so8t_torch.data.intake import ReadingSection
from so8t_torch.data.lines import Limits
from so8t_torch.data.records import read_file, read_records

GOOD = b'{"question": "Why?", "answer": "Because."}\n'
BAD = {
    b"not JSON\n": "not a complete JSON object",
    b'{"question": "\xff"}\n': "not valid UTF-8 at byte 14",
    b'{"question": "a", "question": "b"}\n': "key 'question' is given twice",
    b'{"question": "' + b"x" * 5000 + b'"}\n': "the line has more than 4096 bytes",
    b'{"question": "a"}\n': "expected one column out of answer",
}


def section(**changes):
    return ReadingSection(**{"mode": "quarantine", "limits": Limits(line_bytes=4096), "refused_share": 0.5} | changes)


def written(folder, content, name="rows.jsonl"):
    (folder / name).write_bytes(content)
    return folder / name


def refused(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_bad_rows_are_left_out_and_written_down(tmp_path):
    path = written(tmp_path, b"".join(GOOD + bad for bad in BAD) + GOOD)
    found = read_file(path, reading=section())
    assert [record.source for record in found.records] == [f"{path}:{line}" for line in (1, 3, 5, 7, 9, 11)]
    assert found.refused_file == tmp_path / "rows.jsonl.refused.jsonl"
    rows = refused(found.refused_file)
    for number, (row, (line, reason)) in enumerate(zip(rows, BAD.items(), strict=True)):
        assert row["reason"].startswith(f"{path}:{2 * number + 2}: {reason}")
        assert row["beginning"] == line[:1024].decode("utf-8", "backslashreplace")
    assert found.summary().startswith(f"{path}: 6 records from 11 lines; 5 bad rows left out, written down in ")
    assert found.summary().count("\n") == 3


def test_the_strict_mode_stops_where_quarantine_goes_on(tmp_path):
    path = written(tmp_path, GOOD + b"not JSON\n" + GOOD)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not a complete"):
        read_records(path)
    assert len(read_records(path, reading=section())) == 2
    assert not read_file(written(tmp_path, GOOD), reading=section()).refusals


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_more_than_the_share_stops(tmp_path, bad, stops):
    path = written(tmp_path, b"x\n" * bad + GOOD * (100 - bad))
    reading = ReadingSection(mode="quarantine")
    if not stops:
        assert len(read_records(path, reading=reading)) == 99
        return
    with pytest.raises(DataError, match=r"2 bad rows are more than 1\.00% of 100; .*\n.*rows\.jsonl:1: not a complete"):
        read_records(path, reading=reading)
    assert len(refused(tmp_path / "rows.jsonl.refused.jsonl")) == 2


def test_a_file_of_bad_rows_stops_long_before_its_end(tmp_path):
    path = written(tmp_path, b"x\n" * 10_000)
    with pytest.raises(DataError, match=r"101 bad rows are more than 1\.00% of 10000"):
        read_records(path, reading=ReadingSection(mode="quarantine"))


def test_blank_lines_are_no_rows_when_the_share_is_counted(tmp_path):
    path = written(tmp_path, b"\n" * 1000 + GOOD * 9 + b"x\n")
    with pytest.raises(DataError, match=r"1 bad rows are more than 1\.00% of 10;"):
        read_records(path, reading=ReadingSection(mode="quarantine"))


def test_what_concerns_the_whole_file_stops_in_quarantine_too(tmp_path):
    with pytest.raises(DataError, match="header"):
        read_records(written(tmp_path, b"a,a\n1,2\n", "rows.csv"), reading=section(refused_share=1.0))
    with pytest.raises(DataError, match="no records"):
        read_records(written(tmp_path, b"x\n"), reading=section(refused_share=1.0))
    with pytest.raises(DataError, match="more than 3 lines"):
        read_records(written(tmp_path, GOOD * 4), reading=section(limits=Limits(lines=3)))


def test_a_csv_goes_on_behind_a_bad_row(tmp_path):
    path = written(tmp_path, b'question,answer\na,b\nc\n"d\ne",f\ng,"h"i\nj,\xff\nk,l\n', "rows.csv")
    found = read_file(path, reading=section())
    assert [record.messages[0].content for record in found.records] == ["a", "d\ne", "k"]
    assert [refusal.reason.split(": ")[0] for refusal in found.refusals] == [f"{path}:{line}" for line in (3, 6, 7)]
    assert [refusal.beginning for refusal in found.refusals] == [b"c\n", b'g,"h"i\n', b"j,\xff\n"]


def test_an_older_list_of_refused_rows_does_not_stay(tmp_path):
    path = written(tmp_path, GOOD + b"x\n")
    kept = read_file(path, reading=section()).refused_file
    written(tmp_path, GOOD)
    read_file(path, reading=section())
    assert not kept.exists()


def test_the_list_may_lie_elsewhere(tmp_path):
    path = written(tmp_path, GOOD + b"x\n")
    found = read_file(path, reading=section(refused_folder=tmp_path / "aside"))
    assert found.refused_file == tmp_path / "aside/rows.jsonl.refused.jsonl"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aside", "rows.jsonl"]
    with pytest.raises(DataError, match=r"bad rows cannot be written down there .*refused_folder"):
        read_file(path, reading=section(refused_folder=path))


def test_the_command_checks_a_file(tmp_path):
    path = written(tmp_path, GOOD * 200 + b"x\n")
    done = CliRunner().invoke(cli.app, ["data", "check", str(path), "--quarantine"])
    assert done.exit_code == 0
    assert f"{path}: 200 records from 201 lines; 1 bad rows left out" in done.output
    done = CliRunner().invoke(cli.app, ["data", "check", str(path)])
    assert isinstance(done.exception, DataError)
    assert str(done.exception).startswith(f"{path}:201: ")
