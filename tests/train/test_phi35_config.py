"""The configuration for the real model: cut down to real steps on a CPU, and whole on the meta device."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from so8t_torch.core.config import load_config
from so8t_torch.train import building
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.plan import plan
from so8t_torch.train.run import run_training

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/train/phi35_rtx3060.yaml"


@pytest.fixture(scope="module")
def cut_down(phi35, shared, tmp_path_factory):
    """Phi-3.5's configuration with every size cut but the vocabulary, random weights, the real tokenizer."""
    folder = tmp_path_factory.mktemp("phi35")
    settings = json.loads(shared("phi35/config.json").read_text())
    settings |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
    settings |= {"num_hidden_layers": 13, "dtype": "float32"}
    del settings["auto_map"]
    for name in ("short_factor", "long_factor"):
        settings["rope_scaling"][name] = settings["rope_scaling"][name][: 64 // 4 // 2]
    (folder / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    phi35.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")
def test_the_same_settings_train_a_cut_down_model(cut_down, shared, tmp_path):
    rows = shared("reasoning/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    overrides = {
        "output_dir": tmp_path / "run",
        "threads": 1,
        "base.path": cut_down,
        "data.train": tmp_path / "rows.jsonl",
        "data.eval": tmp_path / "rows.jsonl",
        "data.max_length": 192,
        "training.accumulation": 2,
        "training.epochs": 1,
        "training.lr": 5e-3,
        "training.gate_lr": 2e-2,
        "recording.every_steps": 1,
        "recording.progress": "false",
        "evaluation.every_steps": 2,
    }
    config = load_config(TrainConfig, CONFIG, [f"{name}={value}" for name, value in overrides.items()])
    result = run_training(config)
    assert result.steps == 4
    assert result.held_out_after < result.held_out_before
    gates, lora = 8 * 8 * 28, 32 * 13 * (64 + 3 * 64 + 64 + 64 + 64 + 2 * 96 + 96 + 64)
    assert result.trainable == {"gates": gates, "lora": lora, "whole modules": 0}
    layers = {int(re.search(r"layers\.(\d+)", n)[1]) for n, _ in result.model.named_parameters() if "so8t_safe" in n}
    assert layers == set(range(4, 12))
    kinds = {type(m).__name__ for n, m in result.model.named_modules() if n.endswith("base_layer")}
    assert kinds == {"Linear4bit"}
    assert result.model.get_output_embeddings().weight.dtype == torch.float32


def test_gradients_stay_right_after_an_evaluation(cut_down, shared, tmp_path):
    """On a CPU an evaluation-mode forward repacks a 4-bit weight, after which every gradient would be wrong."""
    rows = shared("reasoning/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    overrides = [f"base.path={cut_down}", f"data.train={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'run'}"]
    job = building.build(load_config(TrainConfig, CONFIG, [*overrides, "adapter.lora_dropout=0"]))
    batch = job.collator(job.rows)

    def gradients(model):
        model.train().zero_grad()
        model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    source = torch.Generator().manual_seed(0)
    for parameter in job.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=source))
    before = gradients(job.model)
    with torch.no_grad():
        job.model.eval()(input_ids=batch["input_ids"])
    assert torch.equal(gradients(job.model), before)


def test_the_full_size_plan_fits_the_card_named(shared):
    config = load_config(TrainConfig, CONFIG, [f"base.path={shared('phi35/config.json').parent}"])
    result = plan(config)
    assert (result.parameters, result.gates, result.lora) == (3_821_079_552, 86_016, 50_331_648)
    assert result.fits
    assert result.card.name == "rtx3060-12gb"
    said = re.search(r"expected memory by component: ([\d.]+) GiB", CONFIG.read_text())[1]
    assert f"{result.total / 2**30:.1f}" == said


def test_every_target_exists_in_the_real_model(shared):
    config = load_config(TrainConfig, CONFIG)
    settings = AutoConfig.from_pretrained(shared("phi35/config.json").parent)
    with torch.device("meta"):
        model = building.adapt(AutoModelForCausalLM.from_config(settings), config.adapter)
    adapted = {n.split(".")[-1] for n, m in model.named_modules() if hasattr(m, "so8t_lora_A")}
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert sum(hasattr(m, "so8t_lora_A") for m in model.modules()) == 4 * 32
    assert sum(len(m.so8t_safe) for m in model.modules() if hasattr(m, "so8t_safe")) == 8


def test_the_head_of_a_quantised_base_keeps_its_dtype_unless_asked(cut_down):
    def head(rest):
        overrides = [f"base.path={cut_down}", "loading.dtype=bfloat16", f"loading.float32_rest={rest}"]
        config = load_config(TrainConfig, CONFIG, overrides)
        return building.load_model(str(cut_down), None, config.loading).get_output_embeddings().weight.dtype

    assert head("false") == torch.bfloat16
    assert head("true") == torch.float32
