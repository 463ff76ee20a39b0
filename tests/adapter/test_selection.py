from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from so8t_torch import SO8TConfig
from so8t_torch.adapter import gated_layers
from so8t_torch.adapter.summary import layers
from so8t_torch.core.errors import AdapterError

FIXTURES = Path(__file__).parents[3] / "shared" / "data" / "fixtures"
PHI35 = Path(__file__).parents[3] / "shared" / "data" / "phi35"


def chosen(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of gated modules and of modules with LoRA."""
    found = dict(layers(model.base_model.model))
    return [n for n, m in found.items() if len(m.so8t_safe)], [n for n, m in found.items() if len(m.so8t_lora_A)]


def test_gates_and_low_rank_updates_are_chosen_independently(make_model) -> None:
    config = SO8TConfig(
        layers_to_transform=[1, 2], r=4, lora_target_modules=["qkv_proj", "o_proj"], lora_layers_to_transform=[0, 1]
    )
    gates, lora = chosen(get_peft_model(make_model(), config))
    assert gates == [f"model.layers.{i}.self_attn.o_proj" for i in (1, 2)]
    assert sorted(lora) == sorted(f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("qkv_proj", "o_proj"))


@pytest.mark.parametrize(
    ("family", "targets", "lora", "gates_expected", "lora_expected"),
    [
        ("phi3", ["o_proj"], ["qkv_proj", "gate_up_proj"], 3, 6),
        ("llama", ["o_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj"], 3, 12),
        ("qwen2", ["o_proj", "down_proj"], "all-linear", 6, 21),
        ("bert", ["attention.output.dense"], ["query", "value"], 3, 6),
    ],
)
def test_fused_and_split_projections(make_model, family, targets, lora, gates_expected, lora_expected) -> None:
    model = get_peft_model(make_model(family), SO8TConfig(target_modules=targets, r=2, lora_target_modules=lora))
    gates, low_rank = chosen(model)
    assert (len(gates), len(low_rank)) == (gates_expected, lora_expected)


def test_low_rank_alone_and_gates_alone(make_model) -> None:
    assert chosen(get_peft_model(make_model(), SO8TConfig()))[1] == []
    low_rank = SO8TConfig(target_modules=[], r=2, lora_target_modules=["o_proj"])
    gates, lora = chosen(get_peft_model(make_model(), low_rank))
    assert gates == []
    assert len(lora) == 3


def test_all_linear_leaves_the_output_head_out(make_model) -> None:
    gates, lora = chosen(get_peft_model(make_model(), SO8TConfig(target_modules="all-linear", r=2)))
    assert len(gates) == len(lora) == 12
    assert not any("lm_head" in name for name in gates + lora)


def test_rank_pattern_and_exclusion(make_model) -> None:
    config = SO8TConfig(
        exclude_modules=["layers.0.self_attn.o_proj"],
        r=4,
        lora_target_modules=["qkv_proj", "o_proj"],
        rank_pattern={"o_proj": 2},
    )
    model = get_peft_model(make_model(), config)
    assert len(chosen(model)[0]) == 2
    ranks = {name.split(".")[-1]: len(m.so8t_lora_A["default"]) for name, m in layers(model.base_model.model)}
    assert ranks == {"qkv_proj": 4, "o_proj": 2}


def test_a_regular_expression_selects(make_model) -> None:
    config = SO8TConfig(target_modules=r".*layers\.[12]\.self_attn\.o_proj")
    assert len(chosen(get_peft_model(make_model(), config))[0]) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"target_modules": ["o_proj", "gate_proj"]}, ["target_modules: 'gate_proj'", "gate_up_proj"]),
        ({"target_modules": ["out_proj"]}, ["target_modules: 'out_proj'", "o_proj"]),
        ({"target_modules": r".*\.out"}, ["target_modules:", "out"]),
        ({"layers_to_transform": [1, 7]}, ["layers_to_transform: 7", r"[0, 1, 2]"]),
        ({"layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]}, ["layers_pattern: 'blocks'"]),
        ({"exclude_modules": ["lm_heads"]}, ["exclude_modules: 'lm_heads'", "lm_head"]),
        ({"r": 2, "lora_target_modules": ["qkv_proj", "q_proj"]}, ["lora_target_modules: 'q_proj'", "qkv_proj"]),
        (
            {"r": 2, "lora_target_modules": ["qkv_proj"], "lora_layers_to_transform": [3]},
            ["lora_layers_to_transform: 3", "[0, 1, 2]"],
        ),
        ({"r": 2, "lora_target_modules": ["qkv_proj"], "rank_pattern": {"o_proj": 4}}, ["rank_pattern: 'o_proj'"]),
        ({"exclude_modules": ["o_proj"]}, ["target_modules: 'o_proj'", "excluded"]),
    ],
)
def test_every_entry_of_every_list_must_match(make_model, arguments, named) -> None:
    model = make_model()
    before = [type(m) for m in model.modules()]
    with pytest.raises(AdapterError) as caught:
        get_peft_model(model, SO8TConfig(**arguments))
    for text in named:
        assert text in str(caught.value)
    assert [type(m) for m in model.modules()] == before, "a refused configuration must not touch the model"


def test_every_unmatched_entry_is_listed_at_once(make_model) -> None:
    config = SO8TConfig(target_modules=["o_proj", "a_proj"], r=2, lora_target_modules=["b_proj", "qkv_proj"])
    with pytest.raises(AdapterError, match=r"(?s)'a_proj'.*'b_proj'"):
        get_peft_model(make_model(), config)


def test_a_real_configuration_with_two_unmatched_targets_is_refused_with_both_names(make_model) -> None:
    path = FIXTURES / "adapter_config_unmatched_targets.json"
    if not path.is_file():
        pytest.skip(f"needs {path.name} from ../shared/data/fixtures")
    stored = json.loads(path.read_text())
    for arguments in (
        {"target_modules": stored["target_modules"]},
        {"r": stored["r"], "lora_target_modules": stored["target_modules"]},
    ):
        with pytest.raises(AdapterError) as caught:
            get_peft_model(make_model(), SO8TConfig(**arguments))
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            assert f"'{name}' matches nothing" in str(caught.value)
        assert "near names: mlp.gate_up_proj" in str(caught.value)
        assert "'mlp.down_proj'" not in str(caught.value)


def test_a_width_not_divisible_by_eight_names_the_module() -> None:
    sizes = {"hidden_size": 36, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Phi3ForCausalLM(Phi3Config(vocab_size=32, num_hidden_layers=1, pad_token_id=0, **sizes))
    with pytest.raises(AdapterError, match=r"'model\.layers\.0\.self_attn\.o_proj'.*divisible by 8, got 36"):
        get_peft_model(model, SO8TConfig())


def test_modules_that_are_not_linear_are_refused_by_name(make_model) -> None:
    with pytest.raises(AdapterError, match=r"'model\.embed_tokens' is a Embedding"):
        get_peft_model(make_model(), SO8TConfig(target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match=r"is a Phi3MLP"):
        get_peft_model(make_model(), SO8TConfig(r=2, lora_target_modules=["mlp"]))


def test_a_layer_of_another_method_is_refused(make_model) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(target_modules=["o_proj"]), make_model())
    with pytest.raises(AdapterError, match="another method"):
        inject_adapter_in_model(SO8TConfig(), model, "gates")


def test_the_real_architecture_on_the_meta_device() -> None:
    if not (PHI35 / "config.json").is_file():
        pytest.skip("needs the real configuration at ../shared/data/phi35")
    with torch.device("meta"):
        model = Phi3ForCausalLM(Phi3Config.from_pretrained(PHI35))
    config = SO8TConfig(
        layers_to_transform=list(range(4, 12)),
        r=32,
        lora_target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    )
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    gates, lora = chosen(model)
    assert gates == [f"model.layers.{i}.self_attn.o_proj" for i in range(4, 12)]
    assert len(lora) == 4 * 32
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for n, p in trained.items() if "so8t_safe" in n) == 8 * 384 * 28 == 86_016
    assert not any("so8t_cmd" in n for n in trained)
    assert len(list(gated_layers(model))) == 8


def test_a_module_to_save_that_is_not_there_is_refused(make_model) -> None:
    with pytest.raises(AdapterError, match=r"modules_to_save: 'lm_haed' matches nothing; near names: lm_head"):
        get_peft_model(make_model(), SO8TConfig(modules_to_save=["lm_haed"]))


def test_one_string_that_is_no_whole_name_says_how_to_give_a_list(make_model) -> None:
    with pytest.raises(AdapterError, match=r"regular expression for the whole name, \['o_proj'\] a list"):
        get_peft_model(make_model(), SO8TConfig(target_modules="o_proj"))
