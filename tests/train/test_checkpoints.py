"""Publishing, choosing and removing checkpoints, on folders of a few bytes."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest

from so8t_torch.core.errors import CheckpointError
from so8t_torch.train import checkpoints, manifest, rollback
from so8t_torch.train.checkpoints import Expected
from so8t_torch.train.manifest import Health, Manifest
from so8t_torch.train.rollback import Recovery, RollbackRequested, read_recovery
from tests.faults.damage import damage

HEALTHY = Health(finite_parameters=True, finite_moments=True)


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Leave it to the system when it writes to the disk; no process dies here."""
    for module in (manifest, checkpoints):
        monkeypatch.setattr(module, "sync", Path.exists)


def publish(folder, step, health=HEALTHY, **fields):
    waiting = checkpoints.waiting_folder(folder, step, 7)
    waiting.mkdir(parents=True)
    (waiting / "weights").write_bytes(random.Random(step).randbytes(40))
    (waiting / "state.json").write_text(json.dumps({"step": step}))
    return checkpoints.publish(waiting, Manifest(step=step, config_hash="c", versions={}, health=health, **fields))


def names(folder):
    return sorted((path.name for path in folder.iterdir()), key=lambda name: (len(name), name))


def test_a_published_checkpoint_verifies(tmp_path):
    folder = publish(tmp_path, 3, position=12, skipped=[(1, 4)])
    assert folder == tmp_path / "checkpoint-3"
    found = checkpoints.verify(folder)
    assert set(found.files) == {"weights", "state.json"}
    assert (found.step, found.position, found.skipped, found.health) == (3, 12, [(1, 4)], HEALTHY)
    assert names(tmp_path) == ["checkpoint-3"]


def test_the_youngest_by_number_is_taken_not_by_name(tmp_path):
    for step in (9, 10, 100):
        publish(tmp_path, step)
    for stray in ("checkpoint-0200", "checkpoint-2e3", "checkpoint-300.tmp-1", "checkpoint", "notes"):
        (tmp_path / stray).mkdir()
    assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoint-100", [])
    assert checkpoints.newest(tmp_path, at_most=99)[0] == tmp_path / "checkpoint-10"
    assert checkpoints.newest(tmp_path / "absent") == (None, [])


def test_a_checkpoint_under_another_name_is_another_run(tmp_path):
    publish(tmp_path, 3).rename(tmp_path / "checkpoint-9")
    with pytest.raises(CheckpointError, match="named otherwise than the step 3 inside"):
        checkpoints.verify(tmp_path / "checkpoint-9")


@pytest.mark.parametrize("field", ["finite_parameters", "finite_moments"])
def test_a_state_that_is_not_finite_is_passed_over(tmp_path, field):
    publish(tmp_path, 1)
    publish(tmp_path, 2, HEALTHY.model_copy(update={field: False}))
    found, passed_over = checkpoints.newest(tmp_path)
    assert found == tmp_path / "checkpoint-1"
    assert passed_over == [("checkpoint-2", "its parameters or optimiser moments are not finite")]


def test_nobody_rolls_back_into_a_recovery_but_a_restart_goes_on_from_it(tmp_path):
    publish(tmp_path, 1)
    publish(tmp_path, 2, HEALTHY.model_copy(update={"open_incident": True}))
    assert checkpoints.newest(tmp_path)[0] == tmp_path / "checkpoint-2"
    assert checkpoints.newest(tmp_path, calm=True)[0] == tmp_path / "checkpoint-1"


def test_other_settings_and_samples_left_out_since_are_objections(tmp_path):
    publish(tmp_path, 1, position=4)
    publish(tmp_path, 2, position=8)
    publish(tmp_path, 3, position=16, skipped=[(4, 8)], rollbacks=1)
    after = Expected("c", Recovery(1, ((4, 8),)))
    assert checkpoints.newest(tmp_path, after)[0] == tmp_path / "checkpoint-3"
    found, passed_over = checkpoints.newest(tmp_path, after, at_most=2)
    assert found == tmp_path / "checkpoint-1"
    assert passed_over == [("checkpoint-2", "it learned from samples that a roll-back has since left out")]
    before_it = checkpoints.newest(tmp_path, Expected("c", Recovery()))
    assert before_it[0] == tmp_path / "checkpoint-2"
    assert before_it[1] == [("checkpoint-3", "it left out samples that the run's recovery.json does not name")]
    assert checkpoints.newest(tmp_path, Expected("d"))[1][0][1] == "it was written under other settings"


def test_a_step_done_again_replaces_its_checkpoint(tmp_path):
    (publish(tmp_path, 5) / "weights").unlink()
    publish(tmp_path, 5)
    checkpoints.verify(tmp_path / "checkpoint-5")
    assert names(tmp_path) == ["checkpoint-5"]


def test_what_a_dead_process_left_is_swept_away(tmp_path):
    publish(tmp_path, 1)
    (checkpoints.waiting_folder(tmp_path, 2, 9) / "deep").mkdir(parents=True)
    assert checkpoints.sweep(tmp_path) == ["checkpoint-2.tmp-00000009"]
    assert names(tmp_path) == ["checkpoint-1"]
    assert checkpoints.sweep(tmp_path / "absent") == []


def test_rotation_keeps_the_youngest_the_best_and_one_behind_the_horizon(tmp_path):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 2.6, 60: None}
    for step, loss in losses.items():
        publish(tmp_path, step, HEALTHY.model_copy(update={"held_out": loss}))
    assert checkpoints.rotate(tmp_path, 2, horizon=30) == ["checkpoint-10"]
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (20, 30, 40, 50, 60)]
    assert checkpoints.rotate(tmp_path, 1, best=False) == [f"checkpoint-{step}" for step in (50, 40, 30, 20)]


