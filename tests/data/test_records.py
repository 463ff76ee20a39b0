import json

import pytest

from so8t_torch.core.errors import DataError
from so8t_torch.data.labels import Label
from so8t_torch.data.records import Columns, Message, read_records

GOOD = b'{"question": "Why?", "answer": "Because.", "label": "COMPLY"}'


def written(tmp_path, content, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [GOOD, GOOD + b"\n", b"\xef\xbb\xbf" + GOOD + b"\r\n", b"\n  \n" + GOOD + b"\n\n"],
    ids=["no newline", "newline", "BOM and CRLF", "blank lines"],
)
def test_one_row_is_read_however_the_file_is_written(tmp_path, content):
    (record,) = read_records(written(tmp_path, content))
    assert record.messages == (Message("user", "Why?"), Message("assistant", "Because."))
    assert record.label is Label.ALLOW


def test_the_source_is_file_and_line(tmp_path):
    path = written(tmp_path, b"\n" + GOOD + b"\n\n" + GOOD)
    assert [record.source for record in read_records(path)] == [f"{path}:2", f"{path}:4"]


def test_messages_with_system_and_several_turns(tmp_path):
    turns = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": r, "content": c} for r, c in turns], "group": "g/1"}
    (record,) = read_records(written(tmp_path, json.dumps(row).encode()))
    assert record.messages == tuple(Message(*turn) for turn in turns)
    assert (record.label, record.group) == (None, "g/1")


def test_instruction_with_input_and_system(tmp_path):
    row = {"system": "S", "instruction": "Do", "input": "this", "output": "done"}
    (record,) = read_records(written(tmp_path, json.dumps(row).encode()))
    assert record.messages == (Message("system", "S"), Message("user", "Do\nthis"), Message("assistant", "done"))


def test_columns_may_fill_a_text(tmp_path):
    row = {"q": "Which?", "choice0": "cat", "choice1": "dog", "right": 1}
    columns = Columns(prompt="{q} 0 {choice0} 1 {choice1}", answer="Number {right}.")
    (record,) = read_records(written(tmp_path, json.dumps(row).encode()), columns)
    assert [m.content for m in record.messages] == ["Which? 0 cat 1 dog", "Number 1."]


