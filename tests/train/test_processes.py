"""Two processes with half the batch each take the steps of one process with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from so8t_torch.adapter import gate_summary, load_adapter
from so8t_torch.core.config import dump_config
from so8t_torch.train.checkpoints import verify
from so8t_torch.train.folder import read_metrics
from so8t_torch.train.run import run_training


def launch(config, tmp_path, *command, resume=(), **variables):
    """Train in two processes and return the run folder."""
    path = tmp_path / f"{config.output_dir.name}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    # standalone: the launcher keeps the port it was given, so nobody takes it in between
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, *command, "train", str(path), *resume],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return config.output_dir


SECTIONS = {
    "penalty": {"enabled": True, "weights": [1.0, 1.0, 1.0]},
    "checkpoint": {"every_steps": 1},
    # Adam's first step goes by the sign, also of gradients that are mere rounding; with this order there are none
    "seed": 1,
}
STEPS = {"max_steps": 2, "warmup": 0.0, "schedule": "constant"}
COMPARED = {"loss/lm", "loss/pet", "loss/total", "grad_norm", "supervised_tokens", "eval/lm", "eval/supervised_tokens"}


@pytest.fixture
def one(settings, sentences):
    """The folder of the run of one process with the whole batch."""
    config = settings(training={**STEPS, "batch_size": 6}, data={"eval": str(sentences)}, **SECTIONS)
    return run_training(config).directory


def same_steps(one, two):
    """Compare two runs.

    Step 2 begins from weights that step 1's gradients made: its loss, its norm and the held-out loss after it agree
    only if the processes shared those gradients.
    """
    for left, right in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (one, two)), strict=True):
        assert (left["step"], left["kind"]) == (right["step"], right["kind"])
        assert left.keys() == right.keys()
        for name in COMPARED & left.keys():
            assert left[name] == pytest.approx(right[name], rel=1e-5), (left["step"], name)
    assert (two / "events.jsonl").read_text().count('"start"') == 1


def resumed_equals_uninterrupted(config, tmp_path, *command, **variables):
    """Do the last step of a run again from its first checkpoint, which changes no bit of what it leaves."""
    written = [config.output_dir / "checkpoints/checkpoint-2" / name for name in ("adapter_model", "optimiser")]
    written = [path.with_suffix(".safetensors") for path in written]
    before = [load_file(path) for path in written]
    rows = read_metrics(config.output_dir / "metrics.jsonl")
    (first,) = config.output_dir.glob("checkpoints/checkpoint-1")
    launch(config, tmp_path, *command, resume=("--resume", str(first)), **variables)
    for path, tensors in zip(written, before, strict=True):
        again = load_file(path)
        assert all(torch.equal(again[name], value) for name, value in tensors.items()), path.name
    for left, right in zip(rows, read_metrics(config.output_dir / "metrics.jsonl"), strict=True):
        assert all(left[name] == right[name] for name in COMPARED & left.keys())


@pytest.mark.slow
def test_two_processes_equal_one(settings, sentences, tmp_path, one):
    sections = {"training": {**STEPS, "batch_size": 3}, "data": {"eval": str(sentences)}, **SECTIONS}
    config = settings(output_dir=str(tmp_path / "two"), **sections)
    two = launch(config, tmp_path, "-m", "so8t_torch.cli")
    same_steps(one, two)
    resumed_equals_uninterrupted(config, tmp_path, "-m", "so8t_torch.cli")


@pytest.mark.slow
def test_two_processes_with_shards_equal_one_with_whole_weights(settings, sentences, tmp_path, one):
    sections = {"training": {**STEPS, "batch_size": 3}, "data": {"eval": str(sentences)}, **SECTIONS}
    variables = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    config = settings(output_dir=str(tmp_path / "shards"), **sections)
    two = launch(config, tmp_path, str(Path(__file__).with_name("sharded_run.py")), **variables)
    same_steps(one, two)
    resumed_equals_uninterrupted(config, tmp_path, str(Path(__file__).with_name("sharded_run.py")), **variables)
    assert verify(two / "checkpoints/checkpoint-2").sharded, "the weights were not in shards"
    whole, shards = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, two))
    assert whole.keys() == shards.keys()
    # the first steps of Adam go by the sign, also of gradients that are mere rounding, so single numbers may differ
    for name, value in whole.items():
        assert shards[name].shape == value.shape, name
        assert (shards[name].double() - value.double()).norm() <= 0.01 * value.double().norm(), name
    # measured on gathered shards while training, and on what was written
    last = [row for row in read_metrics(two / "metrics.jsonl") if row["kind"] == "train"][-1]
    angles = [gate.max_angle for gate in gate_summary(load_adapter(two / "adapter")).values()]
    assert max(angles) == pytest.approx(last["gate/max_angle"], rel=1e-6)
