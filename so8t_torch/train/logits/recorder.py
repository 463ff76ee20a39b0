"""Saves logits while a model trains: every ``save_logits_steps`` optimiser steps, those of the last micro-batch.

A callback of the library's trainer, and what the trainer asks who watches a forward pass. Process 0 saves. Whatever
goes wrong, training goes on: it is told once on the terminal and in ``events.jsonl``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from so8t_torch.train.config import LogitsSection
from so8t_torch.train.folder import RunFolder
from so8t_torch.train.journal import on_terminal
from so8t_torch.train.logits.capture import Capture
from so8t_torch.train.logits.store import Store
from so8t_torch.train.logits.writer import Note, Writer

PATIENCE = 60.0
"""Seconds that the end of a run waits for files still being written."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class LogitsRecorder(TrainerCallback):
    """Captures and saves logits as the settings say.

    Args:
        section: the settings.
        folder: of the run; events go there, and the files into ``save_logits_dir`` below it.
        tell: prints one line for the user.
    """

    def __init__(self, section: LogitsSection, folder: RunFolder, tell: Callable[[str], None] = on_terminal) -> None:
        self._section, self._folder, self._tell = section, folder, tell
        self._capture: Capture | None = None
        self._writer: Writer | None = None

    def watch(self, state: TrainerState) -> Capture | None:
        """Return who sees the logits of the step that begins at ``state``: a fresh capture where it is due."""
        step = state.global_step + 1
        due = state.is_world_process_zero and step % self._section.save_logits_steps == 0
        refused = self._writer is not None and self._writer.refused
        self._capture = None
        if due and not refused:
            section = self._section
            self._capture = Capture(
                step,
                int(state.epoch or 0),
                mode=section.save_logits_mode,
                top_k=section.save_logits_top_k,
                dtype=_DTYPES[section.save_logits_dtype],
            )
        return self._capture

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hand over what the step's last micro-batch gave, and tell what the writer has to say."""
        del args, control, kwargs
        capture, self._capture = self._capture, None
        if capture is not None and capture.step == state.global_step:
            self._open(state).submit(capture)
        if self._writer is not None:
            self._tell_all(self._writer.notes())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait a while for what is still being written, and note the totals."""
        del args, state, control, kwargs
        if self._writer is None:
            return
        totals = self._writer.close(PATIENCE)
        self._tell_all(self._writer.notes())
        if totals.unfinished:
            self._tell(f"logits: {totals.unfinished} files were not written within {PATIENCE:.0f} s and are given up")
        self._folder.event("logits", outcome="closed", **vars(totals))
        self._writer = None

    def _open(self, state: TrainerState) -> Writer:
        if self._writer is None:
            section = self._section
            every = section.save_logits_steps
            store = Store(
                self._folder.path / section.save_logits_dir,
                form=section.save_logits_format,
                max_files=section.save_logits_max_files,
                max_bytes=int(section.save_logits_max_mb * 2**20),
            )
            planned = state.max_steps // every - (state.global_step - 1) // every
            self._writer = Writer(store, planned)
        return self._writer

    def _tell_all(self, notes: list[Note]) -> None:
        prefix = {
            "plan": "logits are saved: ",
            "refused": "no logits are saved in this run: ",
            "failed": "training goes on without saved logits: ",
            "dropped": "training goes on, logits are dropped: ",
        }
        for note in notes:
            self._tell(prefix[note.outcome] + note.text)
            self._folder.event("logits", outcome=note.outcome, text=note.text)
