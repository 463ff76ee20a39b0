"""Sums between two log entries, from which the separately logged loss terms come.

    loss/lm = Σ nll / Σ supervised tokens        perplexity = exp(loss/lm)
    loss/pet = mean over steps of PET            loss/pet_weighted = mean over steps of λ(step) PET
    loss/aux = mean over steps of what the model adds to its loss by itself

Perplexity is a statement about the language model, so the penalty never enters it. Sums stay on the device until they
are read: one transfer per log entry, not per step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class LossMeter:
    """Accumulates loss terms and token counts of every micro-batch.

    Args:
        device: where the sums live.
        clock: seconds, monotonic.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._sums = torch.zeros(6, dtype=torch.float64, device=device)
        self.reset()

    def reset(self) -> None:
        """Forget everything, as after a log entry."""
        self._sums.zero_()
        self._steps: set[int] = set()
        self._started = self._clock()
        self.mark()

    def mark(self) -> None:
        """Remember the sums as they are now, at the beginning of an optimiser step."""
        self._marked, self._marked_steps = self._sums.clone(), set(self._steps)

    def undo(self) -> None:
        """Take back what was added since the mark: the step did not train."""
        self._sums.copy_(self._marked)
        self._steps = set(self._marked_steps)

    def state(self) -> dict[str, Any]:
        """Return the sums since the last reset; the time is not among them."""
        return {"sums": self._sums, "steps": sorted(self._steps)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up sums that ``state`` returned; the time counts from here."""
        self.reset()
        self._sums.copy_(state["sums"])
        self._steps = set(state["steps"])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out of the throughput."""
        began = self._clock()
        try:
            yield
        finally:
            self._started += self._clock() - began

    def add(
        self,
        step: int,
        nll: Tensor,
        supervised: int,
        tokens: Tensor,
        pet: Tensor,
        weight: float,
        extra: Tensor | None = None,
    ) -> None:
        """Add one micro-batch.

        Args:
            step: optimiser step it belongs to.
            nll: sum of negative log-likelihoods in nats.
            supervised: number of supervised tokens.
            tokens: number of real (not padding) tokens.
            pet: this micro-batch's part of the step's PET.
            weight: λ of this step.
            extra: this micro-batch's part of what the model adds to the step's loss.
        """
        self._steps.add(step)
        pet = pet.detach().double()
        own = torch.zeros_like(pet) if extra is None else extra.detach().double()
        parts = [nll.detach().double(), torch.full_like(pet, supervised), tokens.double(), pet, weight * pet, own]
        self._sums += torch.stack([part.to(self._sums.device) for part in parts])

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the terms since the last reset; ``reduce`` sums over processes."""
        sums = reduce(self._sums.clone())
        nll, supervised, tokens, pet, weighted, own = sums.tolist()
        seconds, steps = self._clock() - self._started, max(1, len(self._steps))
        if not supervised:
            return {}
        return {
            "loss/lm": nll / supervised,
            "loss/pet": pet / steps,
            "loss/pet_weighted": weighted / steps,
            **({"loss/aux": own / steps} if own else {}),
            "perplexity": perplexity(nll / supervised),
            "supervised_tokens": supervised,
            "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        }


def perplexity(loss: float) -> float:
    """Return exp(loss), the largest float where that overflows (a loss over 709 nats)."""
    return math.exp(min(loss, math.log(torch.finfo(torch.float64).max)))
