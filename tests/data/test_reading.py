import ast
import inspect

import pytest

from so8t_torch.core.errors import DataError
from so8t_torch.data.docstrings import documentation_strings
from so8t_torch.data.labels import Label
from so8t_torch.data.reading import exercises
from so8t_torch.data.scenarios import ScenarioSection, scenario_records
from so8t_torch.data.wording import GLOSSARY, QUESTION


def draw(covers, **changes):
    options = {"tellings": 3, "single": 0.5, "seed": 0} | changes
    return exercises(ScenarioSection(), covers=covers, **options)


def telling(text):
    return text.rsplit("\n", 1)[0]


def test_reading_of_seen_things_shows_nothing_that_is_held_out():
    seen = {telling(e.request) for e in draw("seen", tellings=50)}
    held_out = {telling(r.messages[0].content) for r in scenario_records(ScenarioSection(), "held_out")}
    assert len(held_out) == 344
    assert seen.isdisjoint(held_out)
    assert {e.novelty for e in draw("seen")} == {"none"}
    assert {e.novelty for e in draw("all")} == {"none", "state", "frame", "both"}


def test_no_exercise_holds_a_label_or_the_triage_question():
    for exercise in draw("all"):
        text = exercise.request + exercise.notes
        assert not any(label.value in text for label in Label)
        assert not any(question in text for question in QUESTION.values())


def test_the_glossary_names_labels_without_any_fact_of_a_state():
    facts = {word for e in draw("all", single=0.0) for word in e.notes.replace(":", " ").replace(";", " ").split()}
    words = {word.strip(".,:") for line in GLOSSARY for word in line.split()}
    assert {label.value for label in Label} <= words
    assert words.isdisjoint(facts)


def test_single_questions_ask_for_one_fact_and_the_share_decides():
    assert all(";" in e.notes for e in draw("seen", single=0.0))
    assert not any(";" in e.notes for e in draw("seen", single=1.0))
    assert draw("seen") == draw("seen")


def test_documentation_strings_are_those_that_the_parser_finds(tmp_path):
    text = "A documentation string that is long enough to count as running text, because it has eighty characters."
    for number in range(60):
        (tmp_path / f"module_{number}.py").write_text(f'def f():\n    """{text} {number}"""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "captions.py").write_text('"""Short."""\n')
    train, held_out = (documentation_strings(part, tmp_path) for part in ("train", "held_out"))
    assert sorted(train + held_out) == sorted(f"{text} {number}" for number in range(60))
    assert 0 < len(held_out) < len(train)


def test_the_standard_library_gives_text_in_two_parts_that_share_nothing():
    train, held_out = (documentation_strings(part) for part in ("train", "held_out"))
    assert inspect.getdoc(ast) in train + held_out
    assert set(train).isdisjoint(held_out)
    assert len(train) > 2000
    assert len(held_out) > 60


def test_a_folder_without_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no documentation string"):
        documentation_strings("train", tmp_path)
