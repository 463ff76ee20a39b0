"""Memory that runs out in a step, in the optimiser or while measuring, and runs that are taken up after that."""

import json

import pytest
import torch
from torch.optim import adam
from transformers import Trainer

from so8t_torch.core.errors import ConfigError
from so8t_torch.core.failures import VRAMExhaustedError
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer
from so8t_torch.train import run as runs
from so8t_torch.train.out_of_memory import MemoryRelief
from so8t_torch.train.run import run_training
from so8t_torch.train.trainer import SO8TTrainer
from tests.faults.injection import Shy
from tests.faults.kills import differences, trace

DROPOUT = {"adapter": {"lora_dropout": 0.2}, "training": {"max_steps": 6}, "checkpoint": {"every_steps": 2}}


def remedies(folder):
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [(row["step"], row["place"], row["remedy"]) for row in rows if row.get("transition") == "out of memory"]


@pytest.fixture
def on_each(monkeypatch):
    """Have something done to every trainer of the test once it is made."""
    acts, make = [], runs._trainer

    def trainer(*arguments):
        made = make(*arguments)
        for act in acts:
            act(made)
        return made

    monkeypatch.setattr(runs, "_trainer", trainer)
    return acts


def test_a_step_done_again_draws_the_same_dropout(settings, tmp_path, on_each):
    clean = run_training(settings(output_dir=str(tmp_path / "clean"), **DROPOUT))
    on_each.append(lambda trainer: Shy(trainer.model, 1, checkpointing=False, after=4, times=1))
    again = run_training(settings(**DROPOUT))
    assert remedies(again.directory) == [(5, "step", "free")]
    assert not differences(trace(clean.directory), trace(again.directory))


@pytest.mark.parametrize("dies_at", [5, 6])
def test_a_run_taken_up_keeps_the_remedies_and_equals_the_whole(settings, tmp_path, on_each, monkeypatch, dies_at):
    """Memory runs out in step 5, after checkpoint-4, or in step 3 before it; the process dies later."""

    def card(trainer):
        Shy(trainer.model, 1, checkpointing=True, after=2 if dies_at == 6 else 4)

    on_each.append(card)
    whole = run_training(settings(output_dir=str(tmp_path / "whole"), **DROPOUT))
    found = remedies(whole.directory)
    assert [remedy for _, _, remedy in found] == ["free", "checkpointing", "split"]
    config, step = settings(**DROPOUT), SO8TTrainer.training_step

    def dying(trainer, *arguments):
        if trainer.state.global_step + 1 == dies_at:
            raise KeyboardInterrupt
        return step(trainer, *arguments)

    monkeypatch.setattr(SO8TTrainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run_training(config)
    monkeypatch.setattr(SO8TTrainer, "training_step", step)
    # the card is as small as it was from the step on in which that showed
    on_each[:] = [small_from(found[0][0])]
    resumed = run_training(config, resume="auto")
    assert not differences(trace(whole.directory), trace(resumed.directory))
    assert remedies(resumed.directory) == found, "a run that keeps them needs none twice"


def small_from(step):
    def act(trainer):
        class Card(Shy):
            def __call__(self, *arguments):
                if trainer.state.global_step + 1 >= step:
                    super().__call__(*arguments)

        Card(trainer.model, 1, checkpointing=True)

    return act


class Full:
    """Adam's arithmetic on a card where memory runs out in one call of it; each group of parameters is a call."""

    def __init__(self, monkeypatch, call, times=1):
        self.calls, self.call, self.times, self.inner = 0, call, times, adam.adam
        monkeypatch.setattr(adam, "adam", self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.times and self.calls >= self.call:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "step"), [(1, 1), (2, 1), (3, 2)], ids=["nothing written", "half written in the first step", "later"]
)
def test_the_optimisers_step_is_taken_once_more(settings, tmp_path, monkeypatch, call, step):
    # without a warm-up, whose first step has no rate and moves nothing
    training = {"max_steps": 3, "warmup": 0.0}
    clean = run_training(settings(output_dir=str(tmp_path / "clean"), training=training))
    full = Full(monkeypatch, call)
    again = run_training(settings(training=training))
    assert full.times == 0
    assert remedies(again.directory) == [(step, "optimiser", "free")]
    assert not differences(trace(clean.directory), trace(again.directory))


def test_an_update_half_written_later_is_an_error_and_the_checkpoint_is_whole(settings, tmp_path, monkeypatch):
    sections = {"checkpoint": {"every_steps": 1}, "training": {"max_steps": 4}}
    clean = run_training(settings(output_dir=str(tmp_path / "clean"), **sections))
    # two groups of parameters: the second call of step 3
    full = Full(monkeypatch, 6)
    with pytest.raises(VRAMExhaustedError, match=r"step 3 does not fit; it may be half done.*--resume auto") as caught:
        run_training(settings(**sections))
    assert "adamw_8bit" in str(caught.value)
    assert full.times == 0
    resumed = run_training(settings(**sections), resume="auto")
    assert not differences(trace(clean.directory), trace(resumed.directory))


