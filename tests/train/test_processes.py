"""Two processes with half the batch each take the steps of one process with the whole batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from so8t_torch.core.config import dump_config
from so8t_torch.train.folder import read_metrics
from so8t_torch.train.run import run_training


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one(settings, sentences, tmp_path):
    sections = {
        "data": {"eval": str(sentences)},
        "penalty": {"enabled": True, "weights": [1.0, 1.0, 1.0]},
        "checkpoint": {"every_steps": 2},
    }
    steps = {"max_steps": 2, "warmup": 0.0, "schedule": "constant"}
    one = run_training(settings(training={**steps, "batch_size": 6}, **sections))
    two = settings(training={**steps, "batch_size": 3}, output_dir=str(tmp_path / "two"), **sections)
    (tmp_path / "two.yaml").write_text(dump_config(two), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "so8t_torch.cli", "train", str(tmp_path / "two.yaml")],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Step 2 begins from weights that step 1's gradients made: its loss, its norm and the held-out loss after it agree
    # only if the processes shared those gradients.
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (one.directory, tmp_path / "two")]
    names = {"loss/lm", "loss/pet", "loss/total", "grad_norm", "supervised_tokens", "eval/lm", "eval/supervised_tokens"}
    for left, right in zip(*rows, strict=True):
        assert (left["step"], left["kind"]) == (right["step"], right["kind"])
        assert left.keys() == right.keys()
        for name in names & left.keys():
            assert left[name] == pytest.approx(right[name], rel=1e-5), (left["step"], name)
    assert (tmp_path / "two/events.jsonl").read_text().count('"start"') == 1
