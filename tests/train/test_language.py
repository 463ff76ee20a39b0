"""A language model trained whole on text: its loss, its recovery, its folder, and what it writes."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import TrainerCallback
from typer.testing import CliRunner

from so8t_torch.core.config import load_config, parse_config
from so8t_torch.core.errors import ConfigError, TrainingError
from so8t_torch.data.packing import byte_tokenizer
from so8t_torch.models import streaming
from so8t_torch.models.streaming import Drawing, Writing
from so8t_torch.train import language
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.evaluation import evaluate_run
from so8t_torch.train.folder import read_metrics
from so8t_torch.train.plan import plan
from so8t_torch.train.run import run_training
from so8t_torch.train.sharding import prepare_sharding
from tests.faults.kills import TIMES

FIELDS = {
    "phase1": {"d_model": 32, "n_layers": 2, "ar_ssm_max_rank": 8, "htt_rank": 4},
    "phase2": {"d_model": 32, "n_layers": 2, "num_heads": 2, "head_dim": 16, "memory_chunk": 8},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
}
TEXT = "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(300))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.py").write_text(TEXT[67 * number : 67 * number + 300])
    return folder


@pytest.fixture(scope="module")
def settings(source, tmp_path_factory):
    def make(kind="phase2", **sections):
        tree = {
            "output_dir": str(tmp_path_factory.mktemp("runs") / "run"),
            "threads": 1,
            "model": {"kind": kind, "fields": FIELDS[kind]},
            "loading": {"dtype": "float32"},
            "data": {"text": {"source": str(source), "length": 24, "held_out_share": 0.2}},
            "training": {"max_steps": 6, "batch_size": 4, "lr": 1e-2, "beta2": 0.95, "loss_chunk": 32},
            "recording": {"every_steps": 2, "progress": False, "tensorboard": False},
            "checkpoint": {"every_steps": 2},
            "evaluation": {"sample_tokens": 8},
        }
        for name, value in sections.items():
            tree[name] = {**tree[name], **value} if isinstance(value, dict) and name in tree else value
        return parse_config(TrainConfig, tree)

    return make


@pytest.fixture(scope="module")
def finished(settings):
    config = settings(
        evaluation={"baselines": True, "every_steps": 3, "sample_tokens": 12},
        logits={"save_logits": True, "save_logits_steps": 3, "save_logits_mode": "full"},
    )
    return run_training(config)


def numbers(folder):
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] != "summary"]
    kept = [{name: value for name, value in row.items() if not TIMES.search(name)} for row in rows]
    return kept, load_file(folder / "model/model.safetensors")


def test_the_folder_holds_a_model_that_loads_and_a_sample(finished):
    assert {path.name for path in (finished.directory / "model").iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json"),
    }
    assert not (finished.directory / "adapter").exists()
    model, tokenizer = streaming.load(finished.directory)
    ids = torch.tensor([tokenizer("def f").input_ids])
    torch.testing.assert_close(model(ids).logits, finished.model.eval()(ids).logits, rtol=0, atol=0)
    assert (finished.directory / "eval/sample.txt").read_text() == finished.ending.sample + "\n"
    assert "so8t generate" in finished.summary()
    assert load_config(TrainConfig, finished.directory / "config.yaml").model.kind == "phase2"


def test_held_out_text_is_told_in_bits_per_byte_beside_the_baselines(finished):
    told = json.loads((finished.directory / "eval/language_model.json").read_text())
    assert told["after"] < told["before"]
    rows = [row for row in read_metrics(finished.directory / "metrics.jsonl") if row["kind"] == "eval"]
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert rows[-1]["eval/bits_per_byte"] == pytest.approx(told["bits_per_byte"], rel=1e-9)
    job = language.build(load_config(TrainConfig, finished.directory / "config.yaml"))
    by_hand = told["after"] * 24 * len(job.held_out) / math.log(2) / job.held_out.bytes
    assert told["bits_per_byte"] == pytest.approx(by_hand, rel=1e-12)
    assert told["baselines_bits_per_byte"].keys() == {"kneser_ney_6_gram", "gzip", "xz_after_training_text"}


@pytest.mark.parametrize("kind", FIELDS)
def test_the_loss_is_the_cross_entropy_of_the_model_s_logits(kind, settings):
    job = language.build(settings(kind))
    batch = job.collator(job.held_out[:])
    names = {"llama": ["position_ids"], "mamba": []}.get(kind, ["segment_ids"])
    with torch.no_grad():
        logits = job.model.eval()(batch["input_ids"], **{name: batch[name] for name in names}).logits[:, :-1]
    wanted = functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
    config = settings(kind, training={"max_steps": 1}, evaluation={"sample_tokens": 0})
    result = run_training(config)
    rows = read_metrics(result.directory / "metrics.jsonl")
    assert next(row for row in rows if row["step"] == 0)["eval/lm"] == pytest.approx(wanted.item(), rel=1e-6)
    assert ("documents of a row are not kept apart" in result.summary()) is (not names)


def test_no_document_sees_the_one_before_it(settings):
    job = language.build(settings())
    batch = job.collator(job.rows[:4])
    end = int((batch["input_ids"][0] == 256).nonzero()[-1]) if (batch["input_ids"][0] == 256).any() else 12
    batch["segment_ids"][0] = (torch.arange(25) >= end).long()
    other = batch["input_ids"].clone()
    other[0, :end] = 65
    both = [
        job.model.eval()(ids, segment_ids=batch["segment_ids"]).logits[0, end:] for ids in (batch["input_ids"], other)
    ]
    assert torch.equal(*both)


class Dies(TrainerCallback):
    """Ends a run between two steps, as a crash would."""

    def on_step_begin(self, _args, state, _control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["phase1", "phase2"])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(kind, settings):
    options = {"data": {"text": {**settings().data.text.model_dump(), "tokenizer": "bpe", "vocabulary": 300}}}
    whole = run_training(settings(kind, **options))
    config = settings(kind, **options)
    with pytest.raises(KeyboardInterrupt):
        run_training(config, callbacks=[Dies()])
    resumed = run_training(config, resume="auto")
    (rows, weights), (others, found) = numbers(whole.directory), numbers(resumed.directory)
    assert rows == others
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    assert whole.ending == resumed.ending


class Breaks(TrainerCallback):
    """Makes a weight's gradient NaN in one step."""

    def on_train_begin(self, _args, state, _control, model=None, **_):
        weight = model.get_input_embeddings().weight
        weight.register_hook(lambda gradient: gradient * math.nan if state.global_step == 3 else gradient)


