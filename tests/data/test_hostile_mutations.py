"""Mutants of sound inputs are read or refused by name, within the readers' bounds."""

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.drawn import steadily
from tests.faults import hostile
from tests.faults.mutations import EDITS, SEEDS, command, drawn, judged, mutated
from tests.faults.soak_inputs import run

NUMBERS = st.integers(0, (1 << 16) - 1)
EDIT = st.tuples(st.sampled_from(EDITS), NUMBERS, NUMBERS)


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", SEEDS)
@settings(
    steadily,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(edits=st.lists(EDIT, min_size=1, max_size=6))
def test_a_mutant_is_read_or_refused_by_name(tmp_path, name, edits):
    assert judged(name, edits, tmp_path) is None


@pytest.mark.parametrize("name", SEEDS)
def test_what_is_mutated_is_sound_before(tmp_path, name):
    seed = SEEDS[name]
    assert hostile.fault(seed.kind, seed.write(tmp_path, seed.files[seed.mutated]), None) is None


FOUND = (
    ("settings", 2, "the error named no file"),
    ("settings", 4116, "an error of 5,306 characters repeated the value"),
    ("adapter", 685, "the error named no file"),
    ("index", 1373, "a name longer than the system allows came out as an error of the system"),
    ("index", 5939, "an error of 5,122 characters repeated the name of a tensor"),
)


@pytest.mark.parametrize(("name", "seed", "_finding"), FOUND)
def test_what_the_long_fuzz_found_stays_mended(tmp_path, name, seed, _finding):
    assert judged(name, drawn(seed), tmp_path) is None


def test_every_edit_changes_bytes_and_a_seed_always_gives_the_same():
    content = bytes(range(100))
    assert all(mutated(content, [(edit, 7, 9)]) != content for edit in EDITS)
    assert drawn(5) == drawn(5) != drawn(6)


def test_the_soak_counts_failures_and_names_their_command(monkeypatch):
    monkeypatch.setitem(hostile.READERS, "rows", (lambda path: path.read_text() and 1 / 0, 0))
    told = []
    rows = {row.figure: row for row in run(told.append, trials=2 * len(SEEDS))}
    assert rows["R20 mutants of rows"].failures == 2
    assert rows["R20 mutants of weights"].failures == 0
    assert told[0].startswith(command("rows", 0))