@pytest.mark.parametrize(("every", "keep", "horizon"), [(10, 2, 60), (7, 3, 30), (20, 1, 100), (50, 5, 100)])
def test_rotation_as_checkpoints_are_written_leaves_one_behind_the_horizon(tmp_path, every, keep, horizon):
    for step in range(every, 4 * horizon, every):
        publish(tmp_path, step)
        checkpoints.rotate(tmp_path, keep, horizon=horizon)
        there = [found for found, _ in checkpoints.present(tmp_path)]
        assert len(there) <= keep + 2
        behind = [found for found in there if found <= step - horizon]
        assert bool(behind) == (step >= horizon + every)
        assert not behind or behind[0] > step - 2 * horizon - every * (keep + 1)


def test_rotation_counts_only_what_verifies(tmp_path):
    for step in (1, 2, 3, 4):
        publish(tmp_path, step)
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step}/weights").unlink()
    assert checkpoints.rotate(tmp_path, 1) == ["checkpoint-1"]
    (tmp_path / "checkpoint-2/weights").unlink()
    assert checkpoints.rotate(tmp_path, 1) == []


def test_rotation_removes_what_a_roll_back_left_behind(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step, position=4 * step)
    rolled = Expected("c", Recovery(1, ((4, 12),)))
    publish(tmp_path, 4, position=20, skipped=[(4, 12)])
    assert checkpoints.rotate(tmp_path, 5, rolled) == ["checkpoint-3", "checkpoint-2"]
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]


def healthy(folder, broken):
    """Return the steps of the calm checkpoints that nobody damaged, judged by nothing that rotation uses."""
    steps = {checkpoints.step_of(path): path for path in folder.iterdir()}
    states = {step: json.loads((steps[step] / "MANIFEST.json").read_text()) for step in steps.keys() - broken - {None}}
    return sorted(step for step, state in states.items() if not state["health"]["open_incident"])


def one_schedule(folder, seed, monkeypatch):
    """Write, damage, rotate, and die while removing, in an order drawn from the seed."""
    source = random.Random(f"schedule {seed}")
    step, broken = 0, set()
    for _ in range(source.randint(4, 14)):
        act = source.choice(("write", "write", "incident", "damage", "rotate", "die"))
        there = healthy(folder, broken)
        if act in ("write", "incident"):
            step += source.randint(1, 40)
            health = {"open_incident": act == "incident", "held_out": source.choice((None, source.random()))}
            publish(folder, step, HEALTHY.model_copy(update=health))
        elif act == "damage" and len(there) > 1:
            chosen = source.choice(there[1:])
            broken.add(chosen)
            damage(folder / f"checkpoint-{chosen}", source.randrange(6))
        elif act != "damage":
            rotate(folder, source, act == "die", monkeypatch)
            checkpoints.sweep(folder)
            left = healthy(folder, broken)
            assert there[-1:] == left[-1:], f"schedule {seed}: of the healthy {there} rotation left {left}"


class Died(Exception):  # noqa: N818 - not an error
    pass


def rotate(folder, source, dies, monkeypatch):
    options = {"best": source.random() < 0.5, "horizon": source.choice((0, 30))}
    with monkeypatch.context() as patch, contextlib.suppress(Died):
        if dies:
            patch.setattr(shutil, "rmtree", dying(source.randint(0, 2), shutil.rmtree))
        checkpoints.rotate(folder, source.randint(1, 3), **options)


def dying(after, real):
    left = [after]

    def rmtree(path, **options):
        left[0] -= 1
        if left[0] < 0:
            raise Died
        real(path, **options)

    return rmtree


@pytest.mark.parametrize("hundred", range(10))
def test_rotation_never_removes_the_last_healthy_checkpoint(tmp_path, monkeypatch, hundred):
    for seed in range(100 * hundred, 100 * hundred + 100):
        folder = tmp_path / str(seed)
        folder.mkdir()
        one_schedule(folder, seed, monkeypatch)
        shutil.rmtree(folder)


class Extra:
    name, open_incident = "ladder", False

    def state(self):
        return {"stage": 2}


def test_a_roll_back_is_written_down_and_read_again(tmp_path):
    assert read_recovery(tmp_path) == Recovery()
    request = RollbackRequested(tmp_path / "checkpoint-3", (4, 9), "The loss grew.")
    after = Recovery(1, ((2, 4),)).after(request, [Extra()])
    assert after == Recovery(2, ((2, 9),), {"ladder": {"stage": 2}})
    (tmp_path / "recovery.json").write_text(json.dumps(after.as_json()))
    assert read_recovery(tmp_path) == after
    assert str(request) == "The loss grew. Going back to checkpoint-3, leaving out samples 4..9."


def signed(**fields):
    record = Recovery().as_json() | fields
    return json.dumps(record | {"sha256": rollback._digest({k: v for k, v in record.items() if k != "sha256"})})


def test_a_record_of_rollbacks_with_another_digit_is_damaged(tmp_path):
    after = Recovery(1, ((0, 8),), {"ladder": {"x": 0.1}})
    (tmp_path / "recovery.json").write_text(json.dumps(after.as_json()))
    assert read_recovery(tmp_path) == after
    (tmp_path / "recovery.json").write_text(json.dumps(after.as_json() | {"rollbacks": 3}))
    with pytest.raises(CheckpointError, match="its sha256 is another"):
        read_recovery(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', signed(version=1), signed(skipped=[[3]]), signed(extras=[])]
)
def test_a_damaged_record_of_roll_backs_stops_the_run(tmp_path, text):
    (tmp_path / "recovery.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"recovery\.json is damaged"):
        read_recovery(tmp_path)
