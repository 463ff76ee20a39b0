from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from so8t_torch import SO8TConfig, SO8TModel, load_adapter
from so8t_torch.adapter import SO8TLayer
from so8t_torch.core.errors import AdapterError

CONFIGS = {
    "gates": SO8TConfig,
    "low rank": lambda **a: SO8TConfig(target_modules=[], r=2, **a),
    "both": lambda **a: SO8TConfig(r=2, chart="cayley", layers_to_transform=[0, 2], **a),
    "shared": lambda **a: SO8TConfig(shared=True, train_gates="routed", **a),
}


@pytest.fixture(params=list(CONFIGS))
def make_config(request):
    return CONFIGS[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_by_every_road(load_base, shake, ids, tmp_path, make_config, dtype) -> None:
    model = shake(get_peft_model(load_base(dtype=dtype), make_config(task_type="CAUSAL_LM"))).eval()
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}

    injected = load_base(dtype=dtype)
    injected.load_adapter(str(tmp_path))
    roads = {
        "PeftModel": PeftModel.from_pretrained(load_base(dtype=dtype), tmp_path),
        "low memory": PeftModel.from_pretrained(load_base(dtype=dtype), tmp_path, low_cpu_mem_usage=True),
        "other name": PeftModel.from_pretrained(load_base(dtype=dtype), tmp_path, adapter_name="elsewhere"),
        "AutoPeftModel": AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        "model.load_adapter": injected,
        "AutoModel on the adapter": AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        "load_adapter": load_adapter(tmp_path, dtype=dtype),
        "load_adapter with a model": load_adapter(tmp_path, load_base(dtype=dtype)),
    }
    for road, again in roads.items():
        assert torch.equal(again(ids).logits, logits), road
        generators = [p for n, p in again.named_parameters() if "so8t_safe" in n or "so8t_cmd" in n]
        assert all(p.dtype == torch.float32 for p in generators), road


def test_the_adapter_file_holds_the_documented_names_and_shapes(load_base, tmp_path) -> None:
    from safetensors.torch import load_file

    config = SO8TConfig(r=2, lora_target_modules=["o_proj"], layers_to_transform=[1])
    get_peft_model(load_base(), config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    gated = "base_model.model.model.layers.1.self_attn.o_proj"
    shapes = {k.removeprefix(gated + "."): tuple(v.shape) for k, v in stored.items() if k.startswith(gated)}
    assert shapes == {
        "so8t_safe": (8, 28),
        "so8t_cmd": (8, 28),
        "so8t_chart": (1,),
        "so8t_lora_A": (2, 64),
        "so8t_lora_B": (64, 2),
    }
    assert len(stored) == 5 + 2 * 2


def test_an_adapter_may_carry_the_name_of_a_module(load_base, shake, ids, tmp_path) -> None:
    model = shake(get_peft_model(load_base(), SO8TConfig(r=2), adapter_name="o_proj")).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base(), tmp_path / "o_proj")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_disabling_gives_the_base_bit_for_bit(make_model, shake, ids) -> None:
    base = make_model().eval()(ids).logits
    model = shake(get_peft_model(make_model(), SO8TConfig(r=2))).eval()
    gated = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, gated)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, base, rtol=0, atol=1e-5)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    assert not layer.merged, "disabling a merged adapter unmerges it"
    torch.testing.assert_close(model(ids).logits, gated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["phi3", "llama", "qwen2", "bert"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_gives_a_plain_model_with_the_same_logits(make_model, shake, ids, family, safe_merge) -> None:
    targets = ["attention.output.dense"] if family == "bert" else ["o_proj"]
    model = shake(get_peft_model(make_model(family), SO8TConfig(target_modules=targets, r=2)).double()).eval()
    logits = model(ids).logits
    plain = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(m, SO8TLayer) for m in plain.modules())
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in make_model(family).named_parameters()}
    torch.testing.assert_close(plain(ids).logits, logits, rtol=0, atol=1e-12)


def test_unmerging_returns_the_base_weights(make_model, shake, ids) -> None:
    model = shake(get_peft_model(make_model(), SO8TConfig(r=2)).double()).eval()
    base = {n: p.clone() for n, p in model.named_parameters() if "base_layer" in n}
    logits = model(ids).logits
    model.merge_adapter()
    assert any((p != base[n]).any() for n, p in model.named_parameters() if "base_layer" in n)
    shake(model, seed=9)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in base:
            torch.testing.assert_close(parameter, base[name], rtol=0, atol=1e-14)
    shake(model)
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-12)


