"""What a recovered fault costs: the held-out loss at the end of the budget beside the run without a fault.

``python -m tests.faults.soak_injection`` prints the table; ``run`` returns its rows. A seed decides the data order and
at which steps which fault strikes.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from so8t_torch.core.config import parse_config
from so8t_torch.train import building
from so8t_torch.train import run as running
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.detection import trainable
from so8t_torch.train.folder import RunFolder
from tests.conftest import make_tokenizer
from tests.faults.injection import EXPECTED, injected

FAULTS = sorted(case for case, stage in EXPECTED.items() if stage is not None)
BOUNDS = {1: 0.02, 3: 0.05}
MOST_LOST = 100
HEAD = {"modules_to_save": ["lm_head"]}

Row = tuple[str, int, int, str, str]


@dataclass(frozen=True)
class Outcome:
    """Held-out losses in nats per token: of the clean run, and of the one with faults; steps lost by each fault."""

    seed: int
    faults: list[tuple[str, str, int]]
    clean: float
    disturbed: float
    lost: list[int]

    @property
    def excess(self) -> float:
        """Relative excess of the loss."""
        return self.disturbed / self.clean - 1


class Bench:
    """Trains a tiny model on generated conversations again and again, from the same start.

    Args:
        folder: for the base and the runs.
        steps: of each run.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        source = _tiny_source(folder)
        self._tree: dict[str, Any] = {
            "output_dir": str(folder / "run"),
            "threads": 1,
            "base": {"kind": "pretrained", "path": str(source)},
            "loading": {"dtype": "float32"},
            # a random base learns little through gates and LoRA alone, so its head is trained too
            "adapter": {"layers_to_transform": [0, 1], "r": 4, "lora_target_modules": ["qkv_proj"], **HEAD},
            "data": {"train": str(_rows(folder, 0)), "eval": str(_rows(folder, 1)), "max_length": 64},
            "penalty": {"enabled": True},
            "training": {"max_steps": steps, "batch_size": 8, "lr": 1e-2, "gate_lr": 1e-2, "loss_chunk": 512},
            "recording": {"every_steps": 1000, "progress": False, "tensorboard": False},
            "checkpoint": {"every_steps": max(2, steps // 10), "keep": 20},
        }
        self._job = building.build(self._config(0))
        self._start = {name: p.detach().clone() for name, p in trainable(self._job.model).items()}
        self._clean: dict[int, float] = {}

    def _config(self, seed: int) -> TrainConfig:
        return parse_config(TrainConfig, {**self._tree, "seed": seed})

    def loss(self, seed: int, faults: list[tuple[str, str, int]]) -> tuple[float, list[int]]:
        """Return the held-out loss at the end of a run, and the steps lost by its faults."""
        config = self._config(seed)
        shutil.rmtree(config.output_dir, ignore_errors=True)
        with torch.no_grad():
            for name, p in trainable(self._job.model).items():
                p.copy_(self._start[name])
                p.grad = None
        folder = RunFolder(config.output_dir)
        folder.begin(config)
        arguments = building.training_arguments(config, folder.checkpoints)
        arguments.eval_on_start = False
        with ExitStack() as stack:
            callbacks = [stack.enter_context(injected(place, value, {step})) for place, value, step in faults]
            trainer = running._trainer(config, self._job, arguments, folder, callbacks)
            running._train(trainer, folder, None, None)
            assert all(each.fired for each in callbacks), f"a fault never struck: {faults}"
        answered = _answered(folder)
        assert answered == [step for *_, step in faults], f"of {faults} those of the steps {answered} were answered"
        return trainer.evaluate()["eval_lm"], _lost(folder)

    def trial(self, seed: int, count: int) -> Outcome:
        """Compare a run with ``count`` faults, drawn from the seed, with the clean one."""
        if seed not in self._clean:
            self._clean[seed] = self.loss(seed, [])[0]
        source = random.Random(f"faults {count} {seed}")
        first = self.steps // 10 + 1
        steps = sorted(source.sample(range(first, self.steps + 1), count))
        faults = [(*source.choice(FAULTS), step) for step in steps]
        disturbed, lost = self.loss(seed, faults)
        return Outcome(seed, faults, self._clean[seed], disturbed, lost)


def _events(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.events.read_text().splitlines()]


def _answered(folder: RunFolder) -> list[int]:
    """Return the steps in which the ladder was told of a fault."""
    return [row["step"] for row in _events(folder) if row.get("transition") == "fault"]


def _lost(folder: RunFolder) -> list[int]:
    rows = _events(folder)
    back = [row["step"] - _step(row["checkpoint"]) + 1 for row in rows if row["event"] == "rollback"]
    skips = [1 for row in rows if row.get("transition") == "fault" and row["stage"] not in ("rollback", "stop")]
    return back + skips


def _step(checkpoint: str | None) -> int:
    """Return the step of a checkpoint's name; ``None`` is the start."""
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


def _rows(folder: Path, rest: int) -> Path:
    """Write small sums, every fifth for the held-out set."""
    path = folder / f"sums-{rest}.jsonl"
    pairs = [(a, b) for a in range(10) for b in range(10) if ((a + 3 * b) % 5 == 0) == (rest == 1)]
    rows = [
        {"question": f"Is {a} and {b} over nine?", "answer": f"{'yes' if a + b > 9 else 'no'}, {a + b}"}
        for a, b in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _tiny_source(folder: Path) -> Path:
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = make_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    special = {"pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    source = folder / "base"
    Phi3ForCausalLM(Phi3Config(vocab_size=len(tokenizer), **sizes, **heads, **special)).save_pretrained(source)
    tokenizer.save_pretrained(source)
    return source


def trials(bench: Bench, seeds: int, count: int, report: Callable[[str], None]) -> list[Outcome]:
    """Return the outcomes of ``seeds`` runs with ``count`` faults each."""
    found = []
    for seed in range(seeds):
        outcome = bench.trial(seed, count)
        report(f"seed {seed}: {outcome.faults}, {outcome.clean:.4f} → {outcome.disturbed:.4f}, lost {outcome.lost}")
        found.append(outcome)
    return found


def run(report: Callable[[str], None] = print, *, seeds: int = 10, steps: int = 120) -> list[Row]:
    """Return the rows of R5: figure, trials, failures, bound, command.

    Args:
        report: gets a line for each trial.
        seeds: of data order and faults.
        steps: of each run; a checkpoint is written ten times.
    """
    torch.set_num_threads(1)
    rows: list[Row] = []
    command = f"python -m tests.faults.soak_injection {seeds} {steps}"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), steps)
        for count, bound in BOUNDS.items():
            outcomes = trials(bench, seeds, count, report)
            median = statistics.median(outcome.excess for outcome in outcomes)
            figure = f"R5 held-out loss after {count} fault(s): median excess {median:+.2%}"
            rows.append((figure, seeds, int(median > bound), f"<= {bound:.0%}", command))
            lost = [steps for outcome in outcomes for steps in outcome.lost]
            late = sum(steps > MOST_LOST for steps in lost)
            figure = f"R5 steps lost per fault, of {count}: most {max(lost)}"
            rows.append((figure, len(lost), late, f"<= {MOST_LOST}", command))
    return rows


def main(arguments: list[str]) -> int:
    """Print the table; return 1 where a bound is broken."""
    seeds, steps = (int(value) for value in (*arguments, *("10", "120")[len(arguments) :]))
    rows = run(seeds=seeds, steps=steps)
    for row in rows:
        print(" | ".join(map(str, row)))
    return int(any(row[2] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
