"""A run that begins from a saved model: Phase 1 is trained, converted by the command, and trained on as Phase 2."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from typer.testing import CliRunner

from so8t_torch.cli import app
from so8t_torch.core.config import dump_config, parse_config
from so8t_torch.core.errors import CheckpointError, ConfigError
from so8t_torch.data.packing import byte_tokenizer
from so8t_torch.models.factory import create_phase1_model
from so8t_torch.models.stored import read_model
from so8t_torch.train import language
from so8t_torch.train import run as running
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.folder import read_metrics
from so8t_torch.train.plan import plan
from so8t_torch.train.run import run_training

TEXT = "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(120))
PHASE_1 = {"d_model": 32, "n_layers": 2, "ar_ssm_max_rank": 8, "htt_rank": 4, "dropout": 0.0}
PAIRS = {"tokenizer": "bpe", "vocabulary": 300}


@pytest.fixture(autouse=True)
def without_picture(monkeypatch):
    """Drawing takes longer than a few steps of a tiny model."""
    monkeypatch.setattr(running, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("continuing")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def settings(root):
    def make(name, model, text=None, **sections):
        tree = {
            "output_dir": str(root / name),
            "threads": 1,
            "model": model,
            "loading": {"dtype": "float32"},
            "data": {"text": {"source": str(root / "text.txt"), "length": 24, "held_out_share": 0.2, **(text or {})}},
            "training": {"max_steps": 4, "batch_size": 200, "lr": 1e-2, "warmup": 0.0},
            "recording": {"every_steps": 1, "progress": False, "tensorboard": False},
            "checkpoint": {"every_steps": 1},
            "evaluation": {"sample_tokens": 0, "batch_size": 200},
        }
        return parse_config(TrainConfig, tree | sections)

    return make


def said(*arguments, status=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == status, done.output
    return done.output


def trained(config, root):
    path = root / f"{config.output_dir.name}.yaml"
    path.write_text(dump_config(config))
    return said("train", path)


@pytest.fixture(scope="module")
def converted(settings, root):
    """A Phase 1 model after four steps, and the Phase 2 model that the command made of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "draw_curves", lambda *_: None)
        trained(settings("phase1", {"kind": "phase1", "fields": PHASE_1}, PAIRS), root)
    told = said("convert", root / "phase1", root / "phase2")
    assert "model.embed_tokens.core1" in told
    assert f"next: so8t train CONFIG --set 'model={{kind: phase2, init_from: {root / 'phase2'}}}'\n" in told
    return root / "phase2"


def begun(folder, **fields):
    return {"kind": "phase2", "init_from": str(folder), "fields": {"memory_chunk": 8, **fields}}


def losses(model, rows, collator):
    batch = collator(rows[:])
    with torch.no_grad():
        logits = model(batch["input_ids"], segment_ids=batch["segment_ids"]).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten()).item()


def test_training_goes_on_where_the_converted_model_stands(settings, root, converted):
    config = settings("on", begun(converted))
    trained(config, root)
    rows = read_metrics(root / "on/metrics.jsonl")
    job = language.build(config)
    assert len(job.tokenizer) == 300, "the tokenizer is that of Phase 1, not the bytes of this text section"
    model = read_model(converted).eval()
    model.config.memory_chunk = 8
    for block in model.model.layers:
        block.memory.chunk = 8
    first = {row["kind"]: row for row in reversed(rows) if row["step"] in (0, 1)}
    assert first["eval"]["eval/lm"] == pytest.approx(losses(model, job.held_out, job.collator), rel=1e-6)
    assert first["train"]["loss/lm"] == pytest.approx(losses(model, job.rows, job.collator), rel=1e-6)
    evaluated = [row["eval/lm"] for row in rows if row["kind"] == "eval"]
    assert evaluated[-1] < evaluated[0]
    after = read_model(root / "on/model")
    given = dict(read_model(converted).named_parameters())
    assert all(not torch.equal(value, given[name]) for name, value in after.named_parameters())
    assert (after.config.n_seq, after.config.memory_chunk) == (model.config.n_seq, 8)


