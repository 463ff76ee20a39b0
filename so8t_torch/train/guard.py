"""Watches every optimiser step and carries out what the recovery ladder decides.

The examination takes place in a hook directly before the optimiser: whatever else changed a gradient or a learning
rate has happened by then. A dropped step loses its gradients, so no optimiser moves a parameter or a moment. A cooled
learning rate holds for the optimiser's step alone; the schedule never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from so8t_torch.core.errors import TrainingError
from so8t_torch.train.checkpoint_state import like
from so8t_torch.train.config import RecoverySection
from so8t_torch.train.detection import Limits, LossWatch, layer_of
from so8t_torch.train.examination import Examination
from so8t_torch.train.ladder import STATE, Cause, Decision, Fault, Ladder, Rules, Sink, Stage
from so8t_torch.train.rollback import RollbackRequested

GoBack = Callable[[str, int], RollbackRequested]
"""From a reason and the number of steps to go back at least, to what has to be raised."""

GO_ON = (
    "What is checkpointed stays untouched. Read post_mortem.json, look at the data, then go on with --resume auto, "
    "or begin a new run with a lower training.lr or gate_lr."
)


class TrainingStopped(TrainingError):  # noqa: N818 - what happened to the run
    """The ladder gave up: the run ends with a post-mortem and the last healthy checkpoint untouched."""

    exit_code = 75


class Guard(TrainerCallback):
    """The detectors and the ladder of one run.

    Args:
        settings: of detection and ladder.
        record: gets each transition, and the post-mortem with ``transition`` "post-mortem".

    ``on_drop``, ``samples`` (the span of the stream that a step reads), ``go_back`` and ``initial`` (the numbers to
    which ``reinitialise`` resets a layer) are the trainer's to set.
    """

    name = "recovery"

    def __init__(self, settings: RecoverySection | None = None, record: Sink | None = None) -> None:
        self._settings = settings or RecoverySection()
        self.ladder = Ladder(rules(self._settings), record)
        self.examination = Examination(limits(self._settings))
        self.kept = self.dropped = 0
        self.on_drop: Callable[[], None] | None = None
        self.samples: Callable[[int], list[int]] | None = None
        self.go_back: GoBack | None = None
        self.initial: Mapping[str, Tensor] = {}
        self._rates: list[Any] | None = None
        self._hooks: list[Any] = []
        self._step = 0
        self._examined = False
        self._scheduler: Any = None

    @property
    def open_incident(self) -> bool:
        """Whether a fault is on probation."""
        return self.ladder.open_incident

    def state(self) -> dict[str, Any]:
        """Return where the ladder stands, as JSON values; a roll-back leaves it there."""
        return {"ladder": self.ladder.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` returned."""
        self.ladder.load(state["ladder"])

    def sight(self) -> dict[str, Any]:
        """Return what goes back with the weights: the losses to compare with, and what was counted since the last log.

        After a roll-back losses are as high as they were then; against later ones they would look like spikes.
        """
        return {"losses": self.examination.state(), "counts": [self.kept, self.dropped]}

    def load_sight(self, state: Mapping[str, Any]) -> None:
        """Take up what ``sight`` returned."""
        self.examination.load(state["losses"])
        self.kept, self.dropped = state["counts"]

    def begin_anew(self) -> None:
        """Forget all that ``sight`` tells; the ladder stays where it is."""
        self.load_sight({"losses": LossWatch(limits(self._settings)).state(), "counts": [0, 0]})

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Hang the hooks on the optimiser, under whatever wraps it."""
        del args, state, control, kwargs
        self.on_train_end()
        self._scheduler = lr_scheduler
        self.examination.attach(model)
        bare = getattr(optimizer, "optimizer", optimizer)
        before = bare.register_step_pre_hook(lambda held, *_: self._before_step(held))
        after = bare.register_step_post_hook(lambda held, *_: self._after_step(held))
        self._hooks = [before, after]

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        del args, kwargs
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def counted(self) -> tuple[int, int]:
        """Return how many steps trained and how many were dropped since the last call."""
        counts = self.kept, self.dropped
        self.kept = self.dropped = 0
        return counts

    def begin(self, step: int) -> None:
        """Begin an optimiser step: forget the losses of the last one.

        Args:
            step: number of the step that is about to be taken.
        """
        self._step, self._examined = step, False
        self.examination.begin()

    def norm_bound(self, usual: float) -> float:
        """Return the bound on the gradient norm, tighter than ``usual`` while the ladder clips."""
        history = self.examination.losses.usual_norm() if self.ladder.clipping else None
        return usual if history is None else min(usual, history)

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._examined:
            return  # memory ran out behind the look at this step, and it is taken once more
        found = self.examination.examine(optimizer)
        self._examined = True
        samples = None if found.fault is None or self.samples is None else self.samples(self._step)
        decision = self.ladder.observe(self._step, found.fault, samples=samples)
        if not decision.drop:
            self.examination.losses.trained(found.loss, found.norm)
        self._rates = None
        if decision.drop:
            self.dropped += 1
            for parameter in self.examination.parameters.values():
                parameter.grad = None
            if self.on_drop is not None:
                self.on_drop()
            self._act(decision, found.fault, optimizer)
            return
        self.kept += 1
        if decision.rate != 1:
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * decision.rate

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._rates is not None:
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None

    def _act(self, decision: Decision, fault: Fault | None, optimizer: torch.optim.Optimizer) -> None:
        if fault is None or fault.cause is Cause.FROZEN:
            self._stop("no checkpoint holds the frozen weights; the process has to load them anew", fault, optimizer)
        if decision.stage is Stage.STOP:
            self._stop("too many recoveries", fault, optimizer)
        if fault.cause is Cause.RATE:
            for group, rate in zip(optimizer.param_groups, self._scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        if decision.stage is Stage.REINITIALISE and fault.layer is not None:
            self._reset(fault.layer, optimizer)
        if decision.stage is Stage.ROLLBACK:
            self.examination.rolled_back()
            distance = 0 if fault.cause in STATE else self._settings.rollback_distance
            reason = f"Step {self._step}: {fault.cause.value}: {fault.detail}."
            if self.go_back is None:
                self._stop("no trainer that could go back", fault, optimizer)
            request = self.go_back(reason, distance)
            self.ladder.went_back(request.steps)
            raise request

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Scan parameters and moments before anything of them is saved, measured or logged, and at the end."""
        del args, kwargs
        written = control.should_save or control.should_evaluate or control.should_log
        if written or state.global_step >= state.max_steps:
            self.check_state(getattr(optimizer, "optimizer", optimizer))

    def check_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Scan parameters and moments now.

        Raises:
            RollbackRequested: the state is broken.
            TrainingStopped: it is broken once too often.
        """
        fault = self.examination.state_fault(optimizer)
        if fault is not None:
            self._act(self.ladder.observe(self._step, fault, samples=None), fault, optimizer)

    def _reset(self, layer: str, optimizer: torch.optim.Optimizer) -> None:
        """Give a layer the numbers it was built with, and its optimiser a clean start."""
        for name, parameter in self.examination.parameters.items():
            if layer_of(name) == layer:
                parameter.data.copy_(like(parameter, self.initial[name]))
                optimizer.state.pop(parameter, None)
        self.examination.rolled_back()

    def _stop(self, reason: str, fault: Fault | None, optimizer: torch.optim.Optimizer) -> NoReturn:
        sizes = self.examination.state_sizes(optimizer)
        report = {
            "transition": "post-mortem",
            "reason": reason,
            "step": self._step,
            "cause": None if fault is None else fault.cause.value,
            "layer": None if fault is None else fault.layer,
            "detail": None if fault is None else fault.detail,
            "learning_rates": [_plain(float(group["lr"])) for group in optimizer.param_groups],
            "largest": {name: _plain(size) for kind in sizes.values() for name, size in kind.items()},
            **self.state(),
            **self.sight(),
        }
        self.ladder.record(report)
        what = "the ladder stopped" if fault is None else f"{fault.cause.value}: {fault.detail}"
        raise TrainingStopped(
            f"Step {self._step}: {what}. Training stops: {reason} ({self.ladder.recoveries} recoveries in the last "
            f"{self._settings.recovery_window} steps, {self._settings.recoveries} allowed). {GO_ON}"
        )


def rules(section: RecoverySection) -> Rules:
    """Return the ladder's bounds as the settings say."""
    return Rules(
        section.skip_window,
        section.skips,
        section.probation,
        section.cool_steps,
        section.cool_factor,
        section.cool_floor,
        section.recoveries,
        section.recovery_window,
        section.reinitialise,
    )


def limits(section: RecoverySection) -> Limits:
    """Return the detectors' bounds as the settings say."""
    return Limits(
        section.window,
        section.history,
        section.spike_mads,
        section.spike_floor,
        section.divergence_ratio,
        section.divergence_steps,
        section.clip_quantile,
    )


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
