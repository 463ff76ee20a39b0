"""Forty kinds of broken numbers in real training of a tiny model, and what running out of memory leads to."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from so8t_torch.core.config import dump_config, parse_config
from so8t_torch.core.failures import VRAMExhaustedError
from so8t_torch.train import building, checkpoints, run
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.detection import trainable
from so8t_torch.train.folder import RunFolder
from so8t_torch.train.guard import TrainingStopped
from so8t_torch.train.out_of_memory import fitting
from so8t_torch.train.plan import plan
from tests.faults import soak_injection
from tests.faults.disk import Fault, broken_disk
from tests.faults.injection import EXPECTED, Late, Shy, injected

FAULT, LAST = 5, 6


def tree(source, sentences, folder, **sections):
    found = {
        "output_dir": str(folder),
        "threads": 1,
        "base": {"kind": "pretrained", "path": str(source)},
        "loading": {"dtype": "float32"},
        "adapter": {"layers_to_transform": [0], "r": 2, "lora_target_modules": ["qkv_proj"]},
        "data": {"train": str(sentences), "max_length": 32},
        "penalty": {"enabled": True},
        "training": {"max_steps": LAST, "batch_size": 2, "lr": 5e-3, "gate_lr": 2e-2, "loss_chunk": 32},
        "recording": {"every_steps": 1, "progress": False, "tensorboard": False},
        "checkpoint": {"every_steps": 2, "keep": 5},
    }
    for name, value in sections.items():
        found[name] = {**found.get(name, {}), **value}
    return parse_config(TrainConfig, found)


@pytest.fixture(scope="module")
def built(tiny_source, sentences, tmp_path_factory):
    """A job that every case trains anew, from the same start."""
    config = tree(tiny_source, sentences, tmp_path_factory.mktemp("injection") / "run")
    job = building.build(config)
    start = {name: p.detach().clone() for name, p in trainable(job.model).items()}
    return config, job, start


def train(built, *callbacks, every_minutes=None, **sections):
    """Train as ``run_training`` does, but with a model that is in memory already."""
    config, job, start = built
    if sections:
        config = config.model_copy(
            update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
        )
    shutil.rmtree(config.output_dir, ignore_errors=True)
    with torch.no_grad():
        for name, p in trainable(job.model).items():
            p.copy_(start[name])
            p.grad = None
    folder = RunFolder(config.output_dir)
    folder.begin(config)
    arguments = building.training_arguments(config, folder.checkpoints)
    trainer = run._trainer(config, job, arguments, folder, callbacks)
    run._train(trainer, folder, None, every_minutes)
    return trainer


def events(built, kind):
    lines = (built[0].output_dir / "events.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == kind]


def command(place, value):
    return f"to repeat it: python -m pytest 'tests/train/test_injection.py' -k '{place} and {value}'"


@pytest.mark.parametrize(("place", "value"), EXPECTED, ids=["-".join(case) for case in EXPECTED])
def test_a_broken_number_ends_in_its_stage(built, place, value):
    expected = EXPECTED[place, value]
    with injected(place, value, {FAULT}) as injection:
        trainer = train(built, injection)
    again = command(place, value)
    assert injection.fired == [FAULT], again
    found = [(row["step"], row["stage"]) for row in events(built, "recovery")]
    assert found == ([] if expected is None else [(FAULT, expected)]), again
    assert trainer.state.global_step == LAST, again
    assert all(torch.isfinite(p).all() and p.abs().max() < 100 for p in trainable(trainer.model).values()), again
    if expected == "skip":
        assert injection.moved == [[]], again
    saved = [checkpoints.verify(path) for _, path in checkpoints.present(built[0].output_dir / "checkpoints")]
    assert [manifest.step for manifest in saved] == [6, 4, 2], again
    if expected == "rollback":
        (back,) = events(built, "rollback")
        assert (back["step"], back["checkpoint"]) == (FAULT - 1, f"checkpoint-{FAULT - 1}"), again
        assert trainer.stream.skipped == (tuple(back["skipped"]),), again
        assert back["skipped"][1] - back["skipped"][0] == 2, again


def test_the_weights_after_a_rollback_are_the_checkpoints(built):
    """The step after going back starts from the checkpoint's numbers, moments included."""

    class Look(run.Recorder):
        def on_step_begin(self, _args, state, _control, model=None, optimizer=None, **_):
            held = {
                n: (p.detach().clone(), optimizer.state[p]["exp_avg"].clone())
                for n, p in trainable(model).items()
                if p in optimizer.state
            }
            seen.append((state.global_step, held))

    seen = []
    with injected("moment", "inf", {FAULT}) as injection:
        train(built, injection, Look(RunFolder(built[0].output_dir)))
    first, second = [held for step, held in seen if step == FAULT - 1]
    for name, (weight, moment) in second.items():
        assert torch.equal(weight, first[name][0])
        broken = ~torch.isfinite(first[name][1])
        assert torch.equal(moment[~broken], first[name][1][~broken])
        assert torch.isfinite(moment).all()


