"""Planned bytes against bytes counted on real tensors, and the plan of the full-size model from its configuration."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Phi3Config, Phi3ForCausalLM, TrainerCallback

from so8t_torch.adapter import SO8TConfig, so8t_param_groups
from so8t_torch.core.errors import ConfigError
from so8t_torch.train import building, memory
from so8t_torch.train.cards import CARDS, GIB
from so8t_torch.train.plan import plan
from so8t_torch.train.trainer import SO8TTrainer


def component(config, name):
    return next(part.size for part in plan(config).components if part.name == name)


def stored(parameter):
    """Bytes of a parameter with everything its quantisation keeps beside it."""
    state = getattr(parameter, "quant_state", None)
    beside = [] if state is None else [state.absmax, state.code]
    if state is not None and state.nested:
        beside += [state.state2.absmax, state.state2.code, state.offset]
    row_scales = getattr(parameter, "SCB", None)
    beside += [] if row_scales is None else [row_scales]
    return sum(tensor.numel() * tensor.element_size() for tensor in [parameter.data, *beside])


LOADINGS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "float32", "quantization": "nf4", "double_quantization": False},
    "nf4, double": {"dtype": "bfloat16", "quantization": "nf4"},
    "nf4, rest in float32": {"dtype": "bfloat16", "quantization": "nf4", "float32_rest": True},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}


@pytest.mark.parametrize("name", LOADINGS)
def test_the_base_is_counted_to_the_byte(settings, name):
    config = settings(loading=LOADINGS[name])
    source, revision = building.base_source(config)
    model = building.load_model(source, revision, config.loading)
    inside = {id(m.weight) for m in model.get_decoder().modules() if isinstance(m, nn.Linear)}
    assert len(inside) == 3 * 4
    linear = sum(stored(p) for p in model.parameters() if id(p) in inside)
    rest = sum(stored(p) for p in model.parameters() if id(p) not in inside)
    assert component(config, "base: linear layers") == linear
    assert component(config, "base: the rest") == rest


class Gradients(TrainerCallback):
    """Adds up the gradients that exist when the optimiser steps."""

    def on_pre_optimizer_step(self, *_, model=None, **__):
        self.size = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


TRAINED = {"max_steps": 1, "batch_size": 2, "warmup": 0.0}


@pytest.mark.parametrize("optimiser", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")
def test_adapter_gradients_and_optimiser_states_are_counted_to_the_byte(settings, tmp_path, optimiser):
    lora = {"r": 32, "lora_target_modules": ["qkv_proj", "gate_up_proj"]}
    config = settings(training={**TRAINED, "optimiser": optimiser}, adapter=lora)
    job = building.build(config)
    arguments = building.training_arguments(config, tmp_path)
    trainer = SO8TTrainer(job.model, arguments, job.rows, [], job.collator, config.training, config.penalty)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    adapter = [p for n, p in job.model.named_parameters() if "so8t_" in n]
    states = {"state1", "state2", "absmax1", "absmax2", "exp_avg", "exp_avg_sq"}
    held = [
        tensor.nbytes
        for state in trainer.optimizer.state.values()
        for name, tensor in state.items()
        if name in states and isinstance(tensor, torch.Tensor)
    ]
    assert held
    assert component(config, "adapter") == sum(p.nbytes for p in adapter)
    assert component(config, "gradients") == gradients.size
    assert component(config, "optimiser states") == sum(held)


class Alive(TorchDispatchMode):
    """Follows every storage that operations create and remembers the most bytes alive at once."""

    def __init__(self, model):
        super().__init__()
        self.own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:
                    self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_peak_of_a_step_is_planned_within_a_quarter(settings, tmp_path, checkpointing):
    """All that one forward and backward pass holds at once, beside weights and optimiser."""
    config = settings(
        training={"gradient_checkpointing": checkpointing, "batch_size": 6, "loss_chunk": 16},
        data={"max_length": 37},
        adapter={"lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    )
    job = building.build(config)
    arguments = building.training_arguments(config, tmp_path)
    trainer = SO8TTrainer(job.model, arguments, job.rows, [], job.collator, config.training, config.penalty)
    trainer.create_optimizer()
    if checkpointing:
        job.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    batch = job.collator(job.rows)
    assert batch["input_ids"].shape == (6, 37)
    job.model.train()
    with Alive(job.model) as alive:
        trainer.compute_loss(job.model, batch).backward()
    parts = {part.name: part.size for part in plan(config).components}
    planned = sum(parts[name] for name in ("gradients", "activations", "temporaries", "logits"))
    assert planned / 1.25 <= alive.peak <= planned * 1.25


def test_the_real_model_is_counted_from_its_configuration(settings, shared):
    config = settings(
        base={"path": str(shared("phi35/config.json").parent)},
        loading={"quantization": "nf4", "dtype": "auto"},
        adapter={
            "layers_to_transform": list(range(4, 12)),
            "r": 32,
            "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        },
        data={"max_length": 1024},
        training={"gradient_checkpointing": True, "batch_size": 1, "optimiser": "paged_adamw_8bit"},
        card="rtx3060-12gb",
    )
    result = plan(config)
    width, inner, layers, words = 3072, 8192, 32, 32064
    shapes = {(3 * width, width), (width, width), (2 * inner, width), (width, inner)}
    linear = layers * sum(a * b for a, b in shapes)
    assert result.parameters == linear + 2 * words * width + (2 * layers + 1) * width
    assert result.lora == 32 * layers * sum(a + b for a, b in shapes)
    assert result.gates == 8 * (width // 8) * 28
    base = {part.name: part.size for part in result.components}
    assert base["base: the rest"] == 2 * (2 * words * width + (2 * layers + 1) * width)
    assert 0.5 * linear < base["base: linear layers"] < 0.52 * linear
    assert result.fits
    assert result.total < 6 * GIB


def test_a_card_too_small_is_said(settings, shared):
    config = settings(
        base={"path": str(shared("phi35/config.json").parent)},
        loading={"dtype": "bfloat16"},
        data={"max_length": 4096},
        card="rtx3060-8gb",
    )
    result = plan(config)
    assert not result.fits
    assert "does not fit" in result.verdict()
    assert plan(config, card="a100-80gb").fits


def test_activations_grow_linearly_with_tokens_and_checkpointing_saves(settings):
    def size(tokens, checkpointing=False):
        config = settings(data={"max_length": tokens}, training={"gradient_checkpointing": checkpointing})
        return component(config, "activations")

    assert size(192) - size(128) == size(128) - size(64) > 0
    assert size(128, checkpointing=True) < size(128)


def test_gates_keep_32_bit_moments_under_an_8_bit_optimiser():
    """A gate of the real width has more numbers than the size below which every state is 32-bit anyway."""
    optim = pytest.importorskip("bitsandbytes.optim")
    config = Phi3Config(
        vocab_size=64,
        hidden_size=1184,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
    )
    lora = {"r": 4, "lora_target_modules": ["qkv_proj"]}
    model = get_peft_model(Phi3ForCausalLM(config), SO8TConfig(task_type="CAUSAL_LM", **lora))
    optimiser = optim.AdamW8bit(so8t_param_groups(model, 1e-3, 1e-3))
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimiser.step()
    sizes = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes[name.split(".")[-2]] = optimiser.state[parameter]["state1"].element_size()
    assert sizes == {"so8t_safe": 4, "so8t_lora_A": 1, "so8t_lora_B": 1}
    held = sum(
        state[name].nbytes for state in optimiser.state.values() for name in state if name[:-1] in ("state", "absmax")
    )
    assert held == memory.optimiser_bytes(model, "adamw_8bit")


def test_an_unknown_card_names_the_nearest(settings):
    with pytest.raises(ConfigError, match="did you mean 'rtx3060-12gb'"):
        plan(settings(), card="rtx3060-12g")
    assert all(card.size == card.gib * GIB for card in CARDS.values())


def test_a_base_that_is_not_there_says_what_to_give(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"base\.path .*local folder with config\.json"):
        plan(settings(base={"path": str(tmp_path / "empty")}))


def test_the_table_can_be_printed(settings, capsys):
    from rich.console import Console

    Console(width=140).print(plan(settings(card="rtx3060-12gb")).table())
    assert "GiB to spare" in capsys.readouterr().out
