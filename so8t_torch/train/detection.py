"""What is wrong with a step: non-finite or implausible numbers in losses, gradients, parameters and moments.

    spike         loss > median + max(6 MAD, floor) of the last losses that trained
    divergence    loss > 3 EMA + floor in ten steps in a row
    norm spike    ‖g‖ > 1000 median of the last norms
    jump          max |x| > 10⁶ (1 + max |x| a step ago)

MAD is the median distance from the median; the floor (nats per token) keeps a small loss with little spread from
raising alarms. A step of an optimiser moves no number by six orders of magnitude; where that happens, memory was
corrupted.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from so8t_torch.train.health import measurable
from so8t_torch.train.ladder import Cause, Fault

JUMP = 1e6
"""Growth of a tensor's largest entry, within one step, that no optimiser brings about."""

NORM_SPIKE = 1000.0
"""Gradient norms this many times their median count as faults, although clipping would bound them."""

NOT_MOMENTS = ("step", "qmap1", "qmap2")
"""Entries of an optimiser's state that are counters and constant tables."""

_FIRST_INDEX = re.compile(r"^(?:[^.]+\.)*?\d+(?=\.|$)")


@dataclass(frozen=True)
class Limits:
    """When a loss counts as a fault; the fields are those of the recovery section.

    ``spike_floor`` is in nats per token, ``window`` and ``history`` count losses that trained.
    """

    window: int = 200
    history: int = 20
    spike_mads: float = 6.0
    spike_floor: float = 1.0
    divergence_ratio: float = 3.0
    divergence_steps: int = 10
    clip_quantile: float = 0.9


class LossWatch:
    """Compares each loss and gradient norm with those of the last steps that trained.

    Args:
        limits: when to speak up.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._losses: deque[float] = deque(maxlen=limits.window)
        self._norms: deque[float] = deque(maxlen=limits.window)
        self._average: float | None = None
        self._above = 0

    def judge(self, loss: float, norm: float) -> Fault | None:
        """Return what is wrong with a step, ``None`` for nothing.

        Args:
            loss: language-model loss in nats per token.
            norm: gradient norm before clipping.
        """
        self._above = self._above + 1 if self._high(loss) else 0
        if self._above >= self._limits.divergence_steps:
            return Fault(Cause.DIVERGENCE, detail=f"loss {loss:.4g} in the {self._above}th step far above its average")
        if not math.isfinite(loss):
            return Fault(Cause.LOSS, detail=f"the loss is {loss}")
        if not math.isfinite(norm):
            return Fault(Cause.GRADIENT, detail=f"the gradient norm is {norm}")
        bound = self.bound()
        if bound is not None and loss > bound:
            return Fault(Cause.SPIKE, detail=f"loss {loss:.4g} over the bound {bound:.4g}")
        usual = statistics.median(self._norms) if self._enough() else math.inf
        if norm > NORM_SPIKE * usual:
            return Fault(Cause.GRADIENT, detail=f"gradient norm {norm:.4g}, usually {usual:.4g}")
        return None

    def bound(self) -> float | None:
        """Return the largest loss that is no spike, ``None`` before there is enough to compare with."""
        if not self._enough():
            return None
        median = statistics.median(self._losses)
        spread = statistics.median(abs(loss - median) for loss in self._losses)
        return median + max(self._limits.spike_mads * spread, self._limits.spike_floor)

    def usual_norm(self) -> float | None:
        """Return the quantile of the gradient norms to which clipping holds the next ones, ``None`` too early."""
        if not self._enough():
            return None
        ordered = sorted(self._norms)
        return ordered[min(len(ordered) - 1, int(self._limits.clip_quantile * len(ordered)))]

    def trained(self, loss: float, norm: float) -> None:
        """Remember a step that moved the parameters."""
        self._losses.append(loss)
        self._norms.append(norm)
        if not self._high(loss):
            self._average = loss if self._average is None else 0.99 * self._average + 0.01 * loss

    def rolled_back(self) -> None:
        """Begin to count high losses anew."""
        self._above = 0

    def _high(self, loss: float) -> bool:
        if self._average is None:
            return False
        return not loss <= self._limits.divergence_ratio * self._average + self._limits.spike_floor

    def _enough(self) -> bool:
        return len(self._losses) >= self._limits.history

    def state(self) -> dict[str, Any]:
        """Return everything remembered, as JSON values."""
        kept = {"losses": list(self._losses), "norms": list(self._norms)}
        return {**kept, "average": self._average, "above": self._above}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` returned."""
        self._losses = deque(state["losses"], maxlen=self._limits.window)
        self._norms = deque(state["norms"], maxlen=self._limits.window)
        self._average, self._above = state["average"], state["above"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimiser's measurable state of each parameter as ``name:key``."""
    return {
        f"{name}:{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in NOT_MOMENTS and isinstance(value, Tensor) and measurable(value)
    }


class StateWatch:
    """Finds parameters and moments that are not finite or jumped, by their magnitudes of one step and the last."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def judge(self, parameters: Mapping[str, float], held: Mapping[str, float]) -> Fault | None:
        """Return the first fault of the state.

        Args:
            parameters: largest absolute value by name.
            held: the same of the moments, as ``name:key``.
        """
        for cause, sizes in ((Cause.PARAMETER, parameters), (Cause.MOMENT, held)):
            bad = [name for name, size in sizes.items() if not size <= JUMP * (1 + self._before.get(name, 0.0))]
            if bad:
                layers = {layer_of(name.partition(":")[0]) for name in bad}
                detail = f"{len(bad)} tensors hold numbers that cannot be, first {bad[0]} (up to {sizes[bad[0]]:.3g})"
                return Fault(cause, layers.pop() if len(layers) == 1 else None, detail)
        self._before = {**parameters, **held}
        return None

    def rolled_back(self) -> None:
        """Forget the magnitudes of the state that was left."""
        self._before = {}


def layer_of(name: str) -> str:
    """Return the layer a parameter belongs to: its path up to the first number, else the module that holds it."""
    found = _FIRST_INDEX.match(name)
    return found[0] if found else name.rpartition(".")[0]