def test_losses_are_compared_with_those_before_the_checkpoint(built):
    """Where a model learns fast, losses of an older checkpoint would look like spikes beside those that came later."""

    class Look(run.Recorder):
        def on_step_begin(self, _args, state, _control, **_):
            seen.append((state.global_step, len(trainers[0].guard.examination.state()["losses"])))

    seen, trainers = [], []
    look = Look(RunFolder(built[0].output_dir))
    with injected("weight", "nan", {LAST}) as injection, patch.object(run, "_train", _noting(trainers, run._train)):
        train(built, injection, look)
    assert seen == [(step, step) for step in (0, 1, 2, 3, 4, 5, 4, 5)]


def _noting(trainers, inner):
    def outer(trainer, *args):
        trainers.append(trainer)
        inner(trainer, *args)

    return outer


def test_a_dropped_step_is_in_no_log_and_the_next_ones_are_right(built):
    clean = train(built, recording={"every_steps": 3})
    with injected("loss", "nan", {2}) as injection:
        broken = train(built, injection, recording={"every_steps": 3})
    logs = [[row for row in t.state.log_history if "loss/total" in row] for t in (clean, broken)]
    assert [row["step"] for row in logs[1]] == [1, 3, 6]
    assert logs[1][0]["loss/lm"] == logs[0][0]["loss/lm"]
    assert logs[1][1]["supervised_tokens"] < logs[0][1]["supervised_tokens"]
    for row in logs[1]:
        assert row["loss/total"] == pytest.approx(row["loss/lm"] + row["loss/pet_weighted"], rel=1e-2)


def test_a_run_taken_up_after_a_dropped_step_logs_what_the_whole_run_logs(built):
    with injected("loss", "nan", {2}) as injection:
        whole = train(built, injection, recording={"every_steps": 3})
    config, job, _ = built
    config = config.model_copy(update={"recording": config.recording.model_copy(update={"every_steps": 3})})
    folder = RunFolder(config.output_dir)
    arguments = building.training_arguments(config, folder.checkpoints, first=False)
    again = run._trainer(config, job, arguments, folder, ())
    run._train(again, folder, folder.checkpoints / "checkpoint-2", None)
    both = [
        [{k: v for k, v in row.items() if "second" not in k} for row in t.state.log_history if "loss/total" in row]
        for t in (whole, again)
    ]
    assert both[0] == both[1]
    assert again.guard.ladder.state() == whole.guard.ladder.state()


def test_faults_without_end_stop_with_a_post_mortem_and_leave_the_checkpoint(built):
    with (
        injected("one_gradient", "nan", set(range(3, 30))) as injection,
        pytest.raises(TrainingStopped, match="post_mortem") as caught,
    ):
        train(built, injection, training={"max_steps": 30}, recovery={"cool_floor": 0.5, "recoveries": 2})
    assert caught.value.exit_code == 75
    stages = [row["stage"] for row in events(built, "recovery") if row["transition"] == "fault"]
    assert stages[:4] == ["skip", "clip", "cool", "rollback"]
    assert stages[-1] == "stop"
    report = json.loads((built[0].output_dir / "post_mortem.json").read_text())
    assert report["cause"] == "gradient"
    assert report["ladder"]["stopped"]
    assert {row["checkpoint"] for row in events(built, "rollback")} == {"checkpoint-2"}
    found, skipped = checkpoints.newest(built[0].output_dir / "checkpoints", calm=True)
    assert found.name == "checkpoint-2"
    assert {reason for _, reason in skipped} == {"the run was recovering from a fault"}


