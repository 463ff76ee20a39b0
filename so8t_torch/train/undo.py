"""An optimiser's step taken back when memory runs out inside it.

Before a step that allocates moments (the first, as a rule) parameters and moments are copied to host memory. Before any
other the version counters of them are noted, which torch's own optimisers advance with each write: where none moved,
nothing was written. A step that has written and was not copied cannot be taken back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Undo:
    """What is needed to take the next step of an optimiser back.

    Args:
        optimizer: its gradients are in place.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        groups = (group["params"] for group in optimizer.param_groups)
        self._moving: list[nn.Parameter] = [p for params in groups for p in params if p.grad is not None]
        self._copies: list[tuple[Tensor, dict[str, Any]]] | None = None
        if any(not optimizer.state.get(p) for p in self._moving):
            self._copies = [(_copy(p), _copies(optimizer.state.get(p, {}))) for p in self._moving]
        self._versions = list(self._now())

    @torch.no_grad()
    def take_back(self) -> bool:
        """Put parameters and moments back as they were; return whether that was possible."""
        if self._copies is None:
            told = type(self._optimizer).__module__.startswith("torch.optim")
            return told and self._versions == list(self._now())
        for parameter, (number, entries) in zip(self._moving, self._copies, strict=True):
            parameter.copy_(number)
            if not entries:
                self._optimizer.state.pop(parameter, None)
                continue
            held = self._optimizer.state[parameter]
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    held[name].copy_(value)
                else:
                    held[name] = value
        return True

    def _now(self) -> Iterator[int]:
        for parameter in self._moving:
            entries = self._optimizer.state.get(parameter, {}).values()
            yield from (value._version for value in (parameter, *entries) if isinstance(value, Tensor))


def _copies(entries: dict[str, Any]) -> dict[str, Any]:
    return {name: _copy(value) if isinstance(value, Tensor) else value for name, value in entries.items()}


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)
