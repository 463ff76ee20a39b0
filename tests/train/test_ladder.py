"""The ladder as a machine of plain numbers: its table, and properties over random histories (about five seconds)."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8t_torch.train.ladder import HARD, STATE, Cause, Fault, Ladder, Rules, Stage
from tests.drawn import steadily

SPIKE, BROKEN = Fault(Cause.SPIKE), Fault(Cause.PARAMETER, "layers.1")
SMALL = Rules(skip_window=4, probation=6, cool_steps=5, recoveries=3, recovery_window=40)
FAULTS = st.builds(Fault, st.sampled_from(Cause), st.sampled_from([None, "layers.0", "layers.1"]))
HISTORIES = st.lists(st.one_of(st.none(), st.none(), st.none(), FAULTS), max_size=150)
RULES = st.builds(
    Rules,
    skip_window=st.integers(1, 10),
    skips=st.integers(1, 4),
    probation=st.integers(1, 12),
    cool_steps=st.integers(1, 12),
    recoveries=st.integers(0, 6),
    recovery_window=st.integers(5, 100),
    reinitialise=st.booleans(),
)


def climb(ladder, *faults):
    return [ladder.observe(step, fault).stage for step, fault in enumerate(faults, 1)]


def test_the_machine_needs_no_torch():
    probe = "import sys, so8t_torch.train.ladder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_faults_in_a_row_climb_the_whole_table():
    cools = [Stage.COOL] * 4
    back = [Stage.ROLLBACK] * 4
    expected = [Stage.SKIP, Stage.CLIP, *cools, *back, Stage.STOP]
    assert climb(Ladder(Rules()), *[SPIKE] * 11) == expected


def test_the_learning_rate_halves_down_to_a_sixteenth_and_returns():
    ladder = Ladder(Rules())
    rates = [ladder.observe(step, SPIKE).rate for step in range(6)]
    assert rates == [1, 1, 0.5, 0.25, 0.125, 0.0625]
    later = [ladder.observe(step, None).rate for step in range(6, 107)]
    assert later == [0.0625] * 100 + [1.0]


def test_a_second_fault_after_the_window_is_skipped_again():
    ladder = Ladder(Rules())
    climb(ladder, SPIKE, *[None] * 19)
    assert ladder.observe(21, SPIKE).stage is Stage.SKIP
    assert ladder.observe(40, SPIKE).stage is Stage.CLIP
    assert ladder.recoveries == 1


def test_clipping_stays_on_until_the_stage_is_left():
    ladder = Ladder(SMALL)
    climb(ladder, SPIKE, SPIKE)
    clips = [ladder.observe(step, None).clip for step in range(3, 16)]
    assert clips == [True] * 5 + [False] * 8
    assert ladder.level is None


def test_probation_closes_the_incident_then_goes_down_stage_by_stage():
    rows = []
    ladder = Ladder(SMALL, rows.append)
    climb(ladder, *[SPIKE] * 3, *[None] * 30)
    told = [(row["clock"], row["transition"], row["level"]) for row in rows[3:]]
    assert told == [
        (9, "learning rate returned", "cool"),
        (9, "incident closed", "clip"),
        (15, "one stage down", "skip"),
        (21, "one stage down", None),
    ]


@pytest.mark.parametrize("cause", sorted(HARD - {Cause.FROZEN}))
def test_a_fault_of_the_state_rolls_back_at_once_and_leaves_the_soft_stages_untried(cause):
    ladder = Ladder(Rules())
    assert climb(ladder, Fault(cause, "layers.0"), *[None] * 30, SPIKE) == [Stage.ROLLBACK, *[None] * 30, Stage.SKIP]


def test_a_broken_frozen_weight_stops():
    assert climb(Ladder(Rules()), None, Fault(Cause.FROZEN)) == [None, Stage.STOP]


def test_the_same_layer_twice_is_reset_only_where_that_is_allowed():
    assert climb(Ladder(Rules(reinitialise=True)), BROKEN, BROKEN) == [Stage.ROLLBACK, Stage.REINITIALISE]
    assert climb(Ladder(Rules()), BROKEN, BROKEN) == [Stage.ROLLBACK] * 2
    other = Fault(Cause.PARAMETER, "layers.0")
    assert climb(Ladder(Rules(reinitialise=True)), BROKEN, other) == [Stage.ROLLBACK] * 2


def test_a_soft_fault_that_survives_the_rollback_resets_its_layer():
    stubborn = Fault(Cause.GRADIENT, "layers.0")
    assert climb(Ladder(Rules(reinitialise=True)), *[stubborn] * 8)[-2:] == [Stage.ROLLBACK, Stage.REINITIALISE]


def test_too_many_recoveries_stop_for_good():
    ladder = Ladder(Rules())
    assert climb(ladder, *[BROKEN] * 6) == [Stage.ROLLBACK] * 5 + [Stage.STOP]
    assert ladder.observe(7, None).stage is Stage.STOP
    assert ladder.observe(8, None).drop


def test_recoveries_far_apart_never_stop():
    ladder = Ladder(Rules())
    stages = climb(ladder, *([BROKEN] + [None] * 249) * 20)
    assert stages.count(Stage.ROLLBACK) == 20
    assert Stage.STOP not in stages


def test_no_recoveries_allowed_stops_at_the_first_fault():
    assert climb(Ladder(Rules(recoveries=0)), None, SPIKE) == [None, Stage.STOP]


def test_a_record_says_what_happened():
    rows = []
    ladder = Ladder(Rules(), rows.append)
    ladder.observe(7, Fault(Cause.GRADIENT, "layers.0.o_proj", "3 of 8 numbers are not finite"), samples=[12, 14])
    assert rows == [
        {
            "transition": "fault",
            "step": 7,
            "clock": 1,
            "stage": "skip",
            "came_from": None,
            "level": "skip",
            "cause": "gradient",
            "layer": "layers.0.o_proj",
            "detail": "3 of 8 numbers are not finite",
            "rate": 1.0,
            "recoveries": 1,
            "samples": [12, 14],
        }
    ]


@given(RULES, HISTORIES)
@steadily
def test_every_history_obeys_the_rules(rules, history):
    rows = []
    ladder = Ladder(rules, rows.append)
    counted = []
    for step, fault in enumerate(history):
        was_open, told = ladder.open_incident, len(rows)
        decision = ladder.observe(step, fault)
        if decision.stage is Stage.STOP:
            break
        assert decision.drop == (decision.stage is not None) == (fault is not None)
        assert decision.rate in (1, 0.5, 0.25, 0.125, 0.0625)
        if fault is None:
            continue
        assert [row["transition"] for row in rows[told:]].count("fault") == 1
        assert ladder.open_incident
        if fault.cause in HARD:
            assert decision.stage >= Stage.ROLLBACK
        if decision.stage is Stage.REINITIALISE:
            assert rules.reinitialise
            assert fault.layer is not None
            assert fault.cause in STATE or ladder.level >= Stage.ROLLBACK
        if not was_open or decision.stage >= Stage.ROLLBACK:
            counted.append(step)
        recent = [at for at in counted if step - at < rules.recovery_window]
        assert len(recent) == ladder.recoveries <= rules.recoveries
    json.dumps(rows, allow_nan=False)


@given(RULES, HISTORIES)
@steadily
def test_health_forgets_everything_but_the_time(rules, history):
    ladder = Ladder(rules)
    stages = climb(ladder, *history)
    if Stage.STOP in stages:
        return
    longest = max(6 * rules.probation, rules.recovery_window, rules.cool_steps, rules.skip_window) + 1
    climb(ladder, *[None] * longest)
    fresh = Ladder(rules)
    now = {**ladder.state(), "clock": 0, "anchor": 0, "cool_until": 0}
    assert now == fresh.state()


@given(RULES, HISTORIES, st.integers(0, 150))
@steadily
def test_a_ladder_taken_up_again_goes_on_the_same(rules, history, cut):
    whole = Ladder(rules)
    stages = climb(whole, *history)
    first, second = Ladder(rules), Ladder(rules)
    before = climb(first, *history[:cut])
    second.load(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert before + climb(second, *history[cut:]) == stages
    assert second.state() == whole.state()


@given(st.lists(st.sampled_from(list(Cause)).map(Fault), min_size=13, max_size=40))
@steadily
def test_faults_without_end_always_stop(causes):
    assert Stage.STOP in climb(Ladder(Rules()), *causes)
