"""The recovery ladder: which of six stages answers a fault of a training step, as a state machine of plain numbers.

    skip → clip → cool → rollback → reinitialise → stop

A fault that dropping the batch can answer (loss, gradient, learning rate) takes the lowest stage not yet tried: it is
skipped; a second one within ``skip_window`` steps switches clipping on; the next halves the learning rate, down to
``cool_floor``; the next rolls back. A fault of the state itself (parameters, moments) and a diverged loss roll back at
once; where ``reinitialise`` allows it, a layer implicated twice is reset instead. After ``probation`` healthy steps
the incident is closed and the ladder goes down one stage, again after as many more. More than ``recoveries`` in
``recovery_window`` steps, those done again not counted, stop the run, as does a broken frozen weight, which no
checkpoint holds. Everything else is counted in steps taken, which a rollback does not turn back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

Sink = Callable[[dict[str, Any]], None]
"""Takes one mapping of JSON values for each transition."""


class Stage(IntEnum):
    """What is done about a fault, the mildest first."""

    SKIP = 0
    CLIP = 1
    COOL = 2
    ROLLBACK = 3
    REINITIALISE = 4
    STOP = 5


class Cause(StrEnum):
    """What is wrong with a step."""

    LOSS = "loss"
    SPIKE = "spike"
    GRADIENT = "gradient"
    RATE = "learning rate"
    DIVERGENCE = "divergence"
    PARAMETER = "parameter"
    MOMENT = "moment"
    FROZEN = "frozen weight"


STATE = frozenset({Cause.PARAMETER, Cause.MOMENT})
"""Causes that lie in what a checkpoint restores: dropping a batch does not remove them."""

HARD = STATE | {Cause.DIVERGENCE, Cause.FROZEN}
"""Causes that roll back at once, or stop where no checkpoint holds what is broken."""


@dataclass(frozen=True)
class Fault:
    """What was found: its cause, the layer where it shows (``None``: nowhere in particular), and a sentence."""

    cause: Cause
    layer: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Rules:
    """Bounds of the ladder; counts are in optimiser steps, the fields those of the recovery section."""

    skip_window: int = 20
    skips: int = 2
    probation: int = 100
    cool_steps: int = 100
    cool_factor: float = 0.5
    cool_floor: float = 1 / 16
    recoveries: int = 5
    recovery_window: int = 1000
    reinitialise: bool = False


@dataclass(frozen=True)
class Decision:
    """What happens to a step.

    ``stage`` is the stage taken now, ``None`` for a healthy step; ``drop`` says that no parameter may move; ``clip``
    that the gradient norm is bounded by its own history; ``rate`` multiplies the learning rate.
    """

    stage: Stage | None
    drop: bool
    clip: bool
    rate: float


@dataclass
class _Place:
    """Where the ladder stands; every field is a JSON value."""

    clock: int = 0
    level: int | None = None
    open: bool = False
    anchor: int = 0
    rate: float = 1.0
    cool_until: int = 0
    stopped: bool = False
    dropped: list[int] = field(default_factory=list)
    recoveries: list[int] = field(default_factory=list)
    layers: list[tuple[int, str]] = field(default_factory=list)


class Ladder:
    """Answers one observation per optimiser step.

    Args:
        rules: the bounds.
        record: gets each transition.
    """

    name = "ladder"

    def __init__(self, rules: Rules, record: Sink | None = None) -> None:
        self.rules = rules
        self.record = record or _forget_it
        self._at = _Place()

    @property
    def clock(self) -> int:
        """Steps observed so far; a rollback does not turn it back."""
        return self._at.clock

    @property
    def level(self) -> Stage | None:
        """Highest stage in force, ``None`` when nothing is remembered of any fault."""
        return None if self._at.level is None else Stage(self._at.level)

    @property
    def open_incident(self) -> bool:
        """Whether a fault is on probation."""
        return self._at.open

    @property
    def clipping(self) -> bool:
        """Whether the gradient norm is to be bounded by its own history."""
        return self._at.level is not None and self._at.level >= Stage.CLIP

    @property
    def rate(self) -> float:
        """Factor on the learning rate."""
        return self._at.rate

    @property
    def recoveries(self) -> int:
        """Recoveries of the last ``recovery_window`` steps."""
        return len(self._at.recoveries)

    def observe(self, step: int, fault: Fault | None, **context: Any) -> Decision:
        """Take note of one step and say what happens to it.

        Args:
            step: the trainer's step, written into the records.
            fault: what is wrong with it, ``None`` for a healthy step.
            context: further JSON values for the record of a fault.
        """
        at = self._at
        if at.stopped:
            return self._decision(Stage.STOP)
        at.clock += 1
        self._forget()
        if at.rate < 1 and at.clock > at.cool_until:
            at.rate = 1.0
            self._note(step, "learning rate returned")
        if fault is None:
            self._healthy(step)
            return self._decision(None)
        return self._decision(self._answer(step, fault, context))

    def went_back(self, steps: int) -> None:
        """Let no recovery grow older by steps that are done again, else a fault that comes back would never stop a run.

        Args:
            steps: from the checkpoint to the fault.
        """
        self._at.recoveries = [clock + steps for clock in self._at.recoveries]

    def _answer(self, step: int, fault: Fault, context: dict[str, Any]) -> Stage:
        at, before = self._at, self._at.level
        at.dropped.append(at.clock)
        if fault.layer is not None:
            at.layers.append((at.clock, fault.layer))
        stage = self._next(fault)
        if not at.open or stage >= Stage.ROLLBACK:
            at.recoveries.append(at.clock)
        if len(at.recoveries) > self.rules.recoveries:
            stage = Stage.STOP
        at.open, at.anchor, at.stopped = True, at.clock, stage is Stage.STOP
        at.level = max(before or Stage.SKIP, Stage.SKIP if fault.cause in HARD and not at.stopped else stage)
        if stage is Stage.COOL:
            at.rate = max(at.rate * self.rules.cool_factor, self.rules.cool_floor)
            at.cool_until = at.clock + self.rules.cool_steps
        self._note(step, "fault", stage=stage.name.lower(), came_from=before, **_described(fault), **context)
        return stage

    def _next(self, fault: Fault) -> Stage:
        at = self._at
        twice = fault.layer is not None and [layer for _, layer in at.layers].count(fault.layer) > 1
        reset = self.rules.reinitialise and twice
        if fault.cause is Cause.FROZEN:
            return Stage.STOP
        if fault.cause in HARD:
            return Stage.REINITIALISE if reset and fault.cause in STATE else Stage.ROLLBACK
        if at.level is None:
            return Stage.SKIP
        if at.level == Stage.SKIP:
            return Stage.CLIP if len(at.dropped) >= self.rules.skips else Stage.SKIP
        if at.level == Stage.CLIP or (at.level == Stage.COOL and at.rate > self.rules.cool_floor):
            return Stage.COOL
        return Stage.REINITIALISE if reset and at.level >= Stage.ROLLBACK else Stage.ROLLBACK

    def _healthy(self, step: int) -> None:
        at = self._at
        if at.level is None or at.clock - at.anchor < self.rules.probation:
            return
        before, closes = at.level, at.open
        at.level = None if at.level == Stage.SKIP else at.level - 1
        at.open, at.anchor = False, at.clock
        self._note(step, "incident closed" if closes else "one stage down", came_from=before)

    def _forget(self) -> None:
        at, rules = self._at, self.rules
        at.dropped = [clock for clock in at.dropped if at.clock - clock < rules.skip_window]
        at.recoveries = [clock for clock in at.recoveries if at.clock - clock < rules.recovery_window]
        at.layers = [(clock, layer) for clock, layer in at.layers if at.clock - clock < rules.recovery_window]

    def _decision(self, stage: Stage | None) -> Decision:
        return Decision(stage, stage is not None, self.clipping, self._at.rate)

    def _note(self, step: int, transition: str, came_from: int | None = None, **more: Any) -> None:
        place = {"level": _name(self._at.level), "rate": self._at.rate, "recoveries": len(self._at.recoveries)}
        row = {"transition": transition, "step": step, "clock": self._at.clock, "came_from": _name(came_from)}
        self.record(row | place | more)

    def state(self) -> dict[str, Any]:
        """Return where the ladder stands, as JSON values."""
        return {**vars(self._at), "layers": [list(pair) for pair in self._at.layers]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the place that ``state`` returned."""
        place = _Place(**state)
        place.layers = [(int(clock), str(layer)) for clock, layer in place.layers]
        place.dropped, place.recoveries = list(place.dropped), list(place.recoveries)
        self._at = place


def _forget_it(row: dict[str, Any]) -> None:
    del row


def _name(level: int | None) -> str | None:
    return None if level is None else Stage(level).name.lower()


def _described(fault: Fault) -> dict[str, Any]:
    return {"cause": fault.cause.value, "layer": fault.layer, "detail": fault.detail}