BAD = {
    "truncated": (GOOD[:-3], "not a complete JSON object"),
    "UTF-16": ("﻿".encode() + GOOD.decode().encode("utf-16"), "not valid UTF-8"),
    "invalid UTF-8": (b'{"question": "\xff", "answer": "a"}', "not valid UTF-8 at byte 14"),
    "duplicate key": (b'{"question": "a", "question": "b", "answer": "c"}', "'question' is given twice"),
    "nested duplicate": (b'{"question": "a", "answer": "c", "x": {"k": 1, "k": 2}}', "'k' is given twice"),
    "NaN": (b'{"question": "a", "answer": "b", "x": NaN}', "NaN is not a JSON number"),
    "minus infinity": (b'{"question": "a", "answer": "b", "x": -Infinity}', "-Infinity is not"),
    "1e999": (b'{"question": "a", "answer": "b", "x": 1e999}', "too large to be finite"),
    "endless integer": (b'{"question": "a", "answer": "b", "x": ' + b"9" * 5000 + b"}", "too many digits"),
    "array": (b"[1, 2]", "expected a JSON object, got a list"),
    "raw NUL": (b'{"question": "a\x00", "answer": "b"}', "not a complete JSON object"),
    "escaped NUL": (b'{"question": "a\\u0000", "answer": "b"}', "NUL"),
    "lone surrogate": (b'{"question": "\\ud800", "answer": "b"}', "lone surrogate"),
    "BOM in the middle": (GOOD + b"\n\xef\xbb\xbf" + GOOD, "not a complete JSON object"),
    "deep": (b'{"question": "a", "answer": "b", "x": ' + b"[" * 40 + b"]" * 40 + b"}", "deeper than 32"),
    "very deep": (b'{"x": ' + b"[" * 100000 + b"]" * 100000 + b"}", "deeper than 32"),
    "no answer": (b'{"question": "a"}', "name it in data.columns.answer"),
    "two prompts": (b'{"question": "a", "prompt": "b", "answer": "c"}', "question"),
    "blank answer": (b'{"question": "a", "answer": "  "}', "answer must be a non-empty text"),
    "list answer": (b'{"question": "a", "answer": ["b"]}', "answer must be a non-empty text"),
    "unknown label": (b'{"question": "a", "answer": "b", "label": "REFUSED"}', "did you mean 'REFUSE'"),
    "number as label": (b'{"question": "a", "answer": "b", "label": 2}', "a label is a name"),
    "unknown role": (b'{"messages": [{"role": "bot", "content": "x"}]}', "unknown role 'bot'"),
    "ends with user": (b'{"messages": [{"role": "user", "content": "x"}]}', "must end with an assistant turn"),
    "two user turns": (
        b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
        "must alternate",
    ),
    "long line": (b'{"question": "' + b"a" * (1 << 20) + b'", "answer": "b"}', "more than 1048576 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_row_stops_with_file_line_and_reason(tmp_path, name):
    content, reason = BAD[name]
    path = written(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_records(path)
    line = 2 if name == "BOM in the middle" else 1
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert reason in str(caught.value)


def test_a_label_may_be_required_or_ignored(tmp_path):
    path = written(tmp_path, b'{"question": "a", "answer": "b"}')
    with pytest.raises(DataError, match="a label is needed"):
        read_records(path, need_label=True)
    odd = written(tmp_path, b'{"question": "a", "answer": "b", "label": 7}', "odd.jsonl")
    assert read_records(odd, Columns(label=None))[0].label is None


@pytest.mark.parametrize(("name", "content"), [("a.txt", GOOD), ("a.jsonl", b"\n\n"), ("a.csv", b"question,answer\n")])
def test_a_file_without_records_is_refused(tmp_path, name, content):
    with pytest.raises(DataError):
        read_records(written(tmp_path, content, name))


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match="expected a regular file, got a folder"):
        read_records(tmp_path / "rows.jsonl")


def test_csv_with_quoted_newlines_knows_its_lines(tmp_path):
    path = written(tmp_path, b'\xef\xbb\xbfquestion,answer\r\n"a\nb",c\r\n\r\nd,"e ""f"""\r\n', "rows.csv")
    first, second = read_records(path)
    assert [m.content for m in first.messages] == ["a\nb", "c"]
    assert [m.content for m in second.messages] == ["d", 'e "f"']
    assert first.source == f"{path}:2"
    assert second.source == f"{path}:5"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"question,answer\na,b,c\n", "expected 2 columns"),
        (b"question,question\na,b\n", "one distinct non-empty name"),
        (b'question,answer\n"a"x,b\n', "not readable as CSV"),
        (b'question,answer\n"a,b\n', "not readable as CSV"),
        (b"question,answer\na,\n", "non-empty text"),
    ],
)
def test_broken_csv_stops(tmp_path, content, reason):
    with pytest.raises(DataError, match=reason):
        read_records(written(tmp_path, content, "rows.csv"))


def test_real_worked_answers_are_read(shared):
    records = read_records(shared("reasoning/gsm8k_train.jsonl"))
    assert len(records) == 7473
    assert all("####" in record.messages[-1].content for record in records)


def test_real_japanese_choices_are_read(shared):
    choices = " ".join(f"{i}: {{choice{i}}}" for i in range(5))
    columns = Columns(prompt="{question} " + choices, answer="{label}", label=None)
    records = read_records(shared("reasoning/jcommonsenseqa_train.jsonl"), columns)
    assert len(records) == 8939
    assert {record.messages[-1].content for record in records} == set("01234")


@pytest.mark.parametrize("name", ["GPT4", "Claude", "llama2-7b-chat"])
def test_real_responses_with_line_breaks_in_cells_are_read(shared, name):
    assert len(read_records(shared(f"safety/do_not_answer_human_{name}.csv"))) == 939


def test_real_questions_without_answers_are_read_for_evaluation(shared):
    path = shared("safety/do_not_answer_en.csv")
    assert len(read_records(path, need_answer=False)) == 939
    with pytest.raises(DataError, match=r"do_not_answer_en\.csv:2: .*data\.columns\.answer"):
        read_records(path)
