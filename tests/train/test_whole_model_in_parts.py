"""A model trained whole takes the steps of one batch, in parts one after another and in two processes."""

from pathlib import Path

import pytest

from so8t_torch.core.config import dump_config, parse_config
from so8t_torch.train import run as running
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.folder import read_metrics
from so8t_torch.train.run import run_training
from tests.train.test_processes import launch, same_steps

SIZES = {"d_model": 32, "n_layers": 2, "dropout": 0.0}
FIELDS = {
    # its head is the embedding, and its gates add to the loss
    "phase1": {**SIZES, "ar_ssm_max_rank": 8, "htt_rank": 4, "ar_ssm_l1_regularization": 0.5},
    "phase2": {**SIZES, "num_heads": 2, "head_dim": 16, "memory_chunk": 8},
}
kinds = pytest.mark.parametrize("kind", FIELDS)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    (root / "text.txt").write_text("".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(60)))

    def make(kind, name, **sizes):
        tree = {
            "output_dir": str(root / f"{kind}_{name}"),
            "threads": 1,
            "model": {"kind": kind, "fields": FIELDS[kind]},
            "loading": {"dtype": "float32"},
            "data": {"text": {"source": str(root / "text.txt"), "length": 24, "held_out_share": 0.2}},
            "training": {"max_steps": 2, "warmup": 0.0, "schedule": "constant", "lr": 1e-3, **sizes},
            "recording": {"every_steps": 1, "progress": False, "tensorboard": False},
            "checkpoint": {"every_steps": None},
            "evaluation": {"sample_tokens": 0, "every_steps": 1},
        }
        return parse_config(TrainConfig, tree)

    return make


@pytest.fixture(scope="module")
def whole(settings):
    """The folders of runs of one process with the whole batch, by kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "draw_curves", lambda *_: None)
        return {kind: run_training(settings(kind, "whole", batch_size=8)).directory for kind in FIELDS}


@kinds
def test_a_batch_in_parts_takes_the_same_steps(kind, settings, whole, monkeypatch):
    monkeypatch.setattr(running, "draw_curves", lambda *_: None)
    same_steps(whole[kind], run_training(settings(kind, "parts", batch_size=2, accumulation=4)).directory)
    losses = [row["loss/lm"] for row in read_metrics(whole[kind] / "metrics.jsonl") if row["kind"] == "train"]
    assert len(losses) == 2
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_two_processes_take_the_same_steps(settings, whole, tmp_path):
    configs = [settings(kind, "two", batch_size=4) for kind in FIELDS]
    second = tmp_path / "second.yaml"
    second.write_text(dump_config(configs[1]), encoding="utf-8")
    launch(configs[0], tmp_path, str(Path(__file__).with_name("runs_in_a_row.py")), resume=(str(second),))
    for kind, config in zip(FIELDS, configs, strict=True):
        same_steps(whole[kind], config.output_dir)
