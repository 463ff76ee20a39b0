import importlib.metadata
import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from so8t_torch.adapter import load_adapter
from so8t_torch.core.errors import ConfigError, SO8TError, TrainingError
from so8t_torch.train import checkpoint_state, checkpoints
from so8t_torch.train.environment import environment, git_state
from so8t_torch.train.evaluation import evaluate_run
from so8t_torch.train.folder import RunFolder, read_metrics
from so8t_torch.train.journal import json_line
from so8t_torch.train.run import run_training


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_source, sentences):
    """One finished run with everything switched on."""
    from so8t_torch.core.config import parse_config
    from so8t_torch.train.config import TrainConfig

    tree = {
        "output_dir": str(tmp_path_factory.mktemp("runs") / "whole"),
        "threads": 1,
        "base": {"kind": "pretrained", "path": str(tiny_source)},
        "loading": {"dtype": "float32"},
        "adapter": {"layers_to_transform": [0, 1], "r": 4, "lora_target_modules": ["qkv_proj"]},
        "data": {"train": str(sentences), "eval": str(sentences), "max_length": 34},
        "penalty": {"enabled": True},
        "training": {"max_steps": 6, "batch_size": 2, "lr": 5e-3, "gate_lr": 2e-2},
        "recording": {"every_steps": 2, "progress": True, "tensorboard": True},
        "checkpoint": {"every_steps": 4},
        "evaluation": {"every_steps": 3},
    }
    return run_training(parse_config(TrainConfig, tree))


