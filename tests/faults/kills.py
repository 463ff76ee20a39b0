"""Runs that are killed, gone on with, and compared bit for bit with the run that nobody disturbed.

A cell is one way to train; a kill is a moment drawn from a seed: at a time, in the middle of a step, or before or
within one of the file operations that make a checkpoint. The first kill of every run is of the last kind.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file

from so8t_torch.core.config import dump_config, parse_config
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.folder import read_metrics

ROOT = Path(__file__).parents[2]
FACTORS = ("dropout", "accumulation", "checkpointing", "nf4", "ramp", "mid_epoch")
KINDS = ("write", "seconds", "micro_batch")
STEPS = 8
TIMES = re.compile(r"second|runtime|time")


def cells() -> list[tuple[str, ...]]:
    """Return every subset of the factors: which of them are on."""
    return [tuple(f for i, f in enumerate(FACTORS) if bits >> i & 1) for bits in range(2 ** len(FACTORS))]


def settings(cell: tuple[str, ...], source: Path, data: Path, output: Path) -> TrainConfig:
    """Return the settings of a cell; ``"lora"`` in it leaves the gates out.

    Args:
        cell: the factors that are on.
        source: tiny base with tokenizer.
        data: six conversations: three batches, an epoch of three steps, or of two with accumulation.
        output: run folder.
    """
    accumulation = 2 if "accumulation" in cell else 1
    every = 3 - accumulation if "mid_epoch" in cell else 4 - accumulation
    adapter: dict[str, Any] = {"layers_to_transform": [0, 1], "r": 4, "lora_target_modules": ["qkv_proj", "o_proj"]}
    if "lora" in cell:
        adapter |= {"target_modules": [], "layers_to_transform": None}
    tree = {
        "output_dir": str(output),
        "threads": 1,
        "base": {"kind": "pretrained", "path": str(source)},
        "loading": {"dtype": "float32", "quantization": "nf4" if "nf4" in cell else "none"},
        "adapter": adapter | {"lora_dropout": 0.2 if "dropout" in cell else 0.0},
        "data": {"train": str(data), "max_length": 96},
        "penalty": {"enabled": "ramp" in cell},
        "training": {
            "max_steps": STEPS,
            "batch_size": 2,
            "lr": 5e-3,
            "gate_lr": 2e-2,
            "loss_chunk": 16,
            "accumulation": accumulation,
            "gradient_checkpointing": "checkpointing" in cell,
        },
        "recording": {"every_steps": 1, "progress": False, "tensorboard": False},
        "checkpoint": {"every_steps": every, "keep": 2},
    }
    return parse_config(TrainConfig, tree)


class Zygote:
    """The process that forks runs; see ``tests/faults/zygote.py``."""

    def __enter__(self) -> Zygote:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)},
            text=True,
        )
        assert self._answer() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=600)
        self._process.stdout.close()

    def train(self, config: TrainConfig, fault: dict[str, Any], *, log: Path, count: Path | None = None) -> int:
        """Run ``so8t train``, from the newest checkpoint where there is a run folder; return the exit status."""
        path = config.output_dir.with_suffix(".yaml")
        path.write_text(dump_config(config), encoding="utf-8")
        resume = ["--resume", "auto"] if config.output_dir.exists() else []
        request: dict[str, Any] = {"arguments": ["train", str(path), *resume], "fault": fault, "log": str(log)}
        if count is not None:
            request["count"] = str(count)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = self._answer()
        assert isinstance(status, int)
        return status

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks runs has ended"
        return json.loads(line)


@dataclass(frozen=True)
class Trace:
    """Everything of a run that must not depend on when it was stopped."""

    rows: list[dict[str, Any]]
    weights: dict[str, torch.Tensor]


def trace(run: Path) -> Trace:
    """Return every number of every log entry, floats in hexadecimal, and the weights."""
    kept = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] != "summary"]
    rows = [{name: _exact(value) for name, value in row.items() if not TIMES.search(name)} for row in kept]
    return Trace(rows, load_file(run / "adapter/adapter_model.safetensors"))


def _exact(value: Any) -> Any:
    return value.hex() if isinstance(value, float) else value


def differences(left: Trace, right: Trace) -> list[str]:
    """Return what differs between two runs, nothing where they are equal bit for bit."""
    found = [f"{len(left.rows)} and {len(right.rows)} log entries"] if len(left.rows) != len(right.rows) else []
    found += [f"step {a['step']}" for a, b in zip(left.rows, right.rows, strict=False) if a != b]
    names = left.weights.keys() | right.weights.keys()
    return found + sorted(
        n for n in names if n not in left.weights or not torch.equal(left.weights[n], right.weights[n])
    )


@dataclass(frozen=True)
class Quiet:
    """The run of a cell that nobody disturbed, and what is needed to draw moments in it."""

    trace: Trace
    writes: int
    micro_batches: int
    seconds: float


def undisturbed(zygote: Zygote, config: TrainConfig) -> Quiet:
    """Train without a fault."""
    log, count = (config.output_dir.with_suffix(suffix) for suffix in (".log", ".count"))
    began = time.monotonic()
    status = zygote.train(config, {}, log=log, count=count)
    assert status == 0, log.read_text()[-3000:]
    # an epoch has three micro-batches, in three steps or in two
    micro_batches = STEPS * 3 // (4 - config.training.accumulation)
    return Quiet(trace(config.output_dir), int(count.read_text()), micro_batches, time.monotonic() - began)


def moment(source: random.Random, quiet: Quiet, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Draw when to die."""
    kind = source.choice(kinds)
    if kind == "write":
        return {"write": source.randint(1, quiet.writes), "torn": source.random()}
    if kind == "seconds":
        return {"seconds": source.uniform(0, quiet.seconds)}
    return {"micro_batch": source.randint(1, quiet.micro_batches)}


@dataclass
class Count:
    """What happened in the runs of a cell."""

    kills: int = 0
    inside_writes: int = 0


def disturbed(
    zygote: Zygote, config: TrainConfig, quiet: Quiet, source: random.Random, kills: int, count: Count
) -> None:
    """Train, dying ``kills`` times at most and going on each time; stop at the first run that ends by itself.

    Raises:
        AssertionError: a run ended in an error.
    """
    shutil.rmtree(config.output_dir, ignore_errors=True)
    log = config.output_dir.with_suffix(".log")
    for left in range(kills, -1, -1):
        # the first kill of every run falls inside a write
        kinds = KINDS[:1] if left == kills else KINDS
        fault = moment(source, quiet, kinds) if left else {}
        status = zygote.train(config, fault, log=log)
        if status == 0:
            return
        assert status == -9, f"exit status {status} after {fault}\n{log.read_text()[-3000:]}"
        count.kills += 1
        count.inside_writes += "write" in fault
    raise AssertionError("a run without a fault was killed")
