"""A run that is killed at any moment and gone on with equals the run that nobody disturbed, bit for bit."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from so8t_torch.core.errors import CheckpointError, ConfigError
from so8t_torch.train import checkpoint_state, checkpoints
from so8t_torch.train.manifest import NAME
from so8t_torch.train.run import run_training
from so8t_torch.train.trainer import SO8TTrainer
from tests.faults import kills
from tests.faults.kills import Count, differences, disturbed, trace, undisturbed

CELLS = {
    "nothing": ((), 1),
    "everything": (kills.FACTORS, 3),
    "dropout, nf4": (("dropout", "nf4", "mid_epoch"), 2),
    "accumulation, ramp": (("accumulation", "ramp"), 1),
    "checkpointing, ramp": (("checkpointing", "ramp", "mid_epoch"), 2),
    "lora alone": (("lora", "dropout", "accumulation"), 1),
}


@pytest.mark.parametrize("name", CELLS)
def test_kills_change_no_bit(zygote, tiny_source, sentences, tmp_path, name):
    cell, wanted = CELLS[name]
    quiet = undisturbed(zygote, kills.settings(cell, tiny_source, sentences, tmp_path / "quiet"))
    source, count = random.Random(f"kills {name}"), Count()
    for trial in range(20):
        config = kills.settings(cell, tiny_source, sentences, tmp_path / str(trial))
        disturbed(zygote, config, quiet, source, wanted - count.kills, count)
        differing = differences(quiet.trace, trace(config.output_dir))
        assert not differing, f"{differing[:5]} in trial {trial}; pytest '{__file__}' -k 'kills_change and {name}'"
        assert not list(config.output_dir.glob("checkpoints/*.tmp-*"))
        if count.kills >= wanted:
            break
    assert count.kills == wanted
    assert count.inside_writes >= 0.25 * wanted


def events(folder, kind):
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in told if event["event"] == kind]


class Dies(TrainerCallback):
    """Ends a run between two steps, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, _args, state, _control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def cut_off(config, step, **options):
    with pytest.raises(KeyboardInterrupt):
        run_training(config, callbacks=[Dies(step)], **options)


@pytest.mark.parametrize("step", [5, 7])
def test_sums_between_two_log_entries_survive(settings, tmp_path, sentences, step):
    sections = {
        "training": {"max_steps": 9, "batch_size": 2, "accumulation": 2},
        "data": {"eval": str(sentences)},
        "recording": {"every_steps": 3},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 4},
    }
    whole = run_training(settings(output_dir=str(tmp_path / "whole"), **sections))
    cut_off(settings(**sections), step)
    resumed = run_training(settings(**sections), resume="auto")
    assert not differences(trace(whole.directory), trace(resumed.directory))


def test_a_run_cut_off_before_its_first_checkpoint_begins_again(settings, tmp_path):
    sections = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 3}}
    whole = run_training(settings(output_dir=str(tmp_path / "whole"), **sections))
    cut_off(settings(**sections), 2)
    resumed = run_training(settings(**sections), resume="auto")
    assert events(resumed.directory, "resume")[0]["checkpoint"] is None
    assert not differences(trace(whole.directory), trace(resumed.directory))


def test_a_finished_run_is_gone_on_with_without_a_step(settings, monkeypatch):
    sections = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 2}}
    before = trace(run_training(settings(**sections)).directory)
    monkeypatch.setattr(SO8TTrainer, "training_step", None)
    again = run_training(settings(**sections), resume="auto")
    assert again.steps == 4
    assert not differences(before, trace(again.directory))


def test_a_state_larger_than_any_run_writes_is_refused(settings, monkeypatch):
    sections = {"training": {"max_steps": 2}, "checkpoint": {"every_steps": 2}}
    run_training(settings(**sections))
    monkeypatch.setattr(checkpoint_state, "MAX_JSON_BYTES", 100)
    with pytest.raises(CheckpointError, match=r"checkpoint-2/trainer_state\.json: expected at most 100 bytes, got"):
        run_training(settings(**sections), resume="auto")


def test_half_a_line_of_a_record_is_cut_off(settings):
    sections = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 2}}
    directory = run_training(settings(**sections)).directory
    shutil.rmtree(directory / "checkpoints/checkpoint-4")
    whole = trace(directory)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (directory / name).open("a") as handle:
            handle.write('{"step": 4, "kind": "tr')
    resumed = run_training(settings(**sections), resume="auto")
    assert not differences(whole, trace(resumed.directory))
    assert len(events(directory, "resume")) == 1


def test_other_samples_are_refused(settings, tmp_path, sentences):
    data = tmp_path / "data.jsonl"
    lines = sentences.read_text().splitlines(keepends=True)
    data.write_text("".join(lines))
    sections = {"training": {"max_steps": 2}, "checkpoint": {"every_steps": 2}, "data": {"train": str(data)}}
    run_training(settings(**sections))
    data.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(CheckpointError, match="learned from 6 samples, and these 6 are not the same"):
        run_training(settings(**sections), resume="auto")


