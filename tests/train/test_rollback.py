"""Going back to a checkpoint: exactly its weights, other samples, and nothing forgotten when the process dies then."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from so8t_torch.core.errors import ConfigError
from so8t_torch.train import checkpoint_state, checkpoints
from so8t_torch.train import run as runs
from so8t_torch.train.data_order import Stream
from so8t_torch.train.ladder import Cause
from so8t_torch.train.ladder import Fault as LadderFault
from so8t_torch.train.rollback import read_recovery
from so8t_torch.train.run import run_training
from so8t_torch.train.trainer import SO8TTrainer
from tests.faults.kills import differences, trace

SECTIONS = {"training": {"max_steps": 9, "batch_size": 2}, "checkpoint": {"every_steps": 2}}


def events(folder, kind):
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in told if event["event"] == kind]


class Counter:
    """An extra that counts the micro-batches it was told of."""

    name, open_incident = "counter", False

    def __init__(self):
        self.seen, self.loaded = 0, []

    def state(self):
        return {"seen": self.seen}

    def load(self, state):
        self.loaded.append(dict(state))
        self.seen = state["seen"]


class Watched:
    """Everything a test wants to know of the trainers it makes: who asks for what, and which samples they read."""

    def __init__(self, monkeypatch):
        self.trainers, self.extras, self.read, self.weights = [], [], [], []
        self.acts = {}
        make, step = runs._trainer, SO8TTrainer.training_step

        def trainer(*arguments):
            made = make(*arguments)
            made.extras.append(Counter())
            self.trainers.append(made)
            self.extras.append(made.extras[-1])
            return made

        def training_step(made, model, inputs, *rest):
            number = len(self.read)
            self.read.append((made.state.global_step + 1, inputs["input_ids"].clone()))
            self.weights.append({n: t.clone() for n, t in checkpoint_state.model_tensors(made.model).items()})
            self.extras[-1].seen += 1
            if number in self.acts:
                self.acts.pop(number)(made)
            return step(made, model, inputs, *rest)

        monkeypatch.setattr(runs, "_trainer", trainer)
        monkeypatch.setattr(SO8TTrainer, "training_step", training_step)


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def go_back(steps_back=0):
    def act(trainer):
        request = trainer.rollback("A test asks.", steps_back=steps_back)
        assert request is not None
        raise request

    return act


def crash(_trainer):
    raise KeyboardInterrupt


def rows_read(watched, job_rows):
    """Return for each micro-batch its step and the indices of its rows."""
    found = []
    for step, ids in watched.read:
        rows = [[token for token in row if token] for row in ids.tolist()]
        kept = [[token for token in row.input_ids if token] for row in job_rows]
        found.append((step, [kept.index(row) for row in rows]))
    return found


def test_a_roll_back_restores_the_weights_and_reads_other_samples(settings, watched):
    from so8t_torch.train import building

    config = settings(**SECTIONS)
    # in step 6, two steps behind checkpoint-4
    watched.acts = {5: go_back()}
    result = run_training(config)
    assert result.steps == 9
    (told,) = events(result.directory, "rollback")
    assert (told["step"], told["checkpoint"], told["skipped"]) == (5, "checkpoint-4", [8, 12])
    stored = load_file(result.directory / "checkpoints/checkpoint-4/adapter_model.safetensors")
    assert all(torch.equal(watched.weights[6][name], value) for name, value in stored.items())
    assert not all(torch.equal(watched.weights[5][name], value) for name, value in stored.items())
    rows = building.build(config).rows
    whole = Stream(len(rows), config.seed)
    order = []
    for epoch in range(5):
        whole.set_epoch(epoch)
        order += list(whole)
    order = [order[i : i + 2] for i in range(0, len(order), 2)]
    expected = [(step + 1, order[step]) for step in range(6)]
    # step 5 and 6 are done again, on what follows the rows of the first attempt
    expected += [(step + 1, order[step + 2]) for step in range(4, 9)]
    assert rows_read(watched, rows) == expected


def test_what_an_extra_knows_survives_a_roll_back_and_a_restart(settings, watched):
    # micro-batches 7 and 8 are steps 5 and 6 done again; checkpoint-6 is the first that knows of the roll-back
    watched.acts = {5: go_back(), 8: crash}
    config = settings(**SECTIONS)
    with pytest.raises(KeyboardInterrupt):
        run_training(config)
    (first,) = watched.extras
    # six micro-batches, the one of the request among them, not the four of checkpoint-4
    assert first.loaded == [{"seen": 6}]
    run_training(config, resume="auto")
    assert watched.extras[1].loaded == [{"seen": 8}]


def test_a_process_that_dies_right_after_a_roll_back_goes_on_behind_it(settings, tmp_path, watched):
    config = settings(**SECTIONS)
    whole = settings(output_dir=str(tmp_path / "whole"), **SECTIONS)
    # back from step 8 past checkpoint-6 to checkpoint-4
    watched.acts = {7: go_back(steps_back=3)}
    undisturbed = run_training(whole)
    watched.read.clear()
    watched.acts = {7: go_back(steps_back=3), 8: crash}
    with pytest.raises(KeyboardInterrupt):
        run_training(config)
    there = {path.name for path in (config.output_dir / "checkpoints").iterdir()}
    assert "checkpoint-6" in there
    recovery = read_recovery(config.output_dir)
    assert (recovery.rollbacks, recovery.skipped, recovery.extras["counter"]) == (1, ((8, 16),), {"seen": 8})
    with pytest.raises(ConfigError, match=r"checkpoint-6: it learned from samples that a roll-back has"):
        run_training(config, resume=str(config.output_dir / "checkpoints/checkpoint-6"))
    resumed = run_training(config, resume="auto")
    (told,) = events(config.output_dir, "resume")
    assert told["checkpoint"].endswith("checkpoint-4")
    assert told["passed_over"] == [["checkpoint-6", "it learned from samples that a roll-back has since left out"]]
    # the state at the roll-back, not that of the older checkpoint
    assert watched.extras[-1].loaded == [{"seen": 8}]
    assert not differences(trace(undisturbed.directory), trace(resumed.directory))
    newest, passed_over = checkpoints.newest(config.output_dir / "checkpoints", None)
    assert (newest.name, passed_over) == ("checkpoint-9", [])
    assert checkpoints.verify(newest).rollbacks == 1


def test_two_roll_backs_to_one_checkpoint_leave_both_spans_out(settings, watched):
    watched.acts = {5: go_back(), 7: go_back()}
    result = run_training(settings(**SECTIONS))
    assert [event["skipped"] for event in events(result.directory, "rollback")] == [[8, 12], [12, 16]]
    assert read_recovery(result.directory).skipped == ((8, 16),)
    assert result.steps == 9


LATE = {"training": {"max_steps": 6, "batch_size": 2}, "checkpoint": {"every_steps": 4}}


def test_without_a_checkpoint_the_run_goes_back_to_its_start(settings, sentences, watched):
    """In step 2, before the first checkpoint: weights, optimiser and schedule as at step 1, and other samples."""
    config = settings(**LATE, data={"eval": str(sentences)})
    watched.acts = {1: go_back()}
    result = run_training(config)
    (told,) = events(result.directory, "rollback")
    assert (told["step"], told["checkpoint"], told["skipped"]) == (1, None, [0, 4])
    assert [step for step, _ in watched.read] == [1, 2, 1, 2, 3, 4, 5, 6]
    assert all(torch.equal(watched.weights[2][name], value) for name, value in watched.weights[0].items())
    assert not torch.equal(watched.read[0][1], watched.read[2][1])
    assert watched.extras[0].loaded == [{"seen": 2}]
    assert result.held_out_before is not None


@pytest.mark.parametrize("dies_at", [3, 4])
def test_a_process_that_dies_after_going_back_to_the_start_goes_on_there(settings, tmp_path, watched, dies_at):
    sections = {**LATE, "adapter": {"lora_dropout": 0.2}}
    watched.acts = {1: go_back()}
    undisturbed = run_training(settings(output_dir=str(tmp_path / "whole"), **sections))
    watched.read.clear()
    config = settings(**sections)
    watched.acts = {1: go_back(), dies_at: crash}
    with pytest.raises(KeyboardInterrupt):
        run_training(config)
    resumed = run_training(config, resume="auto")
    assert watched.extras[-1].loaded == [{"seen": 2}]
    assert not differences(trace(undisturbed.directory), trace(resumed.directory))


def test_checkpoints_from_before_going_back_to_the_start_do_not_stand_in_the_way(settings, tmp_path, watched):
    """The one written while an incident was open is no place to go back to; nobody can take it, so it goes."""

    def open_incident(trainer):
        trainer.guard.ladder.observe(1, LadderFault(Cause.SPIKE))

    sections = {"training": {"max_steps": 6, "batch_size": 2}, "checkpoint": {"every_steps": 2}}
    watched.acts = {0: open_incident, 3: go_back()}
    undisturbed = run_training(settings(output_dir=str(tmp_path / "whole"), **sections))
    assert events(undisturbed.directory, "rollback")[0]["checkpoint"] is None
    watched.read.clear()
    config = settings(**sections)
    watched.acts = {0: open_incident, 3: go_back(), 4: crash}
    with pytest.raises(KeyboardInterrupt):
        run_training(config)
    assert not checkpoints.present(config.output_dir / "checkpoints")
    resumed = run_training(config, resume="auto")
    assert not differences(trace(undisturbed.directory), trace(resumed.directory))


def test_a_roll_back_behind_a_step_leaves_out_its_batches_and_no_more(settings, watched):
    """Asked for in the middle of step 3, and after it: the same three batches of two are left out, then the next."""
    seen = []

    class After(TrainerCallback):
        def on_step_end(self, _args, state, _control, **_):
            if state.global_step == 3:
                seen.append(watched.trainers[0].rollback("A test asks.").skipped)

    watched.acts = {2: lambda trainer: seen.append(trainer.rollback("A test asks.").skipped)}
    run_training(settings(**LATE), callbacks=[After()])
    assert seen == [(0, 6), (0, 6)]


def test_where_none_is_far_enough_back_the_oldest_is_taken(settings, watched):
    seen = []
    watched.acts = {7: lambda trainer: seen.append(trainer.rollback("A test asks.", steps_back=100))}
    run_training(settings(**SECTIONS))
    assert seen[0].checkpoint.name == "checkpoint-2"
