"""The quick start: a base that can read learns a rule in four ways, and the comparison says who wins.

One base, one data set, one seed, equal steps: the base alone, LoRA alone, gates alone, LoRA with gates (which is
``configs/train/quickstart.yaml`` itself). Each is measured on training tellings, on held-out states, on held-out
frames and on both; then the last one is folded into plain weights and its logits are compared with the gated model's.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from so8t_torch.adapter import GateSummary, bake, gate_summary
from so8t_torch.adapter.bake import BakeReport
from so8t_torch.core.config import load_config
from so8t_torch.core.errors import ConfigError
from so8t_torch.core.json_text import read_object
from so8t_torch.data.docstrings import documentation_strings
from so8t_torch.data.records import Record
from so8t_torch.data.scenarios import ScenarioSection, novelty, scenario_records
from so8t_torch.safety.evaluation import TriageReport, evaluate_triage, language_loss
from so8t_torch.train import building
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.run import run_training
from so8t_torch.train.scratch import RECORD, ScratchBase, build_base

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "train" / "quickstart.yaml"
COMBINED = "lora_gates"
VARIANTS: dict[str, tuple[str, ...]] = {
    "lora": ("adapter.target_modules=[]",),
    "gates": ("adapter.r=0", "adapter.lora_target_modules=null"),
    COMBINED: (),
}
FITTED_RECORDS = 156
TEXTS = 60
TEXT_CHARACTERS = 400


@dataclass(frozen=True)
class Outcome:
    """What one variant reached; ``fitted`` is measured on training tellings, ``triage`` on held-out ones."""

    name: str
    trainable: int
    fitted: TriageReport
    triage: TriageReport
    by_novelty: dict[str, TriageReport]
    text_loss: float
    answer_loss: tuple[float, float] | None
    geometry: dict[str, GateSummary]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome for ``summary.json``."""
        return {
            "trainable": self.trainable,
            "text_loss": self.text_loss,
            "answer_loss_before_after": self.answer_loss,
            "seconds": round(self.seconds, 1),
            "geometry": {name: vars(gate) for name, gate in self.geometry.items()},
            "training_tellings": self.fitted.as_dict(),
            "held_out": {kind: report.as_dict() for kind, report in self.by_novelty.items()},
            "held_out_all": self.triage.as_dict(),
        }


