"""What happens around the steps: metrics and events on disk, a quiet progress bar, and guards on the gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from so8t_torch.adapter.summary import whole
from so8t_torch.core.errors import TrainingError
from so8t_torch.train.folder import RunFolder, append_json

_EVALUATION = re.compile(r"^eval_")


class Recorder(TrainerCallback):
    """Writes each log entry to ``metrics.jsonl`` and each checkpoint to ``events.jsonl``; process 0 only."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Append one entry; ``kind`` is train, eval or summary."""
        del args, control, kwargs
        if state.is_world_process_zero and logs:
            append_json(self._folder.metrics, entry(state.global_step, logs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the checkpoint, if there is one: a state that is not finite is not written."""
        del args, control, kwargs
        path = Path("checkpoints") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and (self._folder.path / path).is_dir():
            self._folder.event("checkpoint", step=state.global_step, path=path.as_posix())


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
            self.training_bar.set_postfix({short: f"{logs[k]:.4g}" for k, short in shown.items() if k in logs})


class GradientGuard(TrainerCallback):
    """Stops before the optimiser moves anything along a missing or non-finite gradient."""

    def __init__(self) -> None:
        self._complete = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check every gradient of this step.

        Raises:
            TrainingError: a trainable parameter got no gradient in the first step, or a gradient is not finite.
        """
        del args, control, kwargs
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._complete:
            _all_reached(trainable, state.global_step + 1)
            self._complete = True
        gradients = [p.grad for p in trainable.values() if p.grad is not None]
        if not torch.isfinite(whole(torch.nn.utils.get_total_norm(gradients))):
            bad = [n for n, p in trainable.items() if p.grad is not None and not torch.isfinite(whole(p.grad)).all()]
            raise TrainingError(
                f"Step {state.global_step + 1}: the gradient is not finite in {len(bad)} parameters, first {bad[:3]}; "
                "the weights are those of the step before."
            )


def _all_reached(trainable: dict[str, nn.Parameter], step: int) -> None:
    missing = [name for name, parameter in trainable.items() if parameter.grad is None]
    if missing:
        raise TrainingError(f"Step {step}: {len(missing)} trainable parameters got no gradient, first {missing[:3]}.")