def test_a_state_broken_before_the_first_checkpoint_goes_back_to_the_start(built):
    with injected("weight", "nan", {2}) as injection:
        trainer = train(built, injection, checkpoint={"every_steps": 4})
    (back,) = events(built, "rollback")
    assert (back["step"], back["checkpoint"], back["skipped"]) == (1, None, [0, 4])
    assert trainer.state.global_step == LAST
    assert all(torch.isfinite(p).all() for p in trainable(trainer.model).values())


def test_a_state_that_breaks_again_and_again_before_the_first_checkpoint_stops(built):
    """However short the window of recoveries: steps that are done again make none of them older."""

    class Always(Late):
        def on_optimizer_step(self, *args, **kwargs):
            self.done = False
            super().on_optimizer_step(*args, **kwargs)

    sections = {"training": {"max_steps": 30}, "recovery": {"recoveries": 2, "recovery_window": 3}}
    with pytest.raises(TrainingStopped, match="too many recoveries") as caught:
        train(built, Always(12, math.nan), checkpoint={"every_steps": 30}, **sections)
    assert caught.value.exit_code == 75
    assert [row["checkpoint"] for row in events(built, "rollback")] == [None, None]


def test_a_full_disk_does_not_hide_why_the_run_stopped(built, capsys):
    full, records = OSError(errno.ENOSPC, "No space left"), Fault("open", errno.ENOSPC)
    with (
        broken_disk(built[0].output_dir / "events.jsonl", records),
        patch.object(run, "write_json", side_effect=full),
        injected("weight", "nan", {2}) as injection,
        pytest.raises(TrainingStopped, match="too many recoveries"),
    ):
        train(built, injection, recovery={"recoveries": 0})
    told = capsys.readouterr().err
    assert "post_mortem.json cannot be written" in told
    assert told.count("events.jsonl wait in memory") == 1


def test_a_weight_broken_by_the_last_step_is_not_saved(built):
    """The scan before the checkpoint finds it."""
    trainer = train(built, Late(LAST, math.inf))
    assert [row["cause"] for row in events(built, "recovery")] == ["parameter"]
    assert events(built, "rollback")[0]["checkpoint"] == "checkpoint-4"
    assert all(torch.isfinite(p).all() for p in trainable(trainer.model).values())
    assert checkpoints.verify(built[0].output_dir / "checkpoints/checkpoint-6").health.finite


def test_a_gate_broken_at_a_step_that_is_logged_is_rolled_back(built):
    """The log has the gate's angle, and a number that is not finite in a log ends the run."""
    trainer = train(built, Late(FAULT, math.nan, "so8t_"))
    assert [row["cause"] for row in events(built, "recovery")] == ["parameter"]
    assert trainer.state.global_step == LAST


def test_a_finite_weight_that_cannot_be_is_not_saved_when_the_clock_asks(built):
    trainer = train(built, Late(3, 1e30), every_minutes=1e-9, recording={"every_steps": 50})
    assert [(row["step"], row["cause"]) for row in events(built, "recovery")] == [(3, "parameter")]
    assert events(built, "rollback")[0]["checkpoint"] == "checkpoint-2"
    assert trainer.state.global_step == LAST


def test_a_cooled_rate_holds_for_the_step_alone(built):
    class Rates(run.Recorder):
        def on_optimizer_step(self, *_, optimizer=None, lr_scheduler=None, **__):
            seen.append((optimizer.param_groups[0]["lr"], lr_scheduler.get_last_lr()[0]))

    seen, sizes = [], []
    with injected("one_gradient", "inf", {1, 2, 3}) as injection:
        trainer = train(built, injection, Rates(RunFolder(built[0].output_dir)))
    sizes = [row["stage"] for row in events(built, "recovery")]
    assert sizes == ["skip", "clip", "cool"]
    assert all(now == planned for now, planned in seen)
    assert trainer.guard.ladder.rate == 0.5


