"""One training run, from settings to a run folder.

``run_training`` builds the job, trains it with the library's trainer, and leaves behind the adapter (or the model that
was trained whole), the held-out loss before and after, the curves and what else was asked for. Under torchrun every
process trains, process 0 writes.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from so8t_torch.core.errors import DataError, SO8TError
from so8t_torch.train import building, checkpoints, language
from so8t_torch.train.callbacks import QuietProgress, Recorder
from so8t_torch.train.checkpointed import Keeping
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.curves import draw_curves
from so8t_torch.train.dry_run import describe, trainable_groups
from so8t_torch.train.environment import PACKAGES, environment, version
from so8t_torch.train.folder import RunFolder, Start, config_hash, write_json
from so8t_torch.train.guard import Guard
from so8t_torch.train.journal import on_terminal
from so8t_torch.train.ladder import Sink
from so8t_torch.train.language import Ending, conclude
from so8t_torch.train.logits import LogitsRecorder
from so8t_torch.train.out_of_memory import fitting
from so8t_torch.train.physics import check_physics
from so8t_torch.train.preconditions import decoder_and_head
from so8t_torch.train.rollback import RollbackRequested
from so8t_torch.train.sharding import is_sharded, trained_state
from so8t_torch.train.signals import Interrupted, SaveAndStop, StopSignals
from so8t_torch.train.table import write_table
from so8t_torch.train.trainer import SO8TTrainer

if TYPE_CHECKING:
    from so8t_torch.safety.evaluation import TriageReport


POST_MORTEM = "post_mortem.json"
"""What the recovery ladder leaves when it gives up."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves behind.

    ``held_out_before`` and ``held_out_after`` are language-model losses in nats per supervised token, ``None`` without
    held-out data; ``trainable`` counts numbers by parameter group; ``truncated`` counts training conversations cut at
    ``data.max_length``; ``seconds`` is the training alone; ``recorded`` says whether this process wrote the folder.
    """

    directory: Path
    steps: int
    trainable: dict[str, int]
    held_out_before: float | None
    held_out_after: float | None
    triage: TriageReport | None
    seconds: float
    model: PeftModel | PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerFast = field(repr=False)
    truncated: int = 0
    recorded: bool = False
    ending: Ending | None = None

    def summary(self) -> str:
        """Return what happened and where it lies, a line each, ending with the command that comes next."""
        counts = ", ".join(f"{count:,} in {group}" for group, count in self.trainable.items() if count)
        lines = [f"{self.steps} steps in {self.seconds:.0f} s; numbers trained: {counts}"]
        if self.held_out_after is not None:
            before = "" if self.held_out_before is None else f"{self.held_out_before:.4f} → "
            lines.append(f"held-out loss {before}{self.held_out_after:.4f} nats per supervised token")
        if self.truncated:
            events = self.directory / "events.jsonl"
            lines.append(f"{self.truncated:,} conversations were cut at data.max_length; {events} names the first ten")
        if not isinstance(self.model, PeftModel):
            lines += [] if self.ending is None else self.ending.lines()
            lines.append(f"model {self.directory / 'model'}, curves {self.directory / 'curves.png'}")
            lines.append(f"next: so8t generate {self.directory} --prompt 'def '")
            return "\n".join(lines)
        lines.append(f"adapter {self.directory / 'adapter'}, curves {self.directory / 'curves.png'}")
        lines.append(f"next: so8t bake {self.directory / 'adapter'} {self.directory / 'baked'}")
        return "\n".join(lines)


def run_training(
    config: TrainConfig,
    *,
    resume: str | None = None,
    dry_run: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Train as the settings say.

    Args:
        config: the whole run.
        resume: ``"auto"`` for the newest checkpoint of the run folder that verifies, a checkpoint's path, or ``None``
            to begin.
        dry_run: build everything, print what would be trained, write and train nothing.
        callbacks: further callbacks of the library's trainer.

    Raises:
        ConfigError: the run folder is not empty, or there is nothing to resume.
        CheckpointError: what there is to resume is damaged, or a checkpoint cannot be written.
        Interrupted: by SIGINT or SIGTERM, after a whole step and with a checkpoint.
        TrainingError: nothing to train, or no gradient, with the step.
        TrainingStopped: the recovery ladder gave up; ``post_mortem.json`` says why.
    """
    torch.set_num_threads(building.thread_count(config))
    if dry_run:
        job = _job(config)
        describe(config, job, Console())
        counts = trainable_groups(job.model)
        return RunResult(config.output_dir, 0, counts, None, None, None, 0.0, job.model, job.tokenizer)
    folder = RunFolder(config.output_dir)
    start = None if resume is None else folder.start(resume, config)
    checkpoint = None if start is None else start.checkpoint
    arguments = building.training_arguments(config, folder.checkpoints, first=checkpoint is None)
    job = _build(config, arguments, folder if start is None else None)
    with contextlib.ExitStack() as kept:
        with arguments.main_process_first(desc="the run folder"):
            if arguments.should_save:
                folder.make()
                kept.enter_context(folder.held())
                kept.callback(folder.close)
                _open(folder, config, start)
        try:
            return _run(config, job, arguments, folder, start, callbacks)
        except SO8TError:
            if arguments.should_save:
                _draw(folder)
            raise


