"""The run folder: where each file of a run lies, how a run begins in it, and how one goes on.

    RUN/config.yaml environment.json metrics.jsonl events.jsonl curves.png
    RUN/tensorboard/ checkpoints/checkpoint-N/ adapter/ logits/ eval/

Both JSONL files are only ever appended to. After a resume the steps behind the checkpoint are written again;
``read_metrics`` keeps the last entry of each step and kind, so nothing is lost and nothing is counted twice.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from so8t_torch.core.config import dump_config, load_config
from so8t_torch.core.errors import ConfigError, TrainingError
from so8t_torch.data.records import parse_json_object
from so8t_torch.train.config import TrainConfig

FREE_ON_RESUME = ("output_dir", "threads", "card", "recording", "logits", "checkpoint", "evaluation")
"""Settings that a resumed run may change; every other one would make it a different run."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunFolder:
    """Paths and records of one run.

    Args:
        path: the folder, created when a run begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.logits = path / "logits"
        self.evaluation = path / "eval"

    def begin(self, config: TrainConfig) -> None:
        """Create the folder for a new run and write its configuration.

        Raises:
            ConfigError: the folder holds something already.
        """
        self.check_free()
        for folder in (self.tensorboard, self.checkpoints, self.adapter, self.logits, self.evaluation):
            folder.mkdir(parents=True)
        self.config.write_text(dump_config(config), encoding="utf-8")

    def check_free(self) -> None:
        """Refuse a folder that holds something.

        Raises:
            ConfigError: saying how to go on, which depends on whether there is a checkpoint.
        """
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        way = "go on with --resume auto" if self._newest() else "it holds no checkpoint to go on from: remove it"
        raise ConfigError(
            f"{self.path} is not empty, and a run never writes over another; {way}, or choose another output_dir."
        )

    def checkpoint(self, resume: str, config: TrainConfig) -> Path:
        """Return the checkpoint to go on from.

        Args:
            resume: ``"auto"`` for the newest one in this folder, or a path.
            config: settings of the resumed run.

        Raises:
            ConfigError: there is no checkpoint, or the settings differ from those the run began with.
        """
        found = self._newest() if resume == "auto" else Path(resume)
        if found is None or not _complete(found):
            place = self.checkpoints if found is None else found
            raise ConfigError(f"--resume {resume}: no complete checkpoint at {place}; start anew without --resume.")
        if self.config.is_file():
            self._same_run(config)
        return found

    def _newest(self) -> Path | None:
        complete = {
            int(match[1]): folder
            for folder in self.checkpoints.glob("checkpoint-*")
            if (match := _CHECKPOINT.fullmatch(folder.name)) and _complete(folder)
        }
        return complete[max(complete)] if complete else None

    def _same_run(self, config: TrainConfig) -> None:
        before = load_config(TrainConfig, self.config).model_dump(mode="json", exclude=set(FREE_ON_RESUME))
        now = config.model_dump(mode="json", exclude=set(FREE_ON_RESUME))
        changed = [name for name in now if now[name] != before[name]]
        if changed:
            raise ConfigError(
                f"--resume: {', '.join(changed)} differ from {self.config}; a resumed run keeps its settings (only "
                f"{', '.join(FREE_ON_RESUME)} may change). Start a new output_dir for a different run."
            )

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event with the time in seconds since 1970."""
        append_json(self.events, {"event": kind, "time": round(time.time(), 3), **fields})


def _complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end; the library writes its state last, and not in one piece."""
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return False
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return True


def append_json(path: Path, row: dict[str, Any]) -> None:
    """Append one line of JSON.

    Raises:
        TrainingError: a number is not finite; such a number is an error, never a record.
    """
    try:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise TrainingError(f"A number to be written to {path} is not finite: {row}") from error
    with path.open("a", encoding="utf-8") as handle:
        handle.write(line + "\n")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole: to a temporary name, then renamed."""
    waiting = path.with_name(path.name + ".part")
    waiting.write_text(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    waiting.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the log entries in order of step, the last one of each step and kind.

    Args:
        path: ``metrics.jsonl`` of a run.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [parse_json_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    latest = {(row["step"], row["kind"]): row for row in rows}
    return sorted(latest.values(), key=lambda row: row["step"])
