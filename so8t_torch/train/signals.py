"""When a run saves beside its schedule, and when it stops: on a clock, and on SIGINT or SIGTERM.

A signal never interrupts a step. It is noted, and told on the terminal; the step is finished, a checkpoint written, and
the process ends with status 128 + the signal's number (130, 143). The same signal once more has its usual effect. Under
several processes all of them act on what any of them has noted, at the same step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from so8t_torch.core.errors import SO8TError

WATCHED = (signal.SIGINT, signal.SIGTERM)

STDERR = 2
"""Written to without Python's buffers, in which the signal may have interrupted somebody."""


class Interrupted(SO8TError):  # noqa: N818 - asked for, not an error
    """A signal ended the run after a whole step; the checkpoint of that step is complete.

    Args:
        number: of the signal.
        step: the last one done.
    """

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"{name}: stopped after step {step} with a checkpoint; go on with --resume auto.")
        self.number, self.step, self.exit_code = number, step, 128 + number


class StopSignals:
    """Notes SIGINT and SIGTERM while the block runs; outside the main thread Python allows no handler, and none is set.

    ``received`` is the number of the last signal, 0 for none.

    Args:
        tells: whether this process says on the terminal what happens now.
    """

    def __init__(self, *, tells: bool = True) -> None:
        self.received, self._tells = 0, tells
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = number
        if self._tells:
            name = signal.Signals(number).name
            line = f"\n{name}: this step is finished and saved, then the run ends; once more ends it at once\n"
            with contextlib.suppress(OSError):  # nobody may be listening any more
                os.write(STDERR, line.encode())
        signal.signal(number, self._before[number] or signal.SIG_DFL)


class SaveAndStop(TrainerCallback):
    """Asks for a checkpoint when the clock or a signal says so, and for the end on a signal.

    Args:
        signals: those noted so far.
        every_minutes: time between checkpoints, ``None`` for no clock.
        clock: seconds, monotonic.
    """

    def __init__(
        self, signals: StopSignals, every_minutes: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._signals, self._clock = signals, clock
        self._seconds = None if every_minutes is None else 60 * every_minutes
        self._saved = clock()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        del args, state, control, kwargs
        self._saved = self._clock()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the library's flags."""
        del state, kwargs
        due = self._seconds is not None and self._clock() - self._saved >= self._seconds
        # one that arrives meanwhile here stays for the next step, where all hear of it
        received, save = _any_process([self._signals.received, int(due)], args)
        self._signals.received = max(self._signals.received, received)
        if received or save:
            control.should_save = True
        if received:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the time from here."""
        del args, state, control, kwargs
        self._saved = self._clock()


def _any_process(flags: list[int], args: TrainingArguments) -> list[int]:
    """Return the largest value of each flag over the processes."""
    if args.world_size == 1:
        return flags
    both = torch.tensor(flags, device=args.device)
    distributed.all_reduce(both, distributed.ReduceOp.MAX)
    return [int(value) for value in both.tolist()]
