"""The quick start in a tiny form, from the base to the folded weights: every file, every number in its place."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from so8t_torch.core.errors import ConfigError
from so8t_torch.train.comparison import findings
from so8t_torch.train.demo import VARIANTS, clear, run_demo

TINY = (
    "threads=1",
    "base.hidden_size=32",
    "base.layers=1",
    "base.vocabulary=600",
    "base.tellings=1",
    "base.steps=4",
    "base.batch_size=8",
    "base.text_rows=2",
    "base.text_characters=50000",
    "data.scenarios.held_out_tellings=1",
    "data.scenarios.train_tellings=1",
    "training.max_steps=4",
    "training.batch_size=8",
    "checkpoint.every_steps=null",
    "recording.every_steps=2",
    "recording.tensorboard=false",
    "recording.progress=false",
    "evaluation.batch_size=128",
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder, text = tmp_path_factory.mktemp("demo"), io.StringIO()
    comparison = run_demo(folder, overrides=TINY, console=Console(file=text, width=100))
    return folder, comparison, text.getvalue()


def high_water_gib() -> float:
    """Peak resident memory of this process in GiB, as the kernel states it in /proc."""
    if sys.platform != "linux":
        pytest.skip("/proc/self/status exists on Linux only")
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 2**20


def test_each_variant_trains_what_its_name_says(shown):
    _, comparison, _ = shown
    trained = {outcome.name: outcome.trainable for outcome in comparison.outcomes}
    # one gated layer of width 32: four blocks of 28 numbers; LoRA of rank 8 on four projections
    lora = 8 * ((32 + 96) + (32 + 32) + (32 + 128) + (64 + 32))
    assert trained == {"base": 0, "lora": lora, "gates": 4 * 28, "lora_gates": lora + 4 * 28}
    geometry = {outcome.name: len(outcome.geometry) for outcome in comparison.outcomes}
    assert geometry == {"base": 0, "lora": 0, "gates": 1, "lora_gates": 1}


def test_summary_and_runs_are_written_and_agree(shown):
    folder, comparison, _ = shown
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["variants"]) == {"base", *VARIANTS}
    for name in VARIANTS:
        run = json.loads((folder / name / "eval" / "triage.json").read_text())
        assert run == summary["variants"][name]["held_out_all"]
        losses = json.loads((folder / name / "eval" / "running_text.json").read_text())
        assert losses["before"] == summary["variants"]["base"]["text_loss"]
        assert losses["after"] == summary["variants"][name]["text_loss"]
        parts = summary["variants"][name]["held_out"]
        assert sum(part["records"] for part in parts.values()) == run["records"]
        hits = sum(part["likelihood"]["accuracy"]["hits"] for part in parts.values())
        assert hits == run["likelihood"]["accuracy"]["hits"]
    assert summary["machine"]["threads"] == 1
    assert summary["machine"]["peak_rss_gib"] == pytest.approx(high_water_gib(), rel=0.01, abs=0.05)
    assert comparison.seconds["whole"] > 0


def test_the_folded_weights_load_as_a_plain_model(shown):
    folder, comparison, _ = shown
    model, tokenizer = (kind.from_pretrained(folder / "baked") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert not any("so8t" in name or "lora" in name for name, _ in model.named_parameters())
    with torch.inference_mode():
        assert model(**tokenizer("炉の温度は高め。", return_tensors="pt")).logits.isfinite().all()
    assert comparison.baked.written.max_abs <= comparison.baked.tolerance


def test_terminal_markdown_and_picture_show_every_variant(shown):
    folder, comparison, text = shown
    markdown = (folder / "summary.md").read_text()
    for title in ("base alone", "LoRA", "gates", "LoRA + gates", "one label"):
        assert title in text
        assert f"| {title} |" in markdown
    assert "unsafe allow" in text
    assert all(sentence in markdown for sentence in findings(comparison))
    with Image.open(folder / "comparison.png") as picture:
        assert picture.width > 1000


def test_a_folder_with_something_else_is_never_removed(shown):
    folder, *_ = shown
    (folder / "lora" / "events.jsonl").rename(folder / "kept.jsonl")
    with pytest.raises(ConfigError, match="holds no run of the quick start"):
        run_demo(folder, overrides=TINY, console=Console(file=io.StringIO()))
    assert (folder / "lora" / "adapter").is_dir()


def test_what_an_earlier_quick_start_left_is_replaced_with_a_message_and_the_base_is_kept(tmp_path):
    (tmp_path / "bases").mkdir()
    (tmp_path / "gates").mkdir()
    (tmp_path / "gates" / "events.jsonl").write_text("{}")
    text = io.StringIO()
    clear(tmp_path, Console(file=text, width=200))
    assert not (tmp_path / "gates").exists()
    assert (tmp_path / "bases").is_dir()
    assert f"replacing {tmp_path / 'gates'}" in text.getvalue().replace("\n", "")


def test_a_mistyped_setting_is_answered_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="max_steps"):
        run_demo(tmp_path, overrides=["training.max_step=3"], console=Console(file=io.StringIO()))
    assert not any(tmp_path.iterdir())
