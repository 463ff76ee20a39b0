"""The library's ``Trainer`` with checkpoints that verify, a data order of its own, and roll-backs.

    checkpoint-N/  adapter_model.safetensors  adapter_config.json      what a model loads
                   optimiser.* schedule.json scaler.json               the step's other state
                   process-K.*                                         generators and sums of process K
                   trainer_state.json so8t_state.json MANIFEST.json    the library's, this project's, the seal

A checkpoint is written between optimiser steps, so no gradient is under way. What the library would write with
pickle is written as safetensors and JSON instead, whole also where the weights are in shards. A state that is not
finite is never written.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, distributed, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from so8t_torch.core.errors import CheckpointError, TrainingError
from so8t_torch.core.files import opened
from so8t_torch.data.chat import Encoded
from so8t_torch.train import checkpoint_state as files
from so8t_torch.train import checkpoints
from so8t_torch.train.data_order import Consumption, Span, Stream
from so8t_torch.train.fingerprint import Fingerprint, changes, digest
from so8t_torch.train.health import scan
from so8t_torch.train.manifest import Health, Manifest, read_manifest
from so8t_torch.train.rollback import Recovery, RollbackRequested, TrainingExtra
from so8t_torch.train.sharding import is_sharded
from so8t_torch.train.start import Start

STATE, VERSION = "so8t_state", 2
LOGGED = 20_000
"""Entries of the library's log that a checkpoint carries; ``metrics.jsonl`` has them all."""


@dataclass(frozen=True)
class Keeping:
    """How checkpoints of a run are marked, by settings and base, and how many stay; see ``checkpoints.rotate``."""

    config_hash: str = ""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    keep: int = 5
    best: bool = True
    horizon: int = 0
    base: Fingerprint = field(default_factory=dict)