def test_an_optimiser_that_never_fits_ends_in_an_error_that_says_what_does(monkeypatch):
    Full(monkeypatch, 1, times=10**6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 3 << 20))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    model, rows = torch.nn.Linear(2, 2), []
    relief = MemoryRelief(model, rows.append)
    relief.what_fits = lambda limit: [f"what fits {limit >> 20} MiB"]
    optimizer = torch.optim.AdamW(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    relief.watch(optimizer, lambda: 7)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(VRAMExhaustedError, match="step 7 does not fit") as caught:
        optimizer.step()
    assert "fewer trained numbers" in str(caught.value)
    assert "what fits" not in str(caught.value), "smaller batches leave the optimiser as large as it is"
    assert [row["remedy"] for row in rows] == ["free", None]
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def narrow(rows):
    def act(trainer):
        def hook(module, _inputs, output):
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            if not module.training and hidden.shape[0] > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        trainer.model.get_base_model().model.layers[1].register_forward_hook(hook)

    return act


def test_held_out_data_are_measured_in_parts_that_fit(settings, sentences, tmp_path, on_each):
    sections = {"data": {"eval": str(sentences)}, "evaluation": {"every_steps": 2, "batch_size": 4}}
    clean = run_training(settings(output_dir=str(tmp_path / "clean"), **sections))
    on_each.append(narrow(1))
    run = run_training(settings(**sections))
    assert remedies(run.directory) == [(0, "evaluation", remedy) for remedy in ("free", "split", "split")]
    assert run.held_out_after == pytest.approx(clean.held_out_after, rel=1e-5)
    assert run.held_out_before == pytest.approx(clean.held_out_before, rel=1e-5)


def test_held_out_data_of_which_no_row_fits_end_in_an_error(settings, sentences, on_each):
    on_each.append(narrow(0))
    with pytest.raises(VRAMExhaustedError, match=r"(?s)a row of the held-out data does not fit at step 0.*max_length"):
        run_training(settings(data={"eval": str(sentences)}))


def test_lowered_ranks_are_part_of_the_state():
    model, rows = torch.nn.Sequential(AdaptiveRankSemiseparableLayer(16, max_rank=8, min_rank=2)), []
    relief = MemoryRelief(model, rows.append)
    for _ in range(3):
        relief.next(3, 2, "CUDA out of memory")
    assert [row["remedy"] for row in rows] == ["free", "split", "rank"]
    state = json.loads(json.dumps(relief.state()))
    other = torch.nn.Sequential(AdaptiveRankSemiseparableLayer(16, max_rank=8, min_rank=2))
    taken_up = MemoryRelief(other, rows.append)
    taken_up.load(state)
    assert (other[0].active_rank, taken_up.parts, taken_up.state()) == (4, 2, state)
    assert taken_up.next(3, 2, "CUDA out of memory") == "rank"
    assert other[0].active_rank == 2
    with pytest.raises(VRAMExhaustedError, match="at the smallest rank"):
        taken_up.next(3, 2, "CUDA out of memory")


def test_several_processes_try_nothing():
    """The others wait for gradients; a step taken again would be another number of exchanges."""
    rows = []
    relief = MemoryRelief(torch.nn.Linear(2, 2), rows.append, alone=False)
    relief.what_fits = lambda limit: [f"{limit} bytes"]
    with pytest.raises(VRAMExhaustedError, match="several processes"):
        relief.next(3, 2, "CUDA out of memory")
    assert rows[0]["remedy"] is None


@pytest.mark.parametrize(("times", "found"), [(1, ["free"]), (2, ["free", None])])
def test_memory_that_runs_out_while_gradients_are_clipped(settings, monkeypatch, times, found):
    clip, left = Trainer._clip_grad_norm, [times]

    def full(trainer, model):
        if trainer.state.global_step == 1 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return clip(trainer, model)

    monkeypatch.setattr(Trainer, "_clip_grad_norm", full)
    config = settings()
    if times == 1:
        run_training(config)
    else:
        with pytest.raises(VRAMExhaustedError, match=r"(?s)step 2 does not fit beside what is held.*shorter rows"):
            run_training(config)
    assert [remedy for _, _, remedy in remedies(config.output_dir)] == found


def test_a_plan_that_fails_does_not_hide_that_memory_ran_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 20, 3 << 20))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def fails(limit):
        raise ConfigError(f"no model for {limit} bytes")

    relief = MemoryRelief(torch.nn.Linear(2, 2), [].append)
    relief.what_fits = fails
    assert relief.next(3, 1, "CUDA out of memory") == "free"
    with pytest.raises(VRAMExhaustedError, match=r"so8t plan cannot tell what fits: no model for"):
        relief.next(3, 1, "CUDA out of memory")
