import pytest

from so8t_torch.core.errors import ConfigError, DataError
from so8t_torch.data.chat import IGNORED, encode_records, marked_template, show_supervision
from so8t_torch.data.labels import Label
from so8t_torch.data.records import Message, Record, read_records


def conversation(*turns, **fields):
    roles = ("user", "assistant") * len(turns)
    return Record(tuple(Message(r, t) for r, t in zip(roles, turns, strict=False)), source="f:1", **fields)


def learned_text(row, tokenizer):
    return tokenizer.decode([token for token in row.labels if token != IGNORED])


def one(record, tokenizer, **options):
    rows, _ = encode_records([record], tokenizer, max_length=options.pop("max_length", 4096), **options)
    return rows[0]


CONVERSATIONS = (
    ("What is 2+2?", "It is 4."),
    ("こんにちは", "ALLOW: 水だけです。"),
    ("blank first", " then text\nand a line "),
    ("first", "one", "second", "two 🙂"),
)


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=lambda t: t[0])
def test_marks_change_no_token_of_the_real_template(phi35, turns):
    record = conversation(*turns)
    shipped = phi35.apply_chat_template([m._asdict() for m in record.messages], return_dict=True)["input_ids"]
    assert list(one(record, phi35).input_ids) == shipped


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=lambda t: t[0])
def test_exactly_the_answers_and_their_ends_are_learned(phi35, turns):
    row = one(conversation(*turns), phi35)
    end, role = phi35.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    learned = [token for token in row.labels if token != IGNORED]
    assert learned.count(end) == len(turns) // 2
    assert role not in learned
    assert phi35.eos_token_id not in learned
    said = [part.strip() for part in learned_text(row, phi35).split("<|end|>") if part]
    assert said == [turn.strip() for turn in turns[1::2]]


def test_labels_repeat_the_tokens_they_learn(tokenizer):
    row = one(conversation("Why?", "Because."), tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    assert row.labels[0] == IGNORED


def test_a_template_that_has_marks_is_left_alone():
    template = "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    assert marked_template(template) == template


@pytest.mark.parametrize("template", [None, "", "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_a_template_that_cannot_be_marked_is_refused(template):
    with pytest.raises(ConfigError, match=r"data\.template"):
        marked_template(template)


def test_a_cut_answer_is_counted_and_named(tokenizer):
    long = conversation("Why?", "Because " * 20)
    rows, report = encode_records([long, conversation("a", "b")], tokenizer, max_length=24)
    assert [len(row.input_ids) <= 24 for row in rows] == [True, True]
    assert report.truncated == ("f:1",)
    assert report.as_dict()["truncated"] == 1
    assert report.supervised == sum(row.supervised for row in rows)
    assert report.tokens == sum(len(row.input_ids) for row in rows)


def test_a_row_without_any_answer_left_is_named(tokenizer):
    with pytest.raises(DataError, match=r"^f:1: no token of an answer is left"):
        encode_records([conversation("Why? " * 40, "Because.")], tokenizer, max_length=16)


def test_too_long_rows_may_be_dropped_or_refused(tokenizer):
    both = [conversation("Why? " * 40, "Because."), conversation("a", "b")]
    rows, report = encode_records(both, tokenizer, max_length=16, too_long="drop")
    assert (len(rows), report.dropped) == (1, ("f:1",))
    with pytest.raises(DataError, match=r"^f:1: .*max_length=16"):
        encode_records(both, tokenizer, max_length=16, too_long="error")
    with pytest.raises(DataError, match="No record is left"):
        encode_records(both[:1], tokenizer, max_length=16, too_long="drop")


def test_a_control_token_in_a_text_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"^f:1: .*<\|end\|>"):
        one(conversation("ignore this <|end|> now", "no"), tokenizer)


def test_the_label_travels_with_the_row(tokenizer):
    assert one(conversation("a", "b", label=Label.REFUSE), tokenizer).label is Label.REFUSE


def test_the_learned_part_is_shown(tokenizer):
    shown = show_supervision(one(conversation("Why?", "So."), tokenizer), tokenizer, "[", "]")
    assert shown == "<|user|>Why?<|end|><|assistant|>[So.<|end|>]<|endoftext|>"


def test_real_worked_answers_encode(phi35, shared):
    records = read_records(shared("reasoning/gsm8k_train.jsonl"))[:50]
    rows, report = encode_records(records, phi35, max_length=1024)
    assert report.truncated == ()
    for record, row in zip(records, rows, strict=True):
        assert learned_text(row, phi35) == record.messages[1].content + "<|end|>"
