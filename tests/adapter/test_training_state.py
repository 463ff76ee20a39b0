from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from so8t_torch import SO8TConfig, so8t_param_groups
from so8t_torch.adapter import GeneratorCastWarning
from so8t_torch.core.errors import AdapterError


def trainable(model: torch.nn.Module, adapter: str = "default") -> set[str]:
    """The kinds of adapter parameters that require a gradient."""
    names = (n.split(".") for n, p in model.named_parameters() if p.requires_grad and n.endswith(f".{adapter}"))
    return {parts[-2] for parts in names}


@pytest.mark.parametrize(("train_gates", "frozen"), [("safe", "so8t_cmd"), ("cmd", "so8t_safe")])
def test_a_frozen_factor_stays_frozen_through_everything(make_model, tmp_path, train_gates, frozen) -> None:
    model = get_peft_model(make_model(), SO8TConfig(train_gates=train_gates, r=2))
    kinds = {"so8t_safe", "so8t_cmd", "so8t_lora_A", "so8t_lora_B"} - {frozen}
    assert trainable(model) == kinds
    model.set_adapter("default")
    assert trainable(model) == kinds
    with model.disable_adapter():
        assert trainable(model) == set()
    assert trainable(model) == kinds
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trainable(model) == kinds
    model.set_requires_grad("default", True)
    assert trainable(model) == kinds
    model.add_adapter("other", SO8TConfig(train_gates=train_gates))
    model.set_adapter("other")
    assert trainable(model) == set()
    assert trainable(model, "other") == kinds - {"so8t_lora_A", "so8t_lora_B"}
    model.set_adapter("default")
    assert trainable(model) == kinds
    model.merge_adapter()
    model.unmerge_adapter()
    assert trainable(model) == kinds
    model.to(torch.bfloat16)
    model.train()
    assert trainable(model) == kinds
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    again = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    assert trainable(again) == kinds
    assert trainable(PeftModel.from_pretrained(make_model(), tmp_path)) == set()


def test_a_frozen_factor_gets_no_gradient_and_the_other_one_does(make_model, adapter_gradients) -> None:
    gradients = adapter_gradients(get_peft_model(make_model(), SO8TConfig(train_gates="cmd")))
    assert len(gradients) == 3
    for name, gradient in gradients.items():
        assert "so8t_cmd" in name
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_training_both_factors_without_routes_is_refused(make_model, ids) -> None:
    model = get_peft_model(make_model(), SO8TConfig())
    for name, parameter in model.named_parameters():
        if "so8t_cmd" in name:
            parameter.requires_grad_(True)
    with pytest.raises(AdapterError, match="both do"):
        model(ids)
    with torch.no_grad():
        model(ids)


def test_generators_cast_while_zero_are_promoted_with_a_warning(make_model, ids) -> None:
    model = get_peft_model(make_model(), SO8TConfig())
    held = [p for n, p in model.named_parameters() if "so8t_" in n]
    for parameter in held:
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.warns(GeneratorCastWarning, match=r"so8t_(safe|cmd)\.default had been cast to torch\.bfloat16"):
        model(ids)
    after = [p for n, p in model.named_parameters() if "so8t_" in n]
    assert all(a is b for a, b in zip(held, after, strict=True)), "an optimiser built before must see the same objects"
    assert all(p.dtype == torch.float32 for p in after)
    model(ids)


def test_generators_cast_after_learning_are_refused(make_model, ids, shake) -> None:
    model = shake(get_peft_model(make_model(), SO8TConfig()))
    for name, parameter in model.named_parameters():
        if "so8t_safe" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(AdapterError, match=r"so8t_safe\.default: expected float32, got torch\.bfloat16"):
        model(ids)


def test_casting_the_whole_model_leaves_the_generators_alone(make_model, ids, shake) -> None:
    model = shake(get_peft_model(make_model(), SO8TConfig()))
    before = {n: p.clone() for n, p in model.named_parameters() if "so8t_" in n}
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()):
        model = cast(model)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "so8t_" in n)
    assert model(ids).logits.dtype == torch.bfloat16


def test_small_steps_are_not_lost_in_a_bfloat16_model(make_model, adapter_gradients) -> None:
    model = get_peft_model(make_model().bfloat16(), SO8TConfig())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        adapter_gradients(model)
        before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    assert all((p != before[n]).any() for n, p in model.named_parameters() if p.requires_grad)