def test_a_broken_step_is_dropped_and_the_run_goes_on(settings):
    result = run_training(settings(), callbacks=[Breaks()])
    told = [json.loads(line) for line in (result.directory / "events.jsonl").read_text().splitlines()]
    found = [row for row in told if row["event"] == "recovery"]
    assert [(row["step"], row["stage"]) for row in found if row["transition"] == "fault"] == [(4, "skip")]
    assert result.steps == 6
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_logits_are_saved(finished):
    assert len(list((finished.directory / "logits").glob("*.safetensors"))) == 2


def test_what_the_model_adds_to_the_loss_is_in_it_and_told(settings):
    config = settings(
        "phase1", model={"kind": "phase1", "fields": {**FIELDS["phase1"], "ar_ssm_l1_regularization": 0.5}}
    )
    rows = read_metrics(run_training(config).directory / "metrics.jsonl")
    row = next(row for row in rows if row["kind"] == "train")
    assert row["loss/aux"] > 0.01
    assert row["loss/total"] == pytest.approx(row["loss/lm"] + row["loss/aux"], rel=1e-5)


CONTRADICTIONS = {
    "exactly one of base .* and model": {"base": {"kind": "scratch"}},
    "adapter is for a frozen base": {"adapter": {"r": 4}},
    "loading.quantization nf4 is for a frozen base": {"loading": {"quantization": "nf4"}},
    "has no gates": {"penalty": {"enabled": True}},
    "learns from data.text": {"data": {"text": None, "train": "x.jsonl"}},
    "exactly one of train": {"data": {"train": "x.jsonl"}},
    "data.text has none": {"evaluation": {"triage": True}},
    "vocabulary belongs to the tokenizer bpe": {"data": {"text": {"tokenizer": "bpe"}}},
}


