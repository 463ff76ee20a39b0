"""One optimiser step against the same step computed by hand on the full logits."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback

from so8t_torch.core.errors import DataError, TrainingError
from so8t_torch.train import building
from so8t_torch.train.guard import Guard, TrainingStopped
from so8t_torch.train.penalty import ResidualTap, gated_layers
from so8t_torch.train.preconditions import check_groups, check_trainable, decoder_and_head
from so8t_torch.train.sharding import prepare_sharding
from so8t_torch.train.trainer import SO8TTrainer


class Gradients(TrainerCallback):
    """Keeps every gradient as it is just before the first optimiser step, before which nothing has moved."""

    def __init__(self):
        self.found = {}
        self.rates = []

    def on_pre_optimizer_step(self, *_, model=None, optimizer=None, **__):
        self.rates.append({g["name"]: g["lr"] for g in optimizer.param_groups})
        if not self.found:
            named = ((n, p) for n, p in model.named_parameters() if p.grad is not None)
            self.found = {n: p.grad.clone() for n, p in named}


def job_and_trainer(config, tmp_path, *callbacks, mutate=None, guard=None):
    job = building.build(config)
    if mutate:
        mutate(job.model)
    arguments = building.training_arguments(config, tmp_path / "checkpoints")
    sections = (config.training, config.penalty)
    trainer = SO8TTrainer(job.model, arguments, job.rows, job.held_out, job.collator, *sections, callbacks, guard=guard)
    return job, trainer


def train(config, tmp_path, mutate=None):
    keeper = Gradients()
    job, trainer = job_and_trainer(config, tmp_path, keeper, mutate=mutate)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss/total" in row]
    return SimpleNamespace(job=job, trainer=trainer, gradients=keeper.found, rates=keeper.rates, logs=logs)


def excite(model):
    """Move every adapter number off its start, so that each has a gradient."""
    source = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=source))


WHOLE = {"max_steps": 1, "batch_size": 6, "max_grad_norm": 1e9, "loss_chunk": 16}


def by_hand(job, weight):
    """Loss of all rows in one batch: full logits, and the penalty by loops over numpy arrays of hidden states."""
    batch = job.collator(job.rows)
    job.model.train()
    out = job.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}, output_hidden_states=True)
    flat = out.logits[:, :-1].reshape(-1, out.logits.shape[-1])
    lm = functional.cross_entropy(flat, batch["labels"][:, 1:].flatten())
    layers = [out.hidden_states[i + 1] for i in (0, 1)]
    pets = [(_bend(h, batch["attention_mask"])) for h in layers]
    pet = sum(pets) / len(pets)
    return lm, pet, lm + weight * pet


def _bend(h, mask):
    terms = [
        (h[b, t + 1] - 2 * h[b, t] + h[b, t - 1]).square().mean()
        for b in range(h.shape[0])
        for t in range(1, h.shape[1] - 1)
        if mask[b, t - 1 : t + 2].tolist() == [1, 1, 1]
    ]
    return torch.stack(terms).sum() / len(terms)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_one_step_equals_the_full_computation(settings, tmp_path, checkpointing):
    config = settings(
        training={**WHOLE, "gradient_checkpointing": checkpointing},
        penalty={"enabled": True, "weights": [0.5, 0.5, 0.5]},
    )
    run = train(config, tmp_path, mutate=excite)
    job = building.build(config)
    excite(job.model)
    lm, pet, total = by_hand(job, 0.5)
    total.backward()
    log = run.logs[0]
    assert log["loss/lm"] == pytest.approx(lm.item(), rel=2e-6)
    assert log["loss/pet"] == pytest.approx(pet.item(), rel=1e-5)
    assert log["loss/pet_weighted"] == pytest.approx(0.5 * pet.item(), rel=1e-5)
    assert log["loss/total"] == pytest.approx(total.item(), rel=2e-6)
    assert log["perplexity"] == pytest.approx(math.exp(lm.item()), rel=1e-5)
    expected = {n: p.grad for n, p in job.model.named_parameters() if p.grad is not None}
    assert run.gradients.keys() == expected.keys()
    for name, gradient in run.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-4, atol=2e-7, msg=name)


def test_checkpointing_changes_no_bit(settings, tmp_path):
    both = [
        train(settings(training={**WHOLE, "gradient_checkpointing": on}), tmp_path, mutate=excite).gradients
        for on in (False, True)
    ]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 3), (1, 6), (4, 2)])
def test_accumulation_equals_one_batch(settings, tmp_path, batch_size, accumulation):
    """The rows differ in length, so means of means would show; (4, 2) has micro-batches of different size."""
    section = {"enabled": True, "weights": [1.0, 1.0, 1.0]}
    whole = train(settings(training=WHOLE, penalty=section), tmp_path, mutate=excite)
    sizes = {**WHOLE, "batch_size": batch_size, "accumulation": accumulation}
    parts = train(settings(training=sizes, penalty=section), tmp_path, mutate=excite)
    for name in ("loss/lm", "loss/pet", "loss/pet_weighted", "loss/total"):
        assert parts.logs[0][name] == pytest.approx(whole.logs[0][name], rel=2e-6), name
    for name, gradient in parts.gradients.items():
        torch.testing.assert_close(gradient, whole.gradients[name], rtol=2e-4, atol=2e-7, msg=name)


def test_both_padding_sides_give_the_same_loss(settings):
    job = building.build(settings())
    losses = []
    for side in ("left", "right"):
        collator = building.Collator(0, side)
        batch = collator(job.rows)
        out = job.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")})
        flat = out.logits[:, :-1].reshape(-1, out.logits.shape[-1])
        losses.append(functional.cross_entropy(flat, batch["labels"][:, 1:].flatten()).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_held_out_loss_is_weighted_by_tokens_not_by_batches(settings, tmp_path, sentences):
    config = settings(data={"eval": str(sentences)}, evaluation={"batch_size": 4})
    job, trainer = job_and_trainer(config, tmp_path)
    lm, _, _ = by_hand(job, 0.0)
    metrics = trainer.evaluate()
    assert metrics["eval_lm"] == pytest.approx(lm.item(), rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(lm.item()), rel=1e-5)
    assert metrics["eval_supervised_tokens"] == sum(row.supervised for row in job.rows)


def test_the_penalty_alone_reaches_gates_and_lora(settings, tmp_path):
    huge = train(settings(penalty={"weights": [1e3] * 3}, training=WHOLE), tmp_path, mutate=excite).gradients
    none = train(settings(penalty={"enabled": False}, training=WHOLE), tmp_path, mutate=excite).gradients
    gates = [name for name in huge if "so8t_safe" in name]
    lora = [name for name in huge if "so8t_lora" in name and "layers.0" in name]
    assert len(gates) == 2
    for name in gates + lora:
        assert (huge[name] - none[name]).norm() > 1e-3 * none[name].norm(), name


def test_the_weight_follows_optimiser_steps_not_micro_batches(settings, tmp_path):
    run = train(settings(training={"max_steps": 5, "batch_size": 1, "accumulation": 3}), tmp_path)
    assert [row["pet_weight"] for row in run.logs] == [0.01, 0.05, 0.05, 0.1, 0.1]
    for row in run.logs:
        assert row["loss/pet_weighted"] == pytest.approx(row["pet_weight"] * row["loss/pet"], rel=1e-6)


def test_each_group_follows_its_own_rate(settings, tmp_path):
    training = {"max_steps": 8, "warmup": 0.25, "schedule": "linear", "lr": 1e-3, "gate_lr": 1e-2}
    run = train(settings(training=training), tmp_path)
    shape = np.array([0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert [rate["gates"] for rate in run.rates] == pytest.approx(list(1e-2 * shape))
    assert [rate["matrices"] for rate in run.rates] == pytest.approx(list(1e-3 * shape))
    assert [row["lr/gates"] for row in run.logs] == pytest.approx(list(1e-2 * shape))


def test_training_moves_gates_and_lora_and_nothing_else(settings, tmp_path):
    run = train(settings(training={"max_steps": 6, "warmup": 0.0}), tmp_path)
    fresh = dict(building.build(settings()).model.named_parameters())
    moved = {n for n, p in run.job.model.named_parameters() if not torch.equal(p, fresh[n])}
    assert moved == {n for n, p in run.job.model.named_parameters() if p.requires_grad}
    assert any("so8t_safe" in n for n in moved)
    assert not any("so8t_cmd" in n or "embed" in n for n in moved)
    assert run.logs[-1]["gate/max_angle"] > 0.01
    assert run.logs[-1]["loss/lm"] < run.logs[0]["loss/lm"]


def test_the_optimiser_holds_every_trainable_number_once(settings, tmp_path):
    job, trainer = job_and_trainer(settings(), tmp_path)
    groups = trainer.create_optimizer().param_groups
    wanted = {id(p) for p in job.model.parameters() if p.requires_grad}
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(wanted)
    assert {g["name"]: g["weight_decay"] for g in groups} == {"gates": 0.0, "matrices": 0.01}
    with pytest.raises(TrainingError, match="every trainable parameter once"):
        check_groups(job.model, groups[:1])


def test_routed_rows_train_their_own_factor(settings, tmp_path, sentences):
    lines = sentences.read_text(encoding="utf-8").splitlines()
    for label, moved, still in (("ALLOW", "so8t_cmd", "so8t_safe"), ("REFUSE", "so8t_safe", "so8t_cmd")):
        path = tmp_path / f"{label}.jsonl"
        path.write_text("\n".join(line for line in lines if f'"label": "{label}"' in line), encoding="utf-8")
        config = settings(
            data={"train": str(path)},
            adapter={"train_gates": "routed"},
            training={**WHOLE, "batch_size": 2, "gradient_checkpointing": True},
        )
        gradients = train(config, tmp_path, mutate=excite).gradients
        assert all(gradients[n].norm() > 0 for n in gradients if moved in n)
        assert all(gradients[n].norm() == 0 for n in gradients if still in n)


def test_routing_without_labels_names_the_row(settings, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"plain\.jsonl:1: a label is needed"):
        building.build(settings(data={"train": str(path)}, adapter={"train_gates": "routed"}))


def test_a_broken_frozen_weight_stops_at_its_step_and_moves_nothing(settings, tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, _args, state, _control, model=None, **_):
            if state.global_step == 2:
                with torch.no_grad():
                    model.get_base_model().model.norm.weight[0] = float("nan")
                self.before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}

    poison = Poison()
    job, trainer = job_and_trainer(settings(), tmp_path, poison)
    with pytest.raises(TrainingStopped, match=r"^Step 3: frozen weight: .*norm.weight is not finite"):
        trainer.train()
    after = {n: p for n, p in job.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(after[n], poison.before[n]) for n in after)


def test_a_non_finite_gradient_never_reaches_the_optimiser(settings, tmp_path):
    """Put in after everything else has looked at the gradients, in the first of four steps."""

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, _args, state, _control, model=None, **_):
            self.name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
            if state.global_step == 0:
                parameter.grad.view(-1)[0] = float("inf")
                self.before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}

        def on_optimizer_step(self, _args, state, _control, model=None, **_):
            if state.global_step == 0:
                self.moved = [
                    n for n, p in model.named_parameters() if n in self.before and (p != self.before[n]).any()
                ]

    poison, rows = Poison(), []
    _, trainer = job_and_trainer(settings(), tmp_path, poison, guard=Guard(record=rows.append))
    trainer.train()
    assert poison.moved == []
    assert [(row["step"], row["cause"], row["stage"]) for row in rows] == [(1, "gradient", "skip")]
    assert rows[0]["layer"] in poison.name
    assert [row["step"] for row in trainer.state.log_history if "loss/total" in row] == [2, 3, 4]


def test_a_parameter_that_no_loss_reaches_is_named(settings, tmp_path):
    def add(model):
        model.get_base_model().model.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))

    _, trainer = job_and_trainer(settings(), tmp_path, mutate=add)
    with pytest.raises(TrainingError, match=r"1 trainable parameters got no gradient.*idle"):
        trainer.train()


def test_nothing_trainable_is_refused(settings):
    model = building.build(settings()).model
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="Nothing is trainable"):
        check_trainable(model)


def test_a_gate_below_float32_is_refused(settings):
    model = building.build(settings()).model
    next(p for n, p in model.named_parameters() if "so8t_safe" in n).data = torch.zeros(8, 28, dtype=torch.bfloat16)
    with pytest.raises(TrainingError, match=r"so8t_safe.*bfloat16.*float32"):
        check_trainable(model)


def test_a_loss_without_gradient_is_refused(settings, tmp_path):
    def cut(model):
        layer = model.get_base_model().model.layers[2]
        layer.register_forward_hook(lambda _module, _inputs, output: output.detach())

    _, trainer = job_and_trainer(settings(penalty={"enabled": False}), tmp_path, mutate=cut)
    with pytest.raises(TrainingError, match="Step 1: the loss has no gradient"):
        trainer.train()


def test_logits_that_are_capped_after_the_head_are_refused(settings):
    model = building.build(settings()).model
    model.get_base_model().config.final_logit_softcapping = 30.0
    with pytest.raises(TrainingError, match="final_logit_softcapping"):
        decoder_and_head(model)


@pytest.mark.parametrize(
    ("plugin", "training", "reason"),
    [
        ({"fsdp_version": 1}, {}, "set FSDP_VERSION=2"),
        ({"cpu_ram_efficient_loading": True}, {}, "set FSDP_CPU_RAM_EFFICIENT_LOADING=false"),
        ({}, {"optimiser": "adamw_8bit"}, "optimiser adamw_8bit cannot step on shards"),
    ],
)
def test_shards_that_cannot_work_are_refused(settings, tmp_path, monkeypatch, plugin, training, reason):
    real = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        real(self)
        found = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, **plugin}
        self.accelerator.state.fsdp_plugin = SimpleNamespace(**found)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(TrainingError, match=reason):
        job_and_trainer(settings(training=training), tmp_path)


def test_shards_of_an_8_bit_base_are_refused(settings):
    model = building.build(settings(loading={"quantization": "int8"})).model
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False)
    with pytest.raises(TrainingError, match="An 8-bit base cannot be cut"):
        prepare_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model, "adamw_torch")


def test_shards_that_accelerate_would_leave_out_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(TrainingError, match=r"accelerate leaves it off for DistributedType\.NO"):
        job_and_trainer(settings(), tmp_path)


def test_the_penalty_needs_a_gated_layer(settings):
    model = building.build(settings(adapter={"target_modules": []}, penalty={"enabled": False})).model
    with pytest.raises(TrainingError, match="none of the 3 layers"):
        gated_layers(decoder_and_head(model)[0])


def test_the_tap_keeps_the_first_run_only_and_can_be_removed():
    layer = torch.nn.Linear(2, 2)
    tap = ResidualTap({4: layer})
    with tap.open() as streams:
        first = layer(torch.ones(1, 2))
    layer(torch.zeros(1, 2))
    assert torch.equal(streams[4], first)
    tap.close()
    with tap.open() as streams:
        layer(torch.ones(1, 2))
    assert streams == {}