@dataclass(frozen=True)
class Comparison:
    """Everything the quick start measured."""

    outcomes: tuple[Outcome, ...]
    base: dict[str, Any]
    scenarios: ScenarioSection
    steps: int
    baked: BakeReport
    seconds: dict[str, float]
    machine: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison for ``summary.json``."""
        return {
            "machine": self.machine,
            "seconds": self.seconds,
            "steps": self.steps,
            "base": self.base,
            "variants": {outcome.name: outcome.as_dict() for outcome in self.outcomes},
            "baked": self.baked.to_dict(),
        }


def run_demo(
    output: str | Path = "runs/quickstart", *, overrides: Sequence[str] = (), console: Console | None = None
) -> Comparison:
    """Run the quick start and write ``summary.json``, ``summary.md`` and ``comparison.png``.

    Args:
        output: folder; a base built from the same settings is reused, runs of an earlier quick start are replaced.
        overrides: settings for every variant, e.g. ``"training.max_steps=50"``.
        console: where to print; default: standard output.

    Raises:
        ConfigError: the configuration is missing, or a folder to be replaced holds something else than a run.
    """
    from so8t_torch.train.comparison import draw_comparison, render, write_markdown

    console = console or Console()
    output = Path(output)
    started = time.monotonic()
    clock: dict[str, float] = {}
    configs = {name: _config(output / name, [*overrides, *changes]) for name, changes in VARIANTS.items()}
    combined = configs[COMBINED]
    if not isinstance(combined.base, ScratchBase) or combined.data.scenarios is None:
        raise ConfigError("The quick start needs a base of kind scratch and data.scenarios.")
    threads = building.thread_count(combined)
    clear(output, console)
    console.print(f"[bold]SO8T quick start[/bold] on {threads} thread(s), {combined.training.max_steps} steps each")
    with _quiet():
        with _timed(clock, "base"):
            folder = build_base(combined.base, output / "bases", threads=threads)
        console.print(f"base: {folder} ({clock['base']:.0f} s)")
        outcomes = [_base_outcome(combined, folder)]
        for name, config in configs.items():
            with _timed(clock, name):
                outcomes.append(_train(name, config, outcomes[0]))
            console.print(f"{name}: {config.output_dir} ({clock[name]:.0f} s)")
        with _timed(clock, "bake"):
            baked = bake(combined.output_dir / "adapter", output / "baked", prompts=_prompts(combined.data.scenarios))
    clock["whole"] = time.monotonic() - started
    record = read_object(folder / RECORD, ConfigError)
    comparison = Comparison(
        outcomes=tuple(outcomes),
        base=record,
        scenarios=combined.data.scenarios,
        steps=combined.training.max_steps or 0,
        baked=baked,
        seconds=clock,
        machine=_machine(threads),
    )
    text = json.dumps(comparison.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    (output / "summary.json").write_text(text + "\n", encoding="utf-8")
    draw_comparison(comparison, output, output / "comparison.png")
    write_markdown(comparison, output / "summary.md")
    console.print(render(comparison))
    console.print(f"written: {output}/summary.json, summary.md, comparison.png; folded weights: {output}/baked")
    return comparison


def _config(folder: Path, overrides: Sequence[str]) -> TrainConfig:
    if not CONFIG.is_file():
        raise ConfigError(f"The quick start reads {CONFIG}, which is not there; run it from a clone of the repository.")
    return load_config(TrainConfig, CONFIG, [*overrides, f"output_dir={folder}"])


def clear(output: Path, console: Console) -> None:
    """Remove what an earlier quick start left, and nothing else.

    Args:
        output: folder of the quick start; bases in it stay.
        console: where each removal is announced.

    Raises:
        ConfigError: a folder to be replaced holds no run.
    """
    marks = dict.fromkeys(VARIANTS, "events.jsonl") | {"baked": "so8t/bake.json"}
    for name, mark in marks.items():
        folder = output / name
        if not folder.exists() or not any(folder.iterdir()):
            continue
        if not (folder / mark).is_file():
            raise ConfigError(f"{folder} holds no run of the quick start (no {mark}); move it away or use --output.")
        console.print(f"replacing {folder} of an earlier quick start")
        shutil.rmtree(folder)


def _base_outcome(config: TrainConfig, folder: Path) -> Outcome:
    started = time.monotonic()
    model = building.load_model(str(folder), None, config.loading)
    tokenizer = building.load_tokenizer(str(folder), None)
    held_out = scenario_records(_scenarios(config), "held_out")
    triage = evaluate_triage(model, tokenizer, held_out, batch_size=config.evaluation.batch_size)
    return _outcome("base", config, model, tokenizer, triage, 0, None, started)


def _train(name: str, config: TrainConfig, base: Outcome) -> Outcome:
    started = time.monotonic()
    result = run_training(config)
    assert result.triage is not None, "the quick start's configuration evaluates triage"
    before, after = result.held_out_before, result.held_out_after
    assert before is not None, "scenarios bring held-out data"
    assert after is not None, "scenarios bring held-out data"
    outcome = _outcome(
        name=name,
        config=config,
        model=result.model,
        tokenizer=result.tokenizer,
        triage=result.triage,
        trainable=sum(result.trainable.values()),
        answer_loss=(before, after),
        started=started,
    )
    changes = {"before": base.text_loss, "after": outcome.text_loss, "unit": "nats per token of held-out docstrings"}
    (config.output_dir / "eval" / "running_text.json").write_text(json.dumps(changes) + "\n", encoding="utf-8")
    return outcome


def _outcome(
    name: str,
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    triage: TriageReport,
    trainable: int,
    answer_loss: tuple[float, float] | None,
    started: float,
) -> Outcome:
    scenarios = _scenarios(config)
    seen = random.Random(config.seed).sample(scenario_records(scenarios, "train"), FITTED_RECORDS)
    fitted = evaluate_triage(model, tokenizer, seen, batch_size=config.evaluation.batch_size, generate=False)
    kinds = {id(decision.record): novelty(scenarios, decision.record) for decision in triage.decisions}

    def only(kind: str) -> TriageReport:
        return triage.restricted(lambda record: kinds[id(record)] == kind)

    return Outcome(
        name=name,
        trainable=trainable,
        fitted=fitted,
        triage=triage,
        by_novelty={kind: only(kind) for kind in ("state", "frame", "both")},
        text_loss=language_loss(model, tokenizer, held_out_text(config.seed)),
        answer_loss=answer_loss,
        geometry=gate_summary(model),
        seconds=time.monotonic() - started,
    )


def held_out_text(seed: int) -> list[str]:
    """Return the beginnings of documentation strings that the base was not trained on."""
    texts = documentation_strings("held_out")
    return [text[:TEXT_CHARACTERS] for text in random.Random(seed).sample(texts, min(TEXTS, len(texts)))]


def _prompts(section: ScenarioSection) -> list[str]:
    records: list[Record] = scenario_records(section, "held_out")
    return [record.messages[0].content for record in records[:: max(1, len(records) // 12)]]


def _scenarios(config: TrainConfig) -> ScenarioSection:
    assert config.data.scenarios is not None, "the quick start's configuration was checked"
    return config.data.scenarios


def _machine(threads: int) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "threads": threads,
        "cores": os.cpu_count(),
        "peak_rss_gib": round(peak / (2**30 if sys.platform == "darwin" else 2**20), 2),
        "processor_seconds": round(time.process_time(), 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    clock[name] = time.monotonic() - started


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back progress bars and notices of the libraries below; errors still come through."""
    before = transformers.utils.logging.get_verbosity()
    notices = logging.getLogger("bitsandbytes")
    level = notices.level
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    notices.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        transformers.utils.logging.set_verbosity(before)
        transformers.utils.logging.enable_progress_bar()
        notices.setLevel(level)
