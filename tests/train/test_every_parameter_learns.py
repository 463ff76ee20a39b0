"""Every trainable parameter of every kind of adapter gets a finite non-zero gradient within three steps of a run."""

import pytest
import torch
from transformers import TrainerCallback

from so8t_torch.train import building
from so8t_torch.train import run as running
from so8t_torch.train.run import run_training

LORA = {"r": 4, "lora_target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
NO_LORA = {"r": 0, "lora_target_modules": None}
VARIANTS = {
    "safe gates": NO_LORA,
    "command gates": NO_LORA | {"train_gates": "cmd"},
    "routed gates": LORA | {"train_gates": "routed"},
    "Cayley": NO_LORA | {"chart": "cayley"},
    "one gate for all blocks": NO_LORA | {"shared": True},
    "gates on every projection": NO_LORA | {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    "LoRA alone": LORA | {"target_modules": [], "layers_to_transform": None},
    "LoRA and gates": LORA | {"rank_pattern": {"o_proj": 2}},
    "LoRA with dropout": LORA | {"lora_dropout": 0.3},
    "whole modules": LORA | {"modules_to_save": ["norm"]},
}


@pytest.fixture(autouse=True)
def without_picture(monkeypatch):
    """Drawing takes longer than three steps of a tiny model."""
    monkeypatch.setattr(running, "draw_curves", lambda *_: None)


class Reached(TrainerCallback):
    """Keeps, for each trainable parameter, whether a step reached it and whether its gradient was always finite."""

    def __init__(self):
        self.silent = None
        self.wild = set()

    def on_pre_optimizer_step(self, _args, _state, _control, model=None, **_):
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        self.silent = set(found) if self.silent is None else self.silent
        self.silent -= {name for name, grad in found.items() if grad is not None and bool(grad.any())}
        self.wild |= {name for name, g in found.items() if g is not None and not bool(torch.isfinite(g).all())}


def reached(settings, adapter, loading=None, penalty=True):
    seen = Reached()
    sections = {"adapter": adapter, "training": {"max_steps": 3}, "penalty": {"enabled": penalty}}
    run_training(settings(**sections, loading=loading or {}), callbacks=[seen])
    return seen


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_an_adapter_learns(settings, name):
    seen = reached(settings, VARIANTS[name], penalty=name != "LoRA alone")
    assert (seen.silent, seen.wild) == (set(), set())


@pytest.mark.parametrize("loading", [{"quantization": "nf4"}, {"quantization": "int8"}], ids=["nf4", "int8"])
def test_every_parameter_on_a_quantised_base_learns(settings, loading):
    seen = reached(settings, VARIANTS["LoRA and gates"], loading)
    assert (seen.silent, seen.wild) == (set(), set())


def test_a_parameter_that_is_not_reached_is_found(settings, monkeypatch):
    adapt = building.adapt

    def with_a_dead_end(model, section):
        adapted = adapt(model, section)
        with torch.no_grad():  # where both factors are zero, neither ever moves
            for name, parameter in adapted.named_parameters():
                if "layers.0.self_attn.o_proj.so8t_lora" in name:
                    parameter.zero_()
        return adapted

    monkeypatch.setattr(building, "adapt", with_a_dead_end)
    seen = reached(settings, LORA)
    assert len(seen.silent) == 2
    assert all("layers.0.self_attn.o_proj.so8t_lora" in name for name in seen.silent)