def test_the_folder_holds_exactly_what_is_promised(finished):
    assert {path.name for path in finished.directory.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "metrics.csv", "events.jsonl", "curves.png"),
        *("tensorboard", "checkpoints", "adapter", "logits", "eval"),
    }
    assert {p.name for p in (finished.directory / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert any((finished.directory / "tensorboard").iterdir())


def test_metrics_carry_every_term_of_every_log(finished):
    rows = read_metrics(finished.directory / "metrics.jsonl")
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == [1, 2, 4, 6]
    wanted = {"loss/lm", "loss/pet", "loss/pet_weighted", "loss/total", "perplexity", "tokens_per_second", "grad_norm"}
    wanted |= {"lr/gates", "lr/matrices", "gate/max_angle", "gate/commutator", "gate_angle/0.o_proj", "pet_weight"}
    assert all(wanted <= row.keys() for row in train)
    held_out = [row for row in rows if row["kind"] == "eval"]
    assert [row["step"] for row in held_out] == [0, 3, 6]
    assert {"eval/lm", "eval/perplexity"} <= held_out[0].keys()


def test_held_out_loss_before_and_after_is_written(finished):
    losses = json.loads((finished.directory / "eval/language_model.json").read_text())
    assert losses["before"] == finished.held_out_before
    assert losses["after"] == finished.held_out_after
    assert losses["after"] < losses["before"]


def test_events_tell_the_story(finished):
    told = events(finished.directory)
    assert [event["event"] for event in told] == ["start", "data", "checkpoint", "checkpoint", "finish"]
    assert told[1]["train"]["truncated"] > 0
    assert re.search(r"sentences\.jsonl:\d+$", told[1]["train"]["truncated_first"][0])
    assert [event["step"] for event in told[2:4]] == [4, 6]
    assert finished.trainable == {"gates": 2 * 8 * 28, "lora": 3 * 4 * (64 + 128), "whole modules": 0}
    assert told[-1]["trainable"] == finished.trainable


def test_the_environment_is_written(finished):
    found = json.loads((finished.directory / "environment.json").read_text())
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert (found["threads"], found["seed"], found["device"]) == (1, 0, "cpu")
    assert found["processor"]


def test_the_picture_is_a_png_of_sensible_size(finished):
    data = (finished.directory / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 600


def test_the_saved_adapter_gives_the_trained_models_logits(finished):
    ids = torch.arange(5, 25)[None]
    again = load_adapter(finished.directory / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, finished.model.eval()(ids).logits)


class StopAfter(TrainerCallback):
    """Ends a run as a crash would: by an error between two steps."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, _args, state, _control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


TIMES = re.compile(r"seconds|second|runtime|time")


def timeless(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not TIMES.search(k)} for row in rows if row["kind"] != "summary"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(settings, tmp_path, sentences, quantization):
    sections = {
        "loading": {"quantization": quantization},
        "data": {"eval": str(sentences)},
        "adapter": {"lora_dropout": 0.2},
        "training": {"max_steps": 8, "batch_size": 2, "accumulation": 2, "gradient_checkpointing": True},
        "recording": {"every_steps": 2},
        "checkpoint": {"every_steps": 4},
        "evaluation": {"every_steps": 4},
    }
    whole = run_training(settings(output_dir=str(tmp_path / "whole"), **sections))
    with pytest.raises(KeyboardInterrupt):
        run_training(settings(**sections), callbacks=[StopAfter(6)])
    resumed = run_training(settings(**sections), resume="auto")
    assert resumed.steps == 8
    left, right = (load_file(run.directory / "adapter/adapter_model.safetensors") for run in (whole, resumed))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert timeless(whole.directory) == timeless(resumed.directory)
    assert (whole.held_out_before, whole.held_out_after) == (resumed.held_out_before, resumed.held_out_after)
    assert [e["event"] for e in events(resumed.directory)][2:5] == ["checkpoint", "resume", "data"]


def test_resuming_from_a_named_checkpoint(settings, tmp_path):
    sections = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 2}}
    run_training(settings(**sections))
    again = run_training(settings(**sections), resume=str(tmp_path / "run/checkpoints/checkpoint-2"))
    assert again.steps == 4


def test_a_full_folder_is_never_written_over(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/precious").write_text("kept")
    with pytest.raises(ConfigError, match="not empty"):
        run_training(settings())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]
    assert (tmp_path / "run/precious").read_text() == "kept"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"data": {"train": "absent.jsonl"}}, "absent.jsonl: no such file"),
        ({"data": {"template": "absent.jinja"}}, "data.template: no file at absent.jinja"),
        ({"base": {"path": "./absent"}}, r"base.path './absent': no tokenizer can be read there"),
        ({"adapter": {"lora_target_modules": ["q_proj"]}}, "lora_target_modules: 'q_proj' matches nothing"),
    ],
)
def test_settings_that_cannot_be_built_leave_no_folder_behind(settings, tmp_path, change, named):
    with pytest.raises(SO8TError, match=named):
        run_training(settings(**change))
    assert not (tmp_path / "run").exists()


def test_a_base_without_weights_is_named(settings, tiny_source, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_source, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ConfigError, match="no model can be read there"):
        run_training(settings(base={"path": str(bare)}))


def test_a_run_that_ended_before_its_first_checkpoint_says_how_to_go_on(settings):
    with pytest.raises(KeyboardInterrupt):
        run_training(settings(), callbacks=[StopAfter(1)])
    with pytest.raises(ConfigError, match="holds no checkpoint to go on from: remove it"):
        run_training(settings())
    sections = {"training": {"max_steps": 2}, "checkpoint": {"every_steps": 2}}
    sections["output_dir"] = str(settings().output_dir / "inner")
    run_training(settings(**sections))
    with pytest.raises(ConfigError, match="go on with --resume auto"):
        run_training(settings(**sections))


def test_a_folder_in_which_a_process_trains_is_refused(settings):
    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            del args, state, control, kwargs
            with pytest.raises(ConfigError, match="another process trains in this folder"):
                RunFolder(config.output_dir).start("auto", config)

    config = settings(training={"max_steps": 2}, checkpoint={"every_steps": 1})
    run_training(config, callbacks=[Second()])
    RunFolder(config.output_dir).start("auto", config)
    with RunFolder(config.output_dir).held():
        for resume in (None, "auto"):
            with pytest.raises(ConfigError, match="another process trains in this folder"):
                run_training(config, resume=resume)


def test_a_file_in_place_of_the_run_folder_is_named(settings, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConfigError, match="file: expected a folder or nothing at output_dir"):
        run_training(settings(output_dir=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "kept"


def test_a_run_whose_settings_file_is_gone_goes_on(settings):
    config = settings(training={"max_steps": 2}, checkpoint={"every_steps": 2})
    folder = run_training(config).directory
    before = (folder / "config.yaml").read_text()
    (folder / "config.yaml").unlink()
    run_training(config, resume="auto")
    assert (folder / "config.yaml").read_text() == before


def test_the_summary_says_what_happened_and_what_comes_next(finished):
    lines = finished.summary().splitlines()
    assert lines[0].startswith("6 steps in ")
    assert lines[0].endswith(f"numbers trained: {2 * 8 * 28} in gates, {3 * 4 * (64 + 128):,} in lora")
    assert f"{finished.held_out_before:.4f} → {finished.held_out_after:.4f}" in lines[1]
    cut = next(event for event in events(finished.directory) if event["event"] == "data")["train"]["truncated"]
    assert lines[2].startswith(f"{cut} conversations were cut")
    assert lines[-1] == f"next: so8t bake {finished.directory / 'adapter'} {finished.directory / 'baked'}"


def test_resume_without_a_checkpoint_says_so(settings, tmp_path):
    with pytest.raises(ConfigError, match="--resume auto: no complete checkpoint"):
        run_training(settings(), resume="auto")
    with pytest.raises(ConfigError, match=r"--resume .*checkpoint-9: no complete checkpoint"):
        run_training(settings(), resume=str(tmp_path / "checkpoint-9"))


def test_an_unfinished_checkpoint_is_passed_over(settings, tmp_path):
    sections = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 2}}
    run_training(settings(**sections))
    (tmp_path / "run/checkpoints/checkpoint-9").mkdir()
    run_training(settings(**sections), resume="auto")
    resumed = next(e for e in events(tmp_path / "run") if e["event"] == "resume")
    assert resumed["checkpoint"].endswith("checkpoint-4")


PLACES = {
    "before the weights": (checkpoint_state, "write_model"),
    "before the optimiser": (checkpoint_state, "write_packed"),
    "before the seal": (checkpoints, "write_bytes"),
    "before the name": (Path, "rename"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(settings, tmp_path, monkeypatch, place):
    sections = {"training": {"max_steps": 6}, "checkpoint": {"every_steps": 2}}
    whole = run_training(settings(output_dir=str(tmp_path / "whole"), **sections))
    owner, name = PLACES[place]
    real = getattr(owner, name)

    def killed(*arguments, **options):
        if any("checkpoint-4.tmp-" in str(argument) for argument in arguments):
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run_training(settings(**sections))
    folder = tmp_path / "run/checkpoints"
    assert not (folder / "checkpoint-4").exists()
    assert list(folder.glob("checkpoint-4.tmp-*"))
    resumed = run_training(settings(**sections), resume="auto")
    told = next(e for e in events(tmp_path / "run") if e["event"] == "resume")
    assert told["checkpoint"].endswith("checkpoint-2")
    assert not list(folder.glob("*.tmp-*"))
    left, right = (load_file(run.directory / "adapter/adapter_model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_resume_with_other_settings_is_another_run(settings):
    sections = {"training": {"max_steps": 2}, "checkpoint": {"every_steps": 2}}
    run_training(settings(**sections))
    other = settings(training={"max_steps": 2, "lr": 1.0}, checkpoint={"every_steps": 2}, data={"template": "t.jinja"})
    with pytest.raises(ConfigError) as caught:
        run_training(other, resume="auto")
    told = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert told == ['data.template: null then, "t.jinja" now', "training.lr: 0.005 then, 1.0 now"]


def test_the_seed_decides_the_run(settings, tmp_path):
    weights = []
    for place, seed in enumerate((1, 1, 2)):
        run = run_training(settings(seed=seed, output_dir=str(tmp_path / str(place))))
        weights.append(load_file(run.directory / "adapter/adapter_model.safetensors"))
    first, second, third = weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_a_dry_run_prints_and_writes_nothing(settings, tmp_path, capsys):
    result = run_training(settings(card="rtx3060-12gb"), dry_run=True)
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert result.steps == 0
    assert "⟦ALLOW: the blue valve" in printed
    assert "rtx3060-12gb" in printed
    assert str(sum(row.supervised for row in _rows(settings()))) in printed


def _rows(config):
    from so8t_torch.train import building

    return building.build(config).rows


def test_lora_alone_and_gates_alone_run(settings, tmp_path):
    lora = {"target_modules": [], "layers_to_transform": None, "r": 4, "lora_target_modules": ["qkv_proj"]}
    only = run_training(settings(adapter=lora, penalty={"enabled": False}, output_dir=str(tmp_path / "lora")))
    assert only.trainable == {"gates": 0, "lora": 3 * 4 * (64 + 128), "whole modules": 0}
    gates = {"r": 0, "lora_target_modules": None}
    only = run_training(settings(adapter=gates, output_dir=str(tmp_path / "gates")))
    assert only.trainable == {"gates": 2 * 8 * 28, "lora": 0, "whole modules": 0}


def test_triage_is_measured_at_the_end_and_again_from_the_folder(settings, sentences):
    sections = {"data": {"eval": str(sentences)}, "evaluation": {"triage": True, "batch_size": 4}}
    result = run_training(settings(**sections))
    path = result.directory / "eval/triage.json"
    written = path.read_text()
    assert written == result.triage.to_json()
    path.unlink()
    assert evaluate_run(result.directory).to_json() == written
    assert path.read_text() == written
    path.unlink()
    assert evaluate_run(result.directory, data=sentences).to_json() == written
    assert not path.exists()


def test_a_folder_without_a_finished_run_cannot_be_evaluated(tmp_path):
    with pytest.raises(ConfigError, match="no finished run here"):
        evaluate_run(tmp_path)


def test_a_number_that_is_not_finite_is_never_written(tmp_path):
    for number in (float("nan"), float("inf")):
        with pytest.raises(TrainingError, match="not finite"):
            json_line({"loss": number}, tmp_path / "metrics.jsonl")


def test_a_file_outside_any_checkout_has_no_commit(tmp_path):
    source = tmp_path / "copy.py"
    source.write_text("")
    assert git_state(source) is None
    assert environment(3)["seed"] == 3


@pytest.mark.parametrize(
    "loading",
    [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "nf4"}, {"quantization": "int8"}],
    ids=["bfloat16", "nf4 in bfloat16", "int8"],
)
def test_every_way_of_loading_the_base_trains(settings, sentences, loading):
    training = {"max_steps": 6, "batch_size": 6, "warmup": 0.0, "gradient_checkpointing": True, "lr": 1e-2}
    result = run_training(settings(loading=loading, data={"eval": str(sentences)}, training=training))
    assert result.held_out_after < result.held_out_before
    kinds = {p.dtype for p in result.model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}


def test_routed_gates_train_both_factors(settings):
    adapter = {"train_gates": "routed", "r": 0, "lora_target_modules": None}
    result = run_training(settings(adapter=adapter, training={"max_steps": 4, "batch_size": 6, "warmup": 0.0}))
    moved = [p.norm() for p in result.model.parameters() if p.requires_grad]
    assert len(moved) == 4
    assert min(moved) > 0.1
    rows = read_metrics(result.directory / "metrics.jsonl")
    assert rows[-2]["gate/commutator"] > 1e-4