def test_a_layer_implicated_twice_is_reset_where_that_is_allowed(built):
    class Look(run.Recorder):
        def on_optimizer_step(self, _args, state, _control, model=None, optimizer=None, **_):
            held = trainable(model)
            seen[state.global_step + 1] = (
                {name: p.detach().clone() for name, p in held.items()},
                {name for name, p in held.items() if p in optimizer.state},
            )

    seen = {}
    with injected("weight", "nan", {3, 5}) as injection:
        train(built, injection, Look(RunFolder(built[0].output_dir)), recovery={"reinitialise": True})
    rows = events(built, "recovery")
    assert [row["stage"] for row in rows] == ["rollback", "reinitialise"]
    (before, _), (after, with_moments) = seen[4], seen[5]
    reset = {name for name in after if name.startswith(rows[1]["layer"])}
    assert reset
    assert reset != set(after)
    assert all(torch.equal(after[name], built[2][name]) for name in reset), "as it was built"
    assert all(torch.equal(after[name], before[name]) for name in set(after) - reset)
    assert with_moments == set(after) - reset


def remedies(built):
    return [row["remedy"] for row in events(built, "recovery") if row["transition"] == "out of memory"]


@pytest.fixture
def shy(built):
    made = []

    def make(*args, **kwargs):
        made.append(Shy(built[1].model, *args, **kwargs))

    yield make
    for each in made:
        each.hook.remove()
    built[1].model.activation_checkpointing_disable()


@pytest.mark.parametrize(
    ("rows", "checkpointing", "times", "after", "expected"),
    [
        (1, False, 1, 2, ["free"]),
        (2, True, 10**6, 1, ["free", "checkpointing"]),
        (1, False, 10**6, 4, ["free", "checkpointing", "split"]),
    ],
    ids=["free", "checkpointing", "split"],
)
def test_memory_is_found_on_the_live_model_and_training_is_the_same(
    built, shy, rows, checkpointing, times, after, expected
):
    """Accumulation of three micro-batches, failing in the second or third: what was added up is not counted twice."""
    sections = {"training": {"accumulation": 3, "max_steps": 2}}
    clean = train(built, **sections)
    wanted = {name: p.detach().clone() for name, p in trainable(clean.model).items()}
    logged = [row["loss/lm"] for row in clean.state.log_history if "loss/lm" in row]
    shy(rows, checkpointing=checkpointing, times=times, after=after)
    trainer = train(built, **sections)
    assert remedies(built) == expected
    for name, p in trainable(trainer.model).items():
        torch.testing.assert_close(p.detach(), wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    assert [row["loss/lm"] for row in trainer.state.log_history if "loss/lm" in row] == pytest.approx(logged, rel=1e-5)


def test_memory_that_cannot_be_found_ends_in_an_error_that_says_what_fits(built, shy):
    shy(0, checkpointing=False)
    with pytest.raises(VRAMExhaustedError, match=r"one row of 2 at a time"):
        train(built)
    assert remedies(built) == ["free", "checkpointing", "split", None]


def test_what_is_said_to_fit_fits_and_the_next_larger_does_not(built):
    config = built[0].model_copy(update={"training": built[0].training.model_copy(update={"batch_size": 8})})

    def need(rows):
        section = config.training.model_copy(update={"batch_size": rows, "gradient_checkpointing": True})
        return plan(config.model_copy(update={"training": section})).total

    (said,) = fitting(config, need(2))
    assert "training.batch_size 2, data.max_length 32" in said
    assert need(4) > need(2)
    assert "no batch and length fit" in fitting(config, 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "stage"), [("learning_rate", "skip"), ("moment", "rollback")])
def test_a_fault_in_one_process_is_a_fault_in_all(tiny_source, sentences, tmp_path, place, stage):
    config = tree(tiny_source, sentences, tmp_path / "run", training={"max_steps": 4})
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "tests.faults.fault_in_one", str(path), place, "nan", "3"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [(row["step"], row["stage"]) for row in lines if row["event"] == "recovery"] == [(3, stage)]
    assert len([row for row in lines if row["event"] == "rollback"]) == (stage == "rollback")
    digests = {(tmp_path / f"run/weights-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(digests) == 1


def test_recovered_faults_cost_little(tmp_path):
    """One seed of ``python -m tests.faults.soak_injection``, which takes ten."""
    bench = soak_injection.Bench(tmp_path, 120)
    for count, bound in soak_injection.BOUNDS.items():
        outcome = bench.trial(0, count)
        assert outcome.excess <= bound, outcome
        assert max(outcome.lost) <= soak_injection.MOST_LOST, outcome
