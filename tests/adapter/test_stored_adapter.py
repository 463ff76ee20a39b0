from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from so8t_torch import SO8TConfig, load_adapter
from so8t_torch.core.errors import AdapterError


@pytest.fixture
def adapter(load_base, shake, tmp_path):
    model = shake(get_peft_model(load_base(), SO8TConfig(r=2, lora_target_modules=["o_proj"], task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change) -> None:
    path = folder / "adapter_model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path, metadata={"format": "pt"})


def set_in_config(folder, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("attribute", ["so8t_safe", "so8t_cmd", "so8t_lora_A", "so8t_lora_B"])
def test_numbers_that_are_not_finite_are_refused_by_name(adapter, load_base, value, attribute) -> None:
    key = f"base_model.model.model.layers.1.self_attn.o_proj.{attribute}"
    rewrite(adapter, lambda stored: stored[key].view(-1).__setitem__(3, value))
    with pytest.raises(AdapterError, match=rf"layers\.1\.self_attn\.o_proj\.{attribute}'.*NaN or infinity"):
        PeftModel.from_pretrained(load_base(), adapter)


def test_transformers_own_loader_is_caught_at_the_first_use(adapter, load_base, ids) -> None:
    key = "base_model.model.model.layers.1.self_attn.o_proj.so8t_safe"
    rewrite(adapter, lambda stored: stored[key].view(-1).__setitem__(3, float("nan")))
    model = load_base()
    model.load_adapter(str(adapter))
    with pytest.raises(AdapterError, match="finite numbers in so8t_safe"):
        model(ids)


def test_a_chart_other_than_the_stored_one_is_refused(adapter, load_base, ids) -> None:
    set_in_config(adapter, chart="cayley")
    with pytest.raises(AdapterError, match=r"so8t_chart.*chart='cayley' but the weights were stored with 'exp'"):
        PeftModel.from_pretrained(load_base(), adapter)
    with pytest.raises(AdapterError, match="stored with 'exp'"):
        load_adapter(adapter)
    model = load_base()
    model.load_adapter(str(adapter))
    with pytest.raises(AdapterError, match="stored with 'exp'"):
        model(ids)


@pytest.mark.parametrize("attribute", ["so8t_safe", "so8t_chart", "so8t_lora_B"])
def test_a_missing_tensor_is_named(adapter, load_base, attribute) -> None:
    key = f"base_model.model.model.layers.2.self_attn.o_proj.{attribute}"
    rewrite(adapter, lambda stored: stored.pop(key))
    with pytest.raises(AdapterError, match=rf"lacks model\.layers\.2\.self_attn\.o_proj\.{attribute}"):
        PeftModel.from_pretrained(load_base(), adapter)


def test_a_tensor_without_a_place_is_named(adapter, load_base) -> None:
    set_in_config(adapter, layers_to_transform=[0, 1])
    with pytest.raises(AdapterError, match=r"has no place for model\.layers\.2\.self_attn\.o_proj\.so8t_c"):
        PeftModel.from_pretrained(load_base(), adapter)


def test_an_adapter_of_another_method_is_refused(load_base, tmp_path) -> None:
    get_peft_model(load_base(), LoraConfig(target_modules=["o_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="expected the fields of SO8TConfig"):
        load_adapter(tmp_path)


def test_an_adapter_that_names_no_base_says_what_to_pass(make_model, tmp_path, ids, shake) -> None:
    model = shake(get_peft_model(make_model(), SO8TConfig(task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="pass base="):
        load_adapter(tmp_path)
    assert torch.equal(load_adapter(tmp_path, make_model())(ids).logits, model(ids).logits)


def test_the_class_of_the_base_comes_from_the_adapter_when_it_has_no_task(load_base, shake, ids, tmp_path) -> None:
    model = shake(get_peft_model(load_base(), SO8TConfig())).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kept", [None, 0, 50, -100], ids=["absent", "empty", "header cut", "numbers cut"])
def test_weights_that_are_not_whole_are_named(adapter, kept) -> None:
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if kept is not None:
        path.write_bytes(content[:kept])
    with pytest.raises(AdapterError, match=rf"{path.name}: (no such file|not a complete safetensors file)"):
        load_adapter(adapter)


@pytest.mark.parametrize("method", ["NOPE", None])
def test_an_unknown_method_is_named(adapter, method) -> None:
    set_in_config(adapter, peft_type=method)
    with pytest.raises(AdapterError, match="expected an adapter of the method SO8T"):
        load_adapter(adapter)


def test_whole_numbers_are_no_generators(adapter, load_base) -> None:
    key = "base_model.model.model.layers.1.self_attn.o_proj.so8t_safe"
    rewrite(adapter, lambda stored: stored.update({key: stored[key].long()}))
    with pytest.raises(AdapterError, match=r"expected floating-point numbers, got torch\.int64"):
        load_adapter(adapter, load_base())


def test_a_chart_code_is_one_number(adapter, load_base) -> None:
    key = "base_model.model.model.layers.1.self_attn.o_proj.so8t_chart"
    rewrite(adapter, lambda stored: stored.update({key: torch.zeros(3)}))
    with pytest.raises(AdapterError, match="expected one number"):
        load_adapter(adapter, load_base())


def test_a_base_that_is_not_there_is_named(adapter, tmp_path) -> None:
    with pytest.raises(AdapterError, match=r"no base model can be read at .*/nowhere"):
        load_adapter(adapter, tmp_path / "nowhere")


def test_a_damaged_record_of_baking_is_refused(adapter, load_base) -> None:
    model = load_base()
    model.config.so8t_baked = {}
    with pytest.raises(AdapterError, match="damaged record"):
        load_adapter(adapter, model)
