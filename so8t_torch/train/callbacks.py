"""What happens around the steps: metrics and events on disk, and a quiet progress bar."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from so8t_torch.core.errors import DataError
from so8t_torch.train.folder import RunFolder
from so8t_torch.train.table import write_table

_EVALUATION = re.compile(r"^eval_")


class Recorder(TrainerCallback):
    """Writes each log entry to ``metrics.jsonl`` and each checkpoint to ``events.jsonl``; process 0 only.

    Entries that the disk refuses wait in memory: measuring never ends a run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._metrics = folder.log

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append one entry with the time in seconds since 1970; ``kind`` is train, eval or summary."""
        del args, control, kwargs
        if state.is_world_process_zero and logs:
            self._metrics.add(entry(state.global_step, logs) | {"time": round(time.time(), 3)})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the checkpoint, if there is one: a state that is not finite is not written."""
        del args, control, kwargs
        path = Path("checkpoints") / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero:
            return
        self._folder.settle()
        if (self._folder.path / path).is_dir():
            self._folder.event("checkpoint", step=state.global_step, path=path.as_posix())
            with contextlib.suppress(OSError, DataError):  # made again at the end, where what refuses it is told
                write_table(self._folder.metrics, self._folder.table)


def entry(step: int, logs: dict[str, Any]) -> dict[str, Any]:
    """Return one row of ``metrics.jsonl``; the library's ``eval_x`` becomes ``eval/x``."""
    kind = "train" if "loss/total" in logs else "eval" if any(map(_EVALUATION.match, logs)) else "summary"
    named = {_EVALUATION.sub("eval/", name): value for name, value in logs.items()}
    return {"step": step, "kind": kind, **named}


class QuietProgress(ProgressCallback):
    """The library's progress bar, with the latest losses beside it instead of a line per log entry."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the language-model loss, the penalty and the largest gate angle."""
        del args, control, kwargs
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {"loss/lm": "lm", "loss/pet": "pet", "gate/max_angle": "angle", "eval_lm": "held-out"}
            told = {k: short for k, short in shown.items() if k in logs and (k != "loss/pet" or logs[k])}
            self.training_bar.set_postfix({short: f"{logs[k]:.4g}" for k, short in told.items()})