@pytest.mark.parametrize("said", CONTRADICTIONS)
def test_settings_that_contradict_are_refused(said, settings):
    with pytest.raises(ConfigError, match=said):
        settings(**CONTRADICTIONS[said])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kind": "phase2", "fields": {"d_modell": 8}}, "d_model"),
        ({"kind": "phase2", "preset": "tiny"}, "small"),
        ({"kind": "phase2", "fields": {"memory_chunk": 32}}, "ends within one memory_chunk of 32"),
        ({"kind": "llama", "fields": {"hiddensize": 8}}, "did you mean 'hidden_size'"),
        ({"kind": "llama", "preset": "small"}, "has no presets"),
        ({"kind": "mamba", "fields": {"hidden_size": "wide"}}, "MambaConfig refuses them"),
    ],
)
def test_models_that_do_not_exist_are_refused_before_anything_is_written(section, said, settings):
    config = settings()
    config = parse_config(TrainConfig, {**config.model_dump(mode="json"), "model": section})
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_training(config)
    assert not config.output_dir.exists()


def test_a_dry_run_prints_and_writes_nothing(settings, capsys):
    config = settings()
    assert run_training(config, dry_run=True).steps == 0
    assert "every token is learned" in capsys.readouterr().out
    assert not config.output_dir.exists()


def test_the_plan_counts_the_model_and_its_moments(settings):
    config = settings("phase1")
    counted = plan(config)
    numbers = sum(p.numel() for p in language.build(config).model.parameters())
    assert counted.parameters == numbers
    sizes = {part.name: part.size for part in counted.components}
    assert (sizes["parameters"], sizes["gradients"], sizes["optimiser states"]) == (
        4 * numbers,
        4 * numbers,
        8 * numbers,
    )
    assert sizes["activations"] > 0
    with pytest.raises(ConfigError, match="not llama"):
        plan(settings("llama"))


def test_shards_of_a_head_that_is_no_part_of_the_model_are_refused(settings):
    model = language.build(settings("phase1")).model
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False)
    with pytest.raises(TrainingError, match="is not whole behind the model"):
        prepare_sharding(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model, "adamw_torch")


def test_decisions_of_a_language_model_are_refused(finished):
    with pytest.raises(ConfigError, match="this run trained a whole model on text"):
        evaluate_run(finished.directory)


def test_text_comes_in_pieces_that_are_the_generated_text(finished):
    model, tokenizer = streaming.load(finished.directory)
    ids = torch.tensor([[256, *tokenizer("def ").input_ids]])
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False)
    writing = Writing(model, tokenizer, "def ", Drawing(40, 0.0))
    pieces = list(writing)
    assert "".join(pieces) == tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert writing.tokens == wanted.shape[1] - ids.shape[1]


def test_the_state_does_not_grow_and_a_seed_repeats_a_text(finished):
    model, tokenizer = streaming.load(finished.directory)
    sizes, texts = set(), set()
    for tokens in (10, 60, 60):
        writing = Writing(model, tokenizer, "def ", Drawing(tokens, 1.5, seed=3))
        before = torch.get_rng_state()
        texts.add("".join(writing))
        assert torch.equal(before, torch.get_rng_state())
        sizes.add(writing.state_bytes)
    assert len(sizes) == 1
    assert 0 < sizes.pop() < 10_000
    assert len(texts) == 2


def test_an_error_while_writing_is_raised_and_does_not_hang(finished, monkeypatch):
    monkeypatch.setattr(type(finished.model), "forward", None)
    with pytest.raises(TypeError):
        list(Writing(finished.model, byte_tokenizer(), "x"))


def test_the_command_writes_a_text_and_its_state(finished):
    from so8t_torch.cli import app

    done = CliRunner().invoke(app, ["generate", str(finished.directory), "--prompt", "def ", "--tokens", "20"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("def ")
    assert re.search(r"\d+ tokens, .* a second; state of [\d,]+ bytes behind \d+ tokens", done.output)


@pytest.mark.parametrize("drawing", [{"tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}])
def test_draws_that_make_no_sense_are_refused(drawing):
    with pytest.raises(ConfigError, match=f"No text can be drawn with {next(iter(drawing))}"):
        Drawing(**drawing)


def test_a_prompt_that_is_no_text_is_refused(finished):
    with pytest.raises(ConfigError, match="is no text in UTF-8"):
        Writing(finished.model, finished.tokenizer, "a\udcff")


def test_a_place_where_no_folder_can_be_made_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir .*file/run: no folder can be made there"):
        run_training(settings(output_dir=str(tmp_path / "file/run")))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a run that trained a whole model"):
        streaming.load(tmp_path)