def test_a_checkpoint_of_other_settings_is_refused_by_its_name_too(settings, tmp_path):
    sections = {"training": {"max_steps": 2}, "checkpoint": {"every_steps": 2}}
    checkpoint = run_training(settings(**sections)).directory / "checkpoints/checkpoint-2"
    other = settings(output_dir=str(tmp_path / "other"), training={"max_steps": 2, "lr": 1e-3})
    with pytest.raises(ConfigError, match="written under other settings; a resumed run keeps its settings"):
        run_training(other, resume=str(checkpoint))
    assert not other.output_dir.exists()


def test_another_number_of_processes_is_refused(settings):
    sections = {"training": {"max_steps": 2}, "checkpoint": {"every_steps": 2}}
    directory = run_training(settings(**sections)).directory
    folder = directory / "checkpoints/checkpoint-2"
    of_two = checkpoints.verify(folder).model_copy(update={"processes": 2})
    (folder / NAME).write_bytes(of_two.spelled())
    with pytest.raises(CheckpointError, match="written by 2 processes, and 1 train now"):
        run_training(settings(**sections), resume="auto")


def test_a_full_disk_leaves_the_checkpoints_before_and_nothing_half_written(settings, monkeypatch):
    sections = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 2}}
    real = checkpoint_state.write_packed

    def full(folder, name, *rest):
        if "checkpoint-4" in folder.name:
            raise OSError(28, "No space left on device")
        real(folder, name, *rest)

    monkeypatch.setattr(checkpoint_state, "write_packed", full)
    with pytest.raises(CheckpointError, match=r"step 4 cannot be written .*No space left"):
        run_training(settings(**sections))
    folder = settings().output_dir / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    checkpoints.verify(folder / "checkpoint-2")


class Poison(TrainerCallback):
    """Puts a NaN behind the last step's guards and before its checkpoint."""

    def __init__(self, where):
        self.where = where

    def on_log(self, _args, state, _control, model=None, optimizer=None, **_):
        if state.global_step == 4:
            name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad and "lora" in n)
            assert name
            target = parameter if self.where == "finite_parameters" else optimizer.state[parameter]["exp_avg"]
            target.data.view(-1)[3] = float("nan")


@pytest.mark.parametrize("where", ["finite_parameters", "finite_moments"])
def test_a_state_that_is_not_finite_is_never_written(settings, monkeypatch, where):
    told = []
    monkeypatch.setattr(SO8TTrainer, "unhealthy", lambda _, health: told.append(health))
    sections = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 2}}
    result = run_training(settings(**sections), callbacks=[Poison(where)])
    assert len(told) == 1
    assert {name for name in ("finite_parameters", "finite_moments") if not getattr(told[0], name)} == {where}
    assert [path.name for path in (result.directory / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert [event["step"] for event in events(result.directory, "checkpoint")] == [2]


def test_the_health_of_a_checkpoint_is_that_of_its_step(settings, sentences):
    sections = {
        "training": {"max_steps": 4, "accumulation": 2},
        "checkpoint": {"every_steps": 2},
        "data": {"eval": str(sentences)},
        "evaluation": {"every_steps": 4},
    }
    directory = run_training(settings(**sections)).directory
    rows = trace(directory).rows
    for step in (2, 4):
        health = checkpoints.verify(directory / f"checkpoints/checkpoint-{step}").health
        train = next(row for row in rows if row["step"] == step and row["kind"] == "train")
        assert health.grad_norm.hex() == train["grad_norm"]
        assert health.loss == pytest.approx(float.fromhex(train["loss/total"]), rel=1e-6)
        assert health.orthogonality_error.hex() == train["gate/orthogonality_error"]
        assert health.calm
    measured = next(row for row in rows if row["step"] == 4 and row["kind"] == "eval")
    assert health.held_out.hex() == measured["eval/lm"]
    assert checkpoints.verify(directory / "checkpoints/checkpoint-2").health.held_out is None


def test_a_checkpoint_loads_as_an_adapter(settings):
    from so8t_torch.adapter import load_adapter

    result = run_training(settings(training={"max_steps": 2}, checkpoint={"every_steps": 2}))
    loaded = load_adapter(result.directory / "checkpoints/checkpoint-2").eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model.eval()(ids).logits)
    left = load_file(result.directory / "adapter/adapter_model.safetensors")
    right = load_file(result.directory / "checkpoints/checkpoint-2/adapter_model.safetensors")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_optimisers_with_8_bit_moments_resume_exactly(settings, tmp_path):
    sections = {
        "training": {"max_steps": 6, "optimiser": "adamw_8bit"},
        "adapter": {"r": 64},
        "checkpoint": {"every_steps": 2},
    }
    whole = run_training(settings(output_dir=str(tmp_path / "whole"), **sections))
    state = checkpoint_state.read_state(whole.directory / "checkpoints/checkpoint-6", "optimiser")
    assert torch.uint8 in {t.dtype for s in state["state"].values() for t in tensors(s)}
    cut_off(settings(**sections), 3)
    resumed = run_training(settings(**sections), resume="auto")
    assert not differences(trace(whole.directory), trace(resumed.directory))


def tensors(tree):
    for value in tree.values():
        yield from tensors(value) if isinstance(value, dict) else [value] if isinstance(value, torch.Tensor) else []
