"""Deep copies of a training state in host memory: a ring, bounded in number and bytes, of healthy moments only."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from so8t_torch.train.detection import moments
from so8t_torch.train.health import magnitudes, measurable


@dataclass(frozen=True)
class Snapshot:
    """One moment: everything that training would go on from, on the CPU and sharing no memory with it."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    beside: dict[str, Any]
    generators: tuple[Any, Any, Tensor, list[Tensor]]
    size: int


class SnapshotRing:
    """The newest snapshots.

    Args:
        count: how many are kept.
        max_bytes: of all together; the newest stays in any case.
    """

    def __init__(self, count: int = 10, max_bytes: int = 1 << 33) -> None:
        self._kept: deque[Snapshot] = deque(maxlen=count)
        self._max_bytes = max_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def newest(self) -> Snapshot | None:
        """Return the newest, ``None`` before the first."""
        return self._kept[-1] if self._kept else None

    def take(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, step: int, beside: Mapping[str, Any]
    ) -> bool:
        """Keep this moment if everything in it is finite; return whether it was kept.

        Args:
            model: whose state is copied.
            optimizer: ``None`` leaves its moments out.
            step: for the record.
            beside: further objects' states (scheduler, scaler, place in the data), copied too.
        """
        if broken(model, optimizer):
            return False
        parameters = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        moved = None if optimizer is None else _apart(optimizer.state_dict())
        self._kept.append(
            Snapshot(step, parameters, moved, _apart(dict(beside)), _generators(), _bytes((parameters, moved, beside)))
        )
        while len(self._kept) > 1 and sum(kept.size for kept in self._kept) > self._max_bytes:
            self._kept.popleft()
        return True


def broken(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Return the names of parameters, buffers and moments that are not finite."""
    parameters = dict(model.named_parameters())
    held: dict[str, Tensor] = {**parameters, **dict(model.named_buffers())}
    if optimizer is not None:
        held |= moments(optimizer, parameters)
    held = {name: value for name, value in held.items() if measurable(value)}
    sizes = magnitudes([*held.values()], torch.device("cpu"))
    return [name for name, finite in zip(held, sizes.isfinite().tolist(), strict=True) if not finite]


def restore(snapshot: Snapshot, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Put model, optimiser and random generators back as they were."""
    model.load_state_dict(snapshot.model)
    if optimizer is not None and snapshot.optimizer is not None:
        optimizer.load_state_dict(_apart(snapshot.optimizer))
    for parameter in model.parameters():
        parameter.grad = None
    python, numpy_state, cpu, cuda = snapshot.generators
    random.setstate(python)
    np.random.set_state(numpy_state)
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def _generators() -> tuple[Any, Any, Tensor, list[Tensor]]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _apart(value: Any) -> Any:
    """Return a copy that shares no tensor, mapping or list; what is neither is taken as it is."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _apart(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_apart(item) for item in value)
    return value


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_bytes(item) for item in value.values())
    return sum(_bytes(item) for item in value) if isinstance(value, list | tuple) else 0
