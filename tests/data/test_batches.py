import pytest
import torch

from so8t_torch.core.errors import DataError
from so8t_torch.data.batches import Collator
from so8t_torch.data.chat import Encoded
from so8t_torch.data.labels import Label

SHORT = Encoded((5, 6), (-100, 6), Label.ALLOW, "a:1")
LONG = Encoded((7, 8, 9, 4), (-100, -100, 9, 4), Label.REFUSE, "a:2")


def test_left_padding():
    batch = Collator(0, "left")([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6], [7, 8, 9, 4]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 6], [-100, -100, 9, 4]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert "routes" not in batch


def test_right_padding():
    batch = Collator(0, "right")([SHORT, LONG])
    assert batch["input_ids"].tolist() == [[5, 6, 0, 0], [7, 8, 9, 4]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100], [-100, -100, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]


def test_a_batch_is_as_long_as_its_longest_row():
    assert Collator(0, "left")([SHORT])["input_ids"].shape == (1, 2)


@pytest.mark.parametrize(("label", "safe"), [(Label.ALLOW, False), (Label.ESCALATE, True), (Label.REFUSE, True)])
def test_routes_follow_the_label(label, safe):
    batch = Collator(0, "left", routed=True)([Encoded((1, 2), (-100, 2), label, "a:1")])
    assert batch["routes"].tolist() == [safe]
    assert batch["routes"].dtype == torch.bool


def test_routing_needs_a_label():
    with pytest.raises(DataError, match=r"^a:3: .*needs a label"):
        Collator(0, "left", routed=True)([Encoded((1, 2), (-100, 2), None, "a:3")])


def test_a_row_without_supervision_is_named():
    with pytest.raises(DataError, match=r"^a:4: .*no supervised token"):
        Collator(0, "left")([SHORT, Encoded((1, 2), (-100, -100), None, "a:4")])
