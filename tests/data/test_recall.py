"""Tasks that need a memory: solved by a plain reader of the rows, at the distance that was asked for."""

import pytest
import torch

from so8t_torch.core.errors import ConfigError
from so8t_torch.data.recall import TASKS, RecallSection

ITEMS, SYMBOLS = 5, 7


def rows_of(task, distance, seed=0):
    section = RecallSection(task=task, items=ITEMS, symbols=SYMBOLS, noise=3)
    batch = section.batch(8, distance, torch.Generator().manual_seed(seed))
    return section, batch.input_ids.tolist(), batch.labels.tolist()


def kind(token):
    return ("mark", "key", "value", "noise")[0 if token == 0 else 1 + min((token - 1) // SYMBOLS, 2)]


@pytest.mark.parametrize("distance", [5, 16, 33])
def test_what_was_written_answers_every_question_of_recall(distance):
    _, rows, labels = rows_of("recall", distance)
    for row, wanted in zip(rows, labels, strict=True):
        places, nearest = {}, []
        for place, token in enumerate(row):
            if wanted[place] >= 0:
                key = row[place - 1]
                assert row[places[key] + 1] == wanted[place] == token
                nearest.append(place - 1 - places[key])
            elif kind(token) == "key" and token not in places:
                places[token] = place
        assert len(nearest) == ITEMS == len(places)
        assert min(nearest) >= distance


@pytest.mark.parametrize("task", ["copy", "selective_copy"])
@pytest.mark.parametrize("distance", [5, 16, 33])
def test_the_letters_are_asked_in_their_order(task, distance):
    _, rows, labels = rows_of(task, distance)
    for row, wanted in zip(rows, labels, strict=True):
        first, mark = (place for place, token in enumerate(row) if token == 0)
        assert first == 0
        letters = [place for place in range(mark) if kind(row[place]) == "value"]
        asked = [place for place, label in enumerate(wanted) if label >= 0]
        assert asked == list(range(mark + 1, len(row)))
        assert [row[place] for place in letters] == [row[place] for place in asked] == wanted[mark + 1 :]
        assert min(ask - 1 - letter for letter, ask in zip(letters, asked, strict=True)) >= distance


def test_the_least_distance_of_a_row_is_reached():
    _, rows, _ = rows_of("recall", 16)
    gaps = {place - row.index(token) for row in rows for place, token in enumerate(row) if kind(token) == "key"}
    assert min(gaps - {0}) == 16


@pytest.mark.parametrize("task", TASKS)
def test_rows_have_the_stated_length_and_vocabulary_and_depend_on_the_generator_alone(task):
    section, rows, labels = rows_of(task, 40)
    assert {len(row) for row in rows} == {section.length(40)}
    assert {token for row in rows for token in row} <= set(range(section.vocab_size))
    assert rows_of(task, 40)[1:] == (rows, labels)
    assert rows_of(task, 40, seed=1)[1] != rows


@pytest.mark.parametrize(
    ("section", "distance", "words"),
    [
        ({"items": 4, "task": "copy"}, 3, "a distance of 4 or more"),
        ({"items": 4}, 1, "a distance of 2 or more"),
        ({"items": 9, "symbols": 8}, 16, "as many pairs as keys"),
    ],
)
def test_impossible_rows_are_refused(section, distance, words):
    with pytest.raises(ConfigError, match=words):
        RecallSection(**section).batch(1, distance, torch.Generator())


def test_no_rows_are_refused():
    with pytest.raises(ConfigError, match="at least one row"):
        RecallSection().batch(0, 16, torch.Generator())