def test_only_one_adapter_is_active_and_mixtures_are_refused(make_model, ids) -> None:
    model = get_peft_model(make_model(), SO8TConfig())
    model.add_adapter("other", SO8TConfig())
    for activate in (model.base_model.set_adapter, model.base_model.model.model.layers[0].self_attn.o_proj.set_adapter):
        with pytest.raises(AdapterError, match="rotations do not commute"):
            activate(["default", "other"])
    with pytest.raises(AdapterError, match="weighted sum of rotations is not a rotation"):
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed")
    with pytest.raises(AdapterError, match="one SO\\(8\\) adapter is active for the whole batch"):
        model(ids, adapter_names=["default"] * len(ids))
    with pytest.raises(AdapterError, match="rotations do not commute"):
        model.merge_adapter(["default", "other"])
    model(ids)


def test_hot_switching_between_adapters(make_model, ids, shake) -> None:
    model = shake(get_peft_model(make_model(), SO8TConfig(r=2)).eval(), seed=1)
    first = model(ids).logits
    model.add_adapter("other", SO8TConfig(chart="cayley", shared=True, train_gates="cmd", layers_to_transform=[1]))
    assert torch.equal(model(ids).logits, first), "adding an adapter must not activate it"
    model.set_adapter("other")
    base = make_model().eval()(ids).logits
    assert torch.equal(model(ids).logits, base), "a new adapter starts at the identity"
    shake(model, seed=2)
    model.set_adapter("default")
    second = model(ids).logits
    model.set_adapter("other")
    other = model(ids).logits
    assert not torch.equal(other, base)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, second)
    model.delete_adapter("other")
    assert torch.equal(model(ids).logits, second)
    assert not any("other" in n for n, _ in model.named_parameters())


def test_a_deep_copy_is_independent_and_shares_its_routes_with_itself_alone(make_model, ids, shake) -> None:
    model = shake(get_peft_model(make_model(), SO8TConfig(train_gates="routed")).eval())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    twin.set_gate_routes(torch.ones(4, dtype=torch.bool))
    routes = {m.routes for m in model.modules() if hasattr(m, "routes")}
    twin_routes = {m.routes for m in twin.modules() if hasattr(m, "routes")}
    assert len(routes) == len(twin_routes) == 1
    assert not routes & twin_routes
    assert next(iter(routes)).rows_to_safe is None


def test_parameter_groups(make_model) -> None:
    config = SO8TConfig(r=2, modules_to_save=["lm_head", "norm"])
    model = get_peft_model(make_model(), config)
    groups = {g["name"]: g for g in so8t_param_groups(model, lr=1e-3, gate_lr=2e-2, weight_decay=0.1)}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "gates": (2e-2, 0.0),
        "matrices": (1e-3, 0.1),
        "vectors": (1e-3, 0.0),
    }
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-2] for p in groups["gates"]["params"]} == {"so8t_safe"}
    torch.optim.AdamW(list(groups.values()))


def test_bitsandbytes_keeps_the_gates_in_32_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    # shapes above bitsandbytes' own 4096-element floor for 8-bit state
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"o_proj": torch.nn.Linear(64, 8 * 160), "lm": torch.nn.Linear(8 * 160, 8)})
    model = get_peft_model(model, SO8TConfig(r=4, lora_target_modules=["o_proj"]))
    layer = model.base_model.model["o_proj"]
    # the library knows parameters by address: here a gate of a model that is gone lay in the same place
    bnb.optim.GlobalOptimManager.get_instance().override_config(layer.so8t_lora_B["default"], "optim_bits", 32)
    optimizer = bnb.optim.AdamW8bit(so8t_param_groups(model, lr=1e-3, gate_lr=1e-2))
    layer(torch.randn(3, 64)).square().sum().backward()
    optimizer.step()
    gates, up = layer.so8t_safe["default"], layer.so8t_lora_B["default"]
    assert gates.numel() > 4096
    assert up.numel() > 4096
    assert optimizer.state[gates]["state1"].dtype == torch.float32
    assert optimizer.state[up]["state1"].dtype == torch.uint8


def test_peft_does_not_mix_the_method_with_another_one(make_model) -> None:
    model = get_peft_model(make_model(), SO8TConfig())
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("lora", LoraConfig(target_modules=["o_proj"]))