def test_a_merge_rounds_once(make_model, shake) -> None:
    model = shake(get_peft_model(make_model().bfloat16(), SO8TConfig(r=2))).eval()
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    weight = layer.base_layer.weight.detach().double().numpy()
    up, down = (p["default"].detach().double().numpy() for p in (layer.so8t_lora_B, layer.so8t_lora_A))
    update = 8 * up @ down
    exact = np.zeros_like(weight)
    blocks = layer.gate_rotation("default").detach().double().numpy()
    for k, block in enumerate(blocks):
        rows = slice(8 * k, 8 * k + 8)
        exact[rows] = block @ (weight + update)[rows]
    layer.merge()
    assert torch.equal(layer.base_layer.weight, torch.from_numpy(exact).bfloat16())


def test_safe_merge_refuses_weights_that_are_not_finite(make_model, shake, ids) -> None:
    model = shake(get_peft_model(make_model(), SO8TConfig()))
    model(ids)
    before = model.base_model.model.model.layers[0].self_attn.o_proj.base_layer.weight.clone()
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.o_proj.base_layer.weight[0, 0] = float("inf")
    with pytest.raises(AdapterError, match="not finite; nothing was changed"):
        model.merge_and_unload(safe_merge=True)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    assert torch.equal(layer.base_layer.weight[1:], before[1:])


def test_merging_a_gate_on_tied_embeddings_is_refused(make_model) -> None:
    model = make_model("qwen2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model = get_peft_model(model, SO8TConfig(target_modules=["lm_head"]))
    with pytest.raises(AdapterError, match="lm_head shares its weight"):
        model.merge_and_unload()


def test_unload_returns_the_base(make_model, shake, ids) -> None:
    base = make_model().eval()(ids).logits
    model = shake(get_peft_model(make_model(), SO8TConfig(r=2))).eval()
    assert torch.equal(model.unload()(ids).logits, base)


def test_inject_adapter_in_model_and_state_dict_functions(make_model, shake, ids) -> None:
    config = SO8TConfig(r=2)
    model = shake(inject_adapter_in_model(config, make_model())).eval()
    state = get_peft_model_state_dict(model)
    assert all(".so8t_" in key for key in state)
    again = inject_adapter_in_model(SO8TConfig(r=2), make_model()).eval()
    set_peft_model_state_dict(again, state)
    assert torch.equal(again(ids).logits, model(ids).logits)
    by_names = inject_adapter_in_model(SO8TConfig(r=2), make_model(), state_dict=state).eval()
    set_peft_model_state_dict(by_names, state)
    assert torch.equal(by_names(ids).logits, model(ids).logits)


def test_transformers_own_adapter_interface(make_model, shake, ids) -> None:
    model = make_model().eval()
    base = model(ids).logits
    model.add_adapter(SO8TConfig(r=2))
    assert torch.equal(model(ids).logits, base)
    shake(model)
    gated = model(ids).logits
    model.disable_adapters()
    assert torch.equal(model(ids).logits, base)
    model.enable_adapters()
    assert torch.equal(model(ids).logits, gated)
    model.add_adapter(SO8TConfig(), "second")
    assert torch.equal(model(ids).logits, base)
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, gated)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "so8t_cmd" in n)
    model.delete_adapter("second")
    assert torch.equal(model(ids).logits, gated)


def test_modules_to_save_train_and_travel_with_the_adapter(load_base, shake, ids, tmp_path) -> None:
    config = SO8TConfig(r=2, lora_target_modules=["qkv_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = shake(get_peft_model(load_base(), config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head.modules_to_save" in name:
                assert parameter.requires_grad
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(tmp_path)(ids).logits, model(ids).logits)
    logits = model(ids).logits
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, logits, rtol=0, atol=1e-5)


def test_several_adapters_live_in_one_model(load_base, shake, ids, tmp_path) -> None:
    logits = {}
    for seed, name in enumerate(("first", "second"), start=1):
        model = shake(get_peft_model(load_base(), SO8TConfig(r=2), adapter_name=name), seed=seed).eval()
        logits[name] = model(ids).logits
        model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load_base(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(model(ids).logits, logits[name])


def test_generation_uses_the_cache_and_the_gate(make_model, shake, ids) -> None:
    model = shake(get_peft_model(make_model(), SO8TConfig(r=2, task_type="CAUSAL_LM"))).eval()
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = model.generate(input_ids=ids, use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **arguments))


def test_the_tuner_is_reached_through_peft(make_model) -> None:
    model = get_peft_model(make_model(), SO8TConfig(r=2))
    assert isinstance(model.base_model, SO8TModel)
    trained, total = model.get_nb_trainable_parameters()
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < total
    status = model.get_layer_status()
    assert len(status) == 12
    assert all(s.enabled and s.active_adapters == ["default"] for s in status)
    assert not model.supports_lora_conversion()