def test_a_start_that_changed_is_noticed_on_resume(settings, root, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "start")
    config = settings("resumed", begun(folder), training={"max_steps": 2, "batch_size": 2})
    run_training(config)
    shutil.rmtree(root / "resumed/checkpoints/checkpoint-2")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    tensors = load_file(path)
    tensors["model.norm.bias"][0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"began from another model: model\.safetensors \(other numbers\)"):
        run_training(config, resume="auto")
    path.write_bytes(whole)
    assert run_training(config, resume="auto").steps == 2


FIELDS = {
    "d_model": (64, r"model\.fields\.d_model: 64, and 32 in the folder$"),
    "n_layers": (3, r"model\.fields\.n_layers: 3, and 2 in the folder$"),
    "hebbian_enabled": (False, r"model\.fields\.hebbian_enabled: False, and True in the folder$"),
    "tie_word_embeddings": (False, r"model\.fields\.tie_word_embeddings: False, and True in the folder$"),
    "d_modell": (64, "d_modell is no field: did you mean d_model"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_change_a_tensor_are_refused_by_name(name, settings, converted):
    value, told = FIELDS[name]
    config = settings("refused", begun(converted, **{name: value}))
    with pytest.raises(ConfigError, match=told):
        run_training(config)
    assert not config.output_dir.exists()


def test_what_the_folder_is_not_is_told(settings, root, converted, tmp_path):
    cases = [
        (root / "phase1", "expected a model of model.kind 'phase2', got one of type 'so8t_phase1'. Convert it first"),
        (tmp_path, "expected a run that trained a whole model"),
        (tmp_path / "nothing", "expected a run that trained a whole model"),
    ]
    for folder, told in cases:
        with pytest.raises(ConfigError, match=re.escape(told)):
            language.build(settings("refused", begun(folder)))
    with pytest.raises(ConfigError, match="init_from brings its own configuration"):
        settings("refused", {"kind": "phase2", "init_from": str(converted), "preset": "small"})


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_is_none_is_a_usage_error(seed, tmp_path):
    assert "--seed" in said("convert", tmp_path, tmp_path / "out", "--seed", seed, status=2)


def test_broken_weights_are_refused_before_a_run_folder_is_made(settings, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "start")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.bias"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = settings("broken", begun(folder))
    with pytest.raises(CheckpointError, match=r"NaN or infinity in model\.norm\.bias"):
        run_training(config)
    assert not config.output_dir.exists()


def test_the_tokenizer_is_the_folder_s_or_of_the_same_size(settings, converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "start")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"knows 300 tokens, the tokenizer of data\.text has 257.*mismatched"):
        language.build(settings("refused", begun(folder)))
    assert len(language.build(settings("refused", begun(folder), PAIRS)).tokenizer) == 300
    create_phase1_model(vocab_size=200, **PHASE_1, seed=0).save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match="its tokenizer has 257 tokens, its model knows 200"):
        language.build(settings("refused", {"kind": "phase1", "init_from": str(tmp_path / "small")}))
    (tmp_path / "small/tokenizer.json").unlink()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 7}))
    assert language.build(settings("refused", begun(folder), PAIRS)).model.config.eos_token_id == 7


def test_the_plan_is_that_of_the_folder_s_model(settings, converted):
    counted = sum(parameter.numel() for parameter in read_model(converted).parameters())
    assert plan(settings("planned", begun(converted))).parameters == counted


def test_the_vocabulary_is_no_setting(settings):
    with pytest.raises(ConfigError, match=r"model\.fields\.vocab_size 64: the tokenizer sets it"):
        settings("refused", {"kind": "phase2", "fields": {"vocab_size": 64}})


@pytest.mark.parametrize(
    ("kind", "preset", "asked", "wanted"),
    [
        ("phase1", "10gb", None, True),
        ("phase1", "10gb", False, False),
        ("phase1", "24gb", None, False),
        ("phase1", "24gb", True, True),
        ("phase2", None, None, False),
    ],
)
def test_a_preset_s_checkpointing_holds_unless_the_run_says_otherwise(kind, preset, asked, wanted, settings, tmp_path):
    from so8t_torch.train.building import training_arguments

    training = {"max_steps": 1, "gradient_checkpointing": asked}
    config = settings("preset", {"kind": kind, "preset": preset}, training=training)
    assert config.checkpointing is wanted
    assert training_arguments(config, tmp_path).gradient_checkpointing is wanted
