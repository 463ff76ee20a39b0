"""Writes captured logits behind the training's back: it never waits for the disk, and no fault of the disk reaches it.

Captures wait in a short queue; one that finds it full is dropped and counted. A thread lives only while there is
something to write. What the training has to hear is kept as notes, which it collects between steps: one when the first
file is announced, one for the first failure and for every hundredth.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal, NamedTuple

from safetensors import SafetensorError

from so8t_torch.train.logits.capture import Capture
from so8t_torch.train.logits.store import Store

CONTAINED = (OSError, SafetensorError, RuntimeError, ValueError, MemoryError)
"""What serialising and writing a file raises when disk, memory or device fail; a failed save is a note, not an end."""

Outcome = Literal["plan", "refused", "saved", "failed", "dropped"]


class Note(NamedTuple):
    """Something to tell: what kind of outcome, and the sentence."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Totals:
    """How many captures were saved, failed and dropped, and how many still waited when the patience ended."""

    saved: int
    failed: int
    dropped: int
    unfinished: int


class Writer:
    """Hands captures to a store, one after the other, in a thread of its own.

    Args:
        store: where they go.
        planned: number of files that the run means to write.
        waiting: captures that may wait while one is written.
        every: after its first, a failure is noted each time this many more have come.
    """

    def __init__(self, store: Store, planned: int, *, waiting: int = 2, every: int = 100) -> None:
        self._store, self._planned, self._waiting, self._every = store, planned, waiting, every
        self._queue: deque[Capture] = deque()
        self._state = threading.Condition()
        self._thread: threading.Thread | None = None
        self._counts: Counter[str] = Counter()
        self._notes: deque[Note] = deque()
        self._announced = False
        self.refused = False
        # a run that ends by an error never closes; a thread that still writes is given the time of two files
        atexit.register(self.close, 20.0)

    def submit(self, capture: Capture) -> None:
        """Take a complete capture, or drop it: the plan was refused, the queue is full, or it met a problem."""
        with self._state:
            if self.refused:
                return
            if capture.problem is not None:
                self._trouble("failed", f"step {capture.step}: {capture.problem}")
            elif len(self._queue) >= self._waiting:
                self._trouble("dropped", f"step {capture.step}: {self._waiting} files wait for a slow disk already")
            else:
                self._queue.append(capture)
                self._start()

    def _start(self) -> None:
        if self._thread is not None:
            return
        thread = threading.Thread(target=self._drain, name="so8t-logits", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or the interpreter ends
            self._trouble("failed", f"step {self._queue.pop().step}: {error}")
            return
        self._thread = thread

    def _drain(self) -> None:
        while (capture := self._next()) is not None:
            try:
                done = self._write(capture)
            except CONTAINED as error:
                with self._state:
                    self._trouble("failed", f"step {capture.step}: {error or type(error).__name__}")
            else:
                with self._state:
                    self._counts["saved"] += done
            del capture

    def _next(self) -> Capture | None:
        with self._state:
            if self._queue and not self.refused:
                return self._queue.popleft()
            self._queue.clear()
            self._thread = None
            self._state.notify_all()
            return None

    def _write(self, capture: Capture) -> bool:
        record = capture.record()
        if not self._announced:
            plan = self._store.projection(record.file_size(), self._planned)
            why = self._store.refusal(plan)
            self._announced = True
            with self._state:
                if why is not None:
                    self.refused = True
                    self._notes.append(Note("refused", f"{plan.sentence()}: {why}"))
                    return False
                self._notes.append(Note("plan", plan.sentence()))
        self._store.write(record)
        return True

    def _trouble(self, outcome: Outcome, text: str) -> None:
        self._counts[outcome] += 1
        number = self._counts[outcome]
        if number == 1 or number % self._every == 0:
            more = "" if number == 1 else f" ({number:,} times so far)"
            self._notes.append(Note(outcome, f"{text}{more}"))

    def notes(self) -> list[Note]:
        """Return what has to be told since the last call."""
        found = []
        while self._notes:
            found.append(self._notes.popleft())
        return found

    def close(self, patience: float) -> Totals:
        """Wait until everything is written, but not longer than ``patience`` seconds, and return the totals."""
        atexit.unregister(self.close)
        end = time.monotonic() + patience
        with self._state:
            while self._thread is not None and (left := end - time.monotonic()) > 0:
                self._state.wait(left)
            unfinished = len(self._queue) + (self._thread is not None)
            self._queue.clear()
            return Totals(self._counts["saved"], self._counts["failed"], self._counts["dropped"], unfinished)