def _run(
    config: TrainConfig,
    job: building.Job,
    arguments: Any,
    folder: RunFolder,
    start: Start | None,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    trainer = _trainer(config, job, arguments, folder, callbacks)
    if start is not None:
        trainer.take_up(start.recovery)
    if arguments.should_save:
        _note_data(folder, job)
    started = time.monotonic()
    _train(trainer, folder, None if start is None else start.checkpoint, config.checkpoint.every_minutes)
    seconds = time.monotonic() - started
    before = _held_out_before(trainer)
    after = trainer.evaluate()["eval_lm"] if job.held_out else None
    report = _triage(config, job) if config.evaluation.triage else None
    ending = conclude(config, job, after) if arguments.should_save and after is not None else None
    result = RunResult(
        config.output_dir,
        trainer.state.global_step,
        trainable_groups(job.model),
        before,
        after,
        report,
        seconds,
        job.model,
        job.tokenizer,
        len(job.report.truncated),
        arguments.should_save,
        ending,
    )
    state = trained_state(job.model) if is_sharded(job.model) else None
    if arguments.should_save:
        _close(folder, result, state)
    return result


def _build(config: TrainConfig, arguments: Any, fresh: RunFolder | None) -> building.Job:
    """Build the job before anything is written, so that settings which cannot be built leave no run folder behind."""
    if fresh is not None and arguments.should_save:
        fresh.check_free()
    if config.base is not None and arguments.world_size > 1:
        # one process builds a base from scratch, the others find it
        with arguments.main_process_first(desc="the base"):
            building.base_source(config)
    return _job(config)


def _job(config: TrainConfig) -> building.Job:
    job = building.build(config) if config.model is None else language.build(config)
    check_physics(config.physics, decoder_and_head(job.model)[0])
    return job


def _open(folder: RunFolder, config: TrainConfig, start: Start | None) -> None:
    if start is not None and start.checkpoint is not None and start.checkpoint.parent == folder.checkpoints:
        # settings that the checkpoint agrees with are those of the run, should their file be gone
        folder.state(config)
    if start is None or not folder.config.is_file():
        folder.begin(config)
    else:
        folder.complete()
    if start is None:
        folder.event("start", command=sys.argv)
    else:
        checkpoint = None if start.checkpoint is None else str(start.checkpoint)
        folder.event("resume", checkpoint=checkpoint, passed_over=start.passed_over, command=sys.argv)
        for name, reason in start.passed_over:
            Console(stderr=True).print(f"passed over {name}: {reason}", markup=False, soft_wrap=True)
    write_json(folder.environment, environment(config.seed))


def _train(trainer: SO8TTrainer, folder: RunFolder, checkpoint: Path | None, every_minutes: float | None) -> None:
    """Train to the end, going back where that is asked for.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the step was finished and a checkpoint written.
    """
    with StopSignals(tells=trainer.args.should_save) as signals:
        trainer.add_callback(SaveAndStop(signals, every_minutes))
        # the guard looks when every other callback has said whether this step is written down
        trainer.add_callback(trainer.pop_callback(trainer.guard))
        while True:
            try:
                trainer.train(None if checkpoint is None else str(checkpoint))
                break
            except RollbackRequested as request:
                checkpoint = _roll_back(trainer, folder, request)
            except torch.OutOfMemoryError as error:
                raise trainer.relief.unrelieved(trainer.state.global_step + 1, str(error)) from error
    step = trainer.state.global_step
    if signals.received and step < trainer.state.max_steps:
        if trainer.args.should_save:
            folder.event("interrupted", step=step, signal=signals.received)
        raise Interrupted(signals.received, step)


def _roll_back(trainer: SO8TTrainer, folder: RunFolder, request: RollbackRequested) -> Path | None:
    step = trainer.state.global_step
    recovery = trainer.grant(request)
    if trainer.args.should_save:
        written = folder.write_recovery(recovery)
        if request.checkpoint is None and written:
            # none can be taken any more, and a damaged one must not stand in the way of beginning again
            try:
                for _, path in checkpoints.present(folder.checkpoints):
                    checkpoints.remove(path)
            except OSError as error:
                on_terminal(f"checkpoints that nothing can go on from stay at {folder.checkpoints}: {error}")
        name = None if request.checkpoint is None else request.checkpoint.name
        folder.event("rollback", step=step, checkpoint=name, skipped=list(request.skipped), reason=request.reason)
    trainer.accelerator.wait_for_everyone()
    return request.checkpoint


def _note_data(folder: RunFolder, job: building.Job) -> None:
    held_out = None if job.held_out_report is None else job.held_out_report.as_dict()
    folder.event("data", train=job.report.as_dict(), held_out=held_out, trainable=trainable_groups(job.model))


def _trainer(
    config: TrainConfig,
    job: building.Job,
    arguments: Any,
    folder: RunFolder,
    callbacks: Sequence[TrainerCallback],
) -> SO8TTrainer:
    trainer = SO8TTrainer(
        job.model,
        arguments,
        job.rows,
        job.held_out,
        job.collator,
        config.training,
        config.penalty,
        [Recorder(folder), *callbacks],
        replace(keeping(config), base=job.base),
        Guard(config.recovery, _recorded(folder) if arguments.should_save else None),
        config.physics,
    )
    trainer.settle = lambda: folder.settle() is None
    if config.model is None:
        trainer.relief.what_fits = lambda limit: fitting(config, limit)
    for silent in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(silent)
    if config.logits.save_logits:
        logits = LogitsRecorder(config.logits, folder)
        trainer.watch = logits.watch
        trainer.add_callback(logits)
    if config.recording.progress:
        trainer.add_callback(QuietProgress())
    if config.recording.tensorboard and arguments.should_save:
        board = TensorBoardCallback()
        board.logging_dir = str(folder.tensorboard)
        trainer.add_callback(board)
    return trainer


def _recorded(folder: RunFolder) -> Sink:
    """Return what writes the ladder's transitions to ``events.jsonl`` and its last words to ``post_mortem.json``."""

    def record(row: dict[str, Any]) -> None:
        if row["transition"] == "post-mortem":
            try:
                write_json(folder.path / POST_MORTEM, row)
            except OSError as error:  # the run stops for a reason of its own, which this must not hide
                on_terminal(f"{folder.path / POST_MORTEM} cannot be written ({error}); it would say {json.dumps(row)}")
            row = {name: row[name] for name in ("transition", "step", "reason", "cause", "layer", "detail")}
        folder.event("recovery", **row)

    return record


def keeping(config: TrainConfig) -> Keeping:
    """Return how the run's checkpoints are marked, and how many stay."""
    versions = {name: version(name) for name in PACKAGES}
    section, horizon = config.checkpoint, config.recovery.rollback_distance
    return Keeping(config_hash(config), versions, section.keep, section.keep_best, horizon)


def _held_out_before(trainer: SO8TTrainer) -> float | None:
    """Return the held-out loss of the untrained adapter, which is the base's; a checkpoint carries it along."""
    return next((row["eval_lm"] for row in trainer.state.log_history if row["step"] == 0 and "eval_lm" in row), None)


def _triage(config: TrainConfig, job: building.Job) -> TriageReport:
    from so8t_torch.safety.evaluation import evaluate_triage

    return evaluate_triage(job.model, job.tokenizer, job.held_out_records, batch_size=config.evaluation.batch_size)


def _draw(folder: RunFolder, others: Mapping[str, float] | None = None) -> None:
    """Make table and curves of a run that ends; what refuses them is told, and hides no reason of another kind."""
    folder.close()
    try:
        folder.metrics.touch()
        write_table(folder.metrics, folder.table)
        draw_curves(folder.metrics, folder.curves, folder.events, others)
    except (OSError, DataError) as error:
        on_terminal(f"{folder.table} and {folder.curves} are not up to date: {error}")


def _close(folder: RunFolder, result: RunResult, state: dict[str, Tensor] | None) -> None:
    whole = not isinstance(result.model, PeftModel)
    result.model.save_pretrained(folder.model if whole else folder.adapter, state_dict=state)
    if whole:
        result.tokenizer.save_pretrained(folder.model)
    if result.held_out_after is not None:
        losses = {"before": result.held_out_before, "after": result.held_out_after, "unit": "nats per supervised token"}
        losses |= {} if result.ending is None else result.ending.as_json()
        write_json(folder.evaluation / "language_model.json", losses)
    if result.ending is not None and result.ending.sample:
        (folder.evaluation / "sample.txt").write_text(result.ending.sample + "\n", encoding="utf-8")
    if result.triage is not None:
        (folder.evaluation / "triage.json").write_text(result.triage.to_json(), encoding="utf-8")
    _draw(folder, None if result.ending is None else result.ending.baselines)
    folder.event("finish", steps=result.steps, seconds=round(result.seconds, 3), trainable=result.trainable)