class CheckpointedTrainer(Trainer):
    """Saves and restores everything a run needs to go on as if it had never stopped.

    Args:
        model: as the library says, like every argument not named here.
        args: ``output_dir`` is the folder of the checkpoints.
        rows: encoded training conversations.
        keeping: marks and rotation.
        options: for the library.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, rows: Sequence[Encoded], keeping: Keeping, **options: Any
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=rows, **options)
        self.extras: list[TrainingExtra] = []
        self.keeping, self.recovery = keeping, Recovery()
        self.stream = Stream(len(rows), args.seed) if rows else None
        batch, accumulation = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        self.consumption = Consumption(len(rows), batch, self.args.world_size, accumulation)
        self._resumed: Path | None = None
        self._digest = digest(rows)
        self._step_loss: tuple[int, Tensor | None] = (-1, None)
        self._norm: Any = None
        self._under_way = 0
        self.start = Start(self.model)
        self.settle: Callable[[], bool] = lambda: True
        """Says whether the record of roll-backs is on the disk, which goes before the checkpoints that refer to it."""
        self.add_callback(_TakeUp(self))

    @property
    def expected(self) -> checkpoints.Expected:
        """What a checkpoint of this run, as it is now, agrees with."""
        return checkpoints.Expected(self.keeping.config_hash, self.recovery)

    def seen_since(self, step: int) -> Span:
        """Return the span of the stream read by the steps after ``step``, the one under way or just done included."""
        assert self.stream is not None, "a run has samples"
        return self.stream.span(self.consumption.after(step), self.consumption.after(max(self._under_way, step + 1)))

    def rollback(self, reason: str, *, steps_back: int = 0) -> RollbackRequested:
        """Return a request to go back, for the caller to raise.

        Args:
            reason: a sentence for the record.
            steps_back: how far back the checkpoint must at least lie; the oldest is taken where none does, and the
                start where there is no checkpoint.
        """
        here = self.state.global_step
        folder = Path(self.args.output_dir)
        # far enough back, else as far back as there is one
        for limit in (here - steps_back, *sorted(step for step, _ in checkpoints.present(folder) if step <= here)):
            found, _ = checkpoints.newest(folder, self.expected, at_most=limit, calm=True)
            if found is not None:
                step = read_manifest(found).step
                return RollbackRequested(found, self.seen_since(step), reason, self._under_way - step)
        return RollbackRequested(None, self.seen_since(0), reason, self._under_way)

    def grant(self, request: RollbackRequested) -> Recovery:
        """Leave out the samples of a request from now on; return what ``recovery.json`` has to hold before the rest."""
        assert self.stream is not None, "a run has samples"
        self.recovery = self.recovery.after(request, self.extras)
        self.stream.skipped = self.recovery.skipped
        # measured once already, and noted in the checkpoint
        self.args.eval_on_start = request.checkpoint is None and self.eval_dataset is not None
        self.current_flos = 0.0
        return self.recovery

    def take_up(self, recovery: Recovery) -> None:
        """Go on under what earlier roll-backs left."""
        self.recovery = recovery
        if self.stream is not None:
            self.stream.skipped = recovery.skipped

    # what follows replaces the library's own

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, from a checkpoint if one is named, else from the start, also where some steps were taken already."""
        self._resumed = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        if self._resumed is not None:
            with opened(self._resumed / TRAINER_STATE_NAME, CheckpointError, limit=files.MAX_JSON_BYTES):
                pass  # the library reads it whole, whatever its size
        if self._resumed is None and self.optimizer is not None:
            self.begin_anew()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def begin_anew(self) -> None:
        """Be as the run was before its first step; the library makes a schedule and a record of its own."""
        self.start.restore(self.model)
        self.optimizer.state.clear()
        self._step_loss, self._norm = (-1, None), None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of one optimiser step, as the library does, and remember which step reads them."""
        self._under_way = self.state.global_step + 1
        return super().get_batch_samples(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        del train_dataset
        return self.stream

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        # the library's way to tell the sampler ends at the wrappers of several processes
        if self.stream is not None:
            self.stream.set_epoch(epoch)
        if self.state.global_step >= self.state.max_steps:
            # taken up at its end, where the library would do a step too many
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take a micro-batch, as the library does, and remember the step's loss."""
        loss = super().training_step(*args, **kwargs)
        step, before = self._step_loss
        here = self.state.global_step
        self._step_loss = (here, loss if before is None or step != here else before + loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        # read only where a checkpoint is written: a step does not wait for it
        self._norm = super()._get_grad_norm(*args, **kwargs)
        return self._norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        del model, trial
        self.store_flos()
        health = self.health()
        if not health.finite:
            self.unhealthy(health)
            return
        checkpoints_folder = Path(self.args.output_dir)
        waiting = checkpoints.waiting_folder(checkpoints_folder, self.state.global_step, self._token())
        try:
            if self.args.should_save:
                waiting.mkdir(parents=True)
            self._barrier()
            self._write(waiting)
            self._barrier()
            if self.args.should_save:
                settled, keeping = self.settle(), self.keeping
                checkpoints.publish(waiting, self._manifest(health))
                if settled:
                    checkpoints.rotate(
                        checkpoints_folder, keeping.keep, self.expected, best=keeping.best, horizon=keeping.horizon
                    )
        except (OSError, SafetensorError) as error:
            shutil.rmtree(waiting, ignore_errors=True)
            raise CheckpointError(
                f"The checkpoint of step {self.state.global_step} cannot be written ({error}); those before it are "
                f"untouched. Make room in {checkpoints_folder} and go on with --resume auto."
            ) from error
        self._barrier()

    def unhealthy(self, health: Health) -> None:
        """Called in place of writing a checkpoint of a state that is not finite.

        Raises:
            TrainingError: always; a recovery may do something else.
        """
        what = "a trained parameter" if not health.finite_parameters else "a moment of the optimiser"
        raise TrainingError(
            f"Step {self.state.global_step}: {what} is not finite, so no checkpoint is written; the one before is "
            "whole. Go on from it with --resume auto and a lower training.lr or gate_lr."
        )

    def health(self) -> Health:
        """Return how the run is after the step just done; every process has to call it."""
        parameters, moments = scan(self.model, self.optimizer, lambda found: self._sum(found.to(self.args.device)))
        measured = [row["eval_lm"] for row in self.state.log_history[-2:] if self._here(row) and "eval_lm" in row]
        return Health(
            finite_parameters=parameters,
            finite_moments=moments,
            loss=self._last_loss(),
            grad_norm=None if self._norm is None else _number(float(self._norm)),
            held_out=measured[-1] if measured else None,
            orthogonality_error=self.orthogonality_error() if parameters else None,
            open_incident=any(extra.open_incident for extra in self.extras),
        )

    def orthogonality_error(self) -> float | None:
        """Return the largest deviation of a gate from a rotation, ``None`` without gates."""
        return None

    def loop_state(self) -> dict[str, Any]:
        """Return what this process has summed up since the last log entry."""
        return {"loss": self._tr_loss, "losses": self._total_loss_scalar, "logged": self._globalstep_last_logged}

    def load_loop_state(self, state: Mapping[str, Any]) -> None:
        """Take up what ``loop_state`` returned."""
        self._tr_loss = state["loss"].to(self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = state["losses"], state["logged"]

    def phases(self) -> dict[str, Any]:
        """Return where in its schedules the run is; a run that goes on must be at the same place."""
        return {"max_steps": self.state.max_steps, "micro_batches_pending": 0}

    def _write(self, waiting: Path) -> None:
        files.write_model(self.model, waiting, writes=self.args.should_save)
        optimiser = files.pack(self.optimizer.state_dict())
        mine = {"generators": files.generators(), "loop": self.loop_state()}
        files.write_state(waiting, f"process-{self.args.process_index}", mine)
        if not self.args.should_save:
            return
        files.write_packed(waiting, "optimiser", *optimiser)
        files.write_state(waiting, "schedule", self.lr_scheduler.state_dict())
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            files.write_state(waiting, "scaler", scaler.state_dict())
        del self.state.log_history[:-LOGGED]
        self.state.save_to_json(str(waiting / TRAINER_STATE_NAME))
        extras = {extra.name: extra.state() for extra in self.extras}
        data = {"samples": self.consumption.samples, "sha256": self._digest}
        state = {"version": VERSION, "base": dict(self.keeping.base), "data": data}
        state |= {"phases": self.phases(), "extras": extras}
        (waiting / f"{STATE}.json").write_text(json.dumps(state, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def _manifest(self, health: Health) -> Manifest:
        assert self.stream is not None, "a run has samples"
        return Manifest(
            step=self.state.global_step,
            config_hash=self.keeping.config_hash,
            versions=dict(self.keeping.versions),
            processes=self.args.world_size,
            sharded=is_sharded(self.model),
            position=self.stream.place(self.consumption.after(self.state.global_step)),
            skipped=list(self.recovery.skipped),
            rollbacks=self.recovery.rollbacks,
            health=health,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._check_same(folder)
        files.load_model(self.model if model is None else model, folder)

    def _check_same(self, folder: Path) -> None:
        processes = read_manifest(folder).processes
        if processes != self.args.world_size:
            raise CheckpointError(
                f"{folder} was written by {processes} processes, and {self.args.world_size} train now; the steps would "
                "be others. Start as many as before, or begin a new run."
            )
        state = files.read_state(folder, STATE)
        if state.get("version") != VERSION:
            raise CheckpointError(
                f"{folder}: expected a state of version {VERSION}, got {state.get('version')!r}: another version of "
                "so8t wrote it. Go on with that one, or begin a new run."
            )
        if changed := changes(state["base"], self.keeping.base):
            what = "was trained on another base" if isinstance(self.model, PeftModel) else "began from another model"
            raise CheckpointError(
                f"{folder} {what}: {'; '.join(changed)}. What was learned does not fit this one. Restore it as it was, "
                "or begin a new run."
            )
        data = state["data"]
        if data != {"samples": self.consumption.samples, "sha256": self._digest}:
            raise CheckpointError(
                f"{folder} learned from {data['samples']:,} samples, and these {self.consumption.samples:,} are not "
                "the same; its place in them means nothing here. Restore the data files, or begin a new run."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            files.load_optimiser(self.optimizer, files.read_state(Path(checkpoint), "optimiser"))
            self.lr_scheduler.load_state_dict(files.read_state(Path(checkpoint), "schedule"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (Path(checkpoint) / "scaler.json").is_file():
            self.accelerator.scaler.load_state_dict(files.read_state(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            files.set_generators(self._of_process(Path(checkpoint))["generators"])

    def _of_process(self, folder: Path) -> Any:
        return files.read_state(folder, f"process-{self.args.process_index}")

    def restore_beside(self) -> None:
        """Restore what the library knows nothing of, once it has set up its loop.

        Raises:
            CheckpointError: the run would go on at another place of its schedules.
        """
        states = self.recovery.extras if self._resumed is None else self._restored(self._resumed)
        for extra in self.extras:
            if extra.name in states:
                extra.load(states[extra.name])

    def _restored(self, folder: Path) -> Mapping[str, Any]:
        """Restore this process' part of a checkpoint; return the states for the extras."""
        self.load_loop_state(self._of_process(folder)["loop"])
        state = files.read_state(folder, STATE)
        if state["phases"] != self.phases():
            raise CheckpointError(
                f"{folder} was at {state['phases']} of its schedules; this run would go on at {self.phases()}."
            )
        older = read_manifest(folder).rollbacks < self.recovery.rollbacks
        return self.recovery.extras if older else state["extras"]

    def _here(self, row: Mapping[str, Any]) -> bool:
        return row.get("step") == self.state.global_step

    def _last_loss(self) -> float | None:
        loss = self._step_loss[1]
        if loss is None:
            return None
        return _number(float(self._sum(loss)) / self.args.world_size)

    def _sum(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value, "sum") if self.args.world_size > 1 else value

    def _token(self) -> int:
        token = torch.tensor(secrets.randbits(31), device=self.args.device)
        if self.args.world_size > 1:
            distributed.broadcast(token, 0)
        return int(token)

    def _barrier(self) -> None:
        self.accelerator.wait_for_everyone()


class _TakeUp(TrainerCallback):
    def __init__(self, trainer: CheckpointedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        del args, state, control, kwargs
        self._trainer.restore_beside()


def _number(value: float | None) -> float | None:
    """Return the value where it is a finite number."""
    return value if value is not None and abs(value) < float("inf") else None
