"""4-bit and 8-bit bases: what bitsandbytes breaks on a CPU, and that it stays unbroken here."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import Trainer, TrainingArguments

from so8t_torch import SO8TConfig
from so8t_torch.adapter.quantized import dequantize, quantization
from so8t_torch.core.errors import AdapterError

pytest.importorskip("bitsandbytes")


def linear4bit(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "Linear4bit"]


def cosine(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    left, right = (torch.cat([g[n].flatten() for n in sorted(a)]) for g in (a, b))
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))


@pytest.fixture
def wrapped(load_base, shake):
    def make(quantization: str, **arguments):
        return shake(get_peft_model(load_base(quantization), SO8TConfig(r=2, **arguments)))

    return make


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_step_zero_is_the_quantised_base_bit_for_bit(load_base, ids, kind) -> None:
    model = load_base(kind)
    for module in linear4bit(model):
        module.train()
    base = model(ids).logits
    assert torch.equal(get_peft_model(model, SO8TConfig(r=2)).eval()(ids).logits, base)


def test_four_bit_layers_stay_in_training_mode_whoever_says_otherwise(wrapped) -> None:
    model = wrapped("nf4")
    layers = linear4bit(model)
    assert len(layers) == 12
    for switch in (
        lambda: model.eval(),
        lambda: model.train(False),
        lambda: model.base_model.eval(),
        lambda: model.get_base_model().eval(),
        lambda: model.get_base_model().model.layers[0].eval(),
        lambda: layers[0].eval(),
    ):
        switch()
        assert all(layer.training for layer in layers)
    assert not model.get_base_model().model.layers[0].training, "the other modules obey"
    model.train()
    assert model.get_base_model().model.layers[1].training


def test_setting_the_flag_by_hand_is_undone_before_the_weight_is_touched(wrapped, ids) -> None:
    model = wrapped("nf4").eval()
    for layer in linear4bit(model):
        layer.training = False
    with torch.no_grad():
        model(ids)
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in linear4bit(model))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_evaluation_leaves_the_gradients_alone(wrapped, adapter_gradients, ids, tmp_path, kind) -> None:
    model = wrapped(kind).train()
    before = adapter_gradients(model)
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, per_device_eval_batch_size=2)
    Trainer(model, arguments, eval_dataset=data).evaluate()
    model.eval()
    with torch.no_grad():
        model(ids)
    model.train()
    after = adapter_gradients(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(("kind", "at_least"), [("nf4", 0.99999), ("int8", 0.999)])
def test_gradients_are_the_dequantised_ones(wrapped, load_base, shake, adapter_gradients, ids, kind, at_least) -> None:
    model = wrapped(kind).eval()
    with torch.no_grad():
        model(ids)
    plain = load_base(kind)
    dequantize(plain, torch.float32)
    assert {quantization(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {"none"}
    plain = shake(get_peft_model(plain, SO8TConfig(r=2)))
    assert cosine(adapter_gradients(model.train()), adapter_gradients(plain.train())) > at_least


def test_a_base_that_was_already_repacked_is_refused(load_base, ids) -> None:
    model = load_base("nf4").eval()
    with torch.no_grad():
        model(ids)
    if not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in linear4bit(model)):
        pytest.skip("this processor has no AVX512-BF16, where bitsandbytes repacks")
    with pytest.raises(AdapterError, match=r"'model\.layers\.0\.self_attn\.o_proj'.*Load the base again"):
        get_peft_model(model, SO8TConfig())
    with pytest.raises(AdapterError, match="Load the base again"):
        dequantize(model, torch.float32)


def test_dequantised_weights_are_the_ones_bitsandbytes_computes_with(load_base) -> None:
    quantised, plain = load_base("nf4"), load_base("nf4")
    dequantize(plain, torch.float32)
    assert not hasattr(plain.config, "quantization_config")
    x = torch.eye(64)
    for name in ("self_attn.o_proj", "mlp.gate_up_proj"):
        layers = [m.get_submodule(f"model.layers.1.{name}") for m in (quantised.train(), plain)]
        assert torch.equal(layers[0](x), layers[1](x))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("road", ["merge_and_unload", "merge_adapter"])
def test_merging_into_few_bits_is_refused_and_names_the_way_out(wrapped, kind, road) -> None:
    model = wrapped(kind)
    with pytest.raises(AdapterError, match="`so8t bake"):
        getattr(model, road)()
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    with pytest.raises(AdapterError, match="`so8t bake"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_checkpointing_changes_no_bit_of_any_gradient(load_base, shake, adapter_gradients, kind) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_base(kind)
        non_reentrant = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        if kind != "none":
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing, **non_reentrant)
        elif checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model = shake(get_peft_model(model, SO8TConfig(r=2, lora_dropout=0.0))).train()
        assert model.get_base_model().is_gradient_checkpointing == checkpointing
        gradients.append(adapter_gradients(model))
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert len([n for n in plain if "so8t_safe" in n]) == 3
    assert all(torch.equal(plain[n], checkpointed[n]) for n in plain)


def test_every_trainable_parameter_gets_a_gradient(load_base, adapter_gradients) -> None:
    for kind in ("none", "nf4", "int8"):
        model = get_peft_model(load_base(kind), SO8TConfig(r=2)).train()
        adapter_gradients(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                # at the start B = 0, so A's gradient is exactly zero and nothing else's is
                assert bool(parameter.grad.any()) == ("lora_A" not in name), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_saving_and_loading_on_a_quantised_base(wrapped, load_base, ids, tmp_path, kind) -> None:
    from peft import PeftModel

    model = wrapped(kind, task_type="CAUSAL_LM").eval()
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_base(kind), tmp_path)
    assert torch.equal(again(ids).logits, logits)
    assert again.peft_config["default"].quantization["quant_method"] == "bitsandbytes"
