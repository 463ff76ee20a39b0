import pytest

from so8t_torch.core.errors import DataError
from so8t_torch.data.labels import Label, leading_label, parse_label


def test_labels_are_ordered_by_severity():
    assert Label.ALLOW < Label.ESCALATE < Label.REFUSE
    assert max([Label.ESCALATE, Label.ALLOW]) is Label.ESCALATE
    assert [label.severity for label in (Label.ALLOW, Label.ESCALATE, Label.REFUSE)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("ALLOW", Label.ALLOW),
        ("comply", Label.ALLOW),
        ("ESCALATE", Label.ESCALATE),
        (" Escalation\n", Label.ESCALATE),
        ("REFUSE", Label.REFUSE),
        ("DENY", Label.REFUSE),
    ],
)
def test_every_vocabulary_found_in_old_data_is_read(name, label):
    assert parse_label(name) is label


@pytest.mark.parametrize("name", ["0", "1", "2", "", "maybe", "ALLOW REFUSE"])
def test_numbers_and_unknown_words_are_refused(name):
    with pytest.raises(DataError, match="Expected a label out of ALLOW"):
        parse_label(name)


def test_a_misspelt_label_is_answered_with_the_nearest_one():
    with pytest.raises(DataError, match="did you mean 'ESCALATE'"):
        parse_label("ESCALTE")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("REFUSE. temp: high.", Label.REFUSE),
        (" **allow**: go on", Label.ALLOW),
        ("「ESCALATE」人に確認します", Label.ESCALATE),
        ("DENY", Label.REFUSE),
        ("I would ALLOW this", None),
        ("ALLOWED", None),
        ("", None),
        ("許可", None),
    ],
)
def test_an_answer_is_read_by_its_first_word_alone(answer, label):
    assert leading_label(answer) is label
