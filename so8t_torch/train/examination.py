"""The examination of one optimiser step: its losses, gradients, learning rates, parameters and moments, read at once.

Losses are noted while they are computed; everything is read in one transfer directly before the optimiser. With
several processes losses are summed and each magnitude is the largest of all (an OR over the processes for what is not
finite), so that all of them see the same and decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from so8t_torch.core.errors import TrainingError
from so8t_torch.train.detection import Limits, LossWatch, StateWatch, layer_of, moments, trainable
from so8t_torch.train.health import magnitudes, measurable
from so8t_torch.train.ladder import Cause, Fault

Sizes = dict[str, float]


@dataclass(frozen=True)
class Findings:
    """What a step looks like: its fault, language-model loss in nats per token, gradient norm before clipping."""

    fault: Fault | None
    loss: float
    norm: float


class Examination:
    """Looks at every optimiser step of one model.

    Args:
        limits: of losses and gradient norms.
    """

    def __init__(self, limits: Limits) -> None:
        self.losses, self._state = LossWatch(limits), StateWatch()
        self._model: nn.Module | None = None
        self._complete = False
        self.parameters: dict[str, nn.Parameter] = {}
        self.begin()

    def attach(self, model: nn.Module) -> None:
        """Look at the trainable parameters of a model from now on."""
        self._model, self.parameters = model, trainable(model)

    def begin(self) -> None:
        """Begin an optimiser step: forget the losses of the last one."""
        self._sums: Tensor | None = None
        self._norm: Tensor | None = None
        self._gradients: tuple[list[str], Tensor] | None = None

    def rolled_back(self) -> None:
        """Forget what the state left behind looked like."""
        self.losses.rolled_back()
        self._state.rolled_back()

    def saw_loss(self, language: Tensor, total: Tensor) -> None:
        """Add one micro-batch's part of the step's losses.

        Args:
            language: negative log-likelihood over the step's tokens.
            total: the same with the penalty.
        """
        part = torch.stack([language.detach().double(), total.detach().double()])
        self._sums = part if self._sums is None else self._sums + part

    def saw_gradients(self, step: int) -> None:
        """Measure the gradients before clipping spreads what is wrong in one over all of them.

        Raises:
            TrainingError: in the first step, a trainable parameter got no gradient.
        """
        if not self._complete:
            missing = [name for name, parameter in self.parameters.items() if parameter.grad is None]
            if missing:
                raise TrainingError(
                    f"Step {step}: {len(missing)} trainable parameters got no gradient, first {missing[:3]}."
                )
            self._complete = True
        self._gradients = self._gradient_sizes()

    def saw_norm(self, norm: Tensor) -> None:
        """Note the gradient norm before clipping."""
        self._norm = norm.detach()

    def examine(self, optimizer: torch.optim.Optimizer) -> Findings:
        """Read everything of this step.

        Args:
            optimizer: about to take it.
        """
        one = torch.ones(1, device=self._device, dtype=torch.float64)
        sums = (one[:0].new_zeros(2) if self._sums is None else self._sums).to(self._device)
        groups = {
            "rate": (["rate"], one * (math.inf if wrong_rates(optimizer) else 0)),
            "norm": (["norm"], one * (0.0 if self._norm is None else self._norm.double())),
            "before": self._gradients or ([], one[:0]),
            "after": self._gradient_sizes(),
            **self._state_sizes(optimizer),
        }
        (language, total), read = _read(sums, groups)
        norm = read["norm"]["norm"]
        fault = self._state.judge(read["parameters"], read["moments"])
        if fault is None and read["rate"]["rate"]:
            rates = [float(group["lr"]) for group in optimizer.param_groups]
            fault = Fault(Cause.RATE, detail=f"learning rates {rates} leave the schedule")
        fault = fault or self._soft(language, total, norm, read["before"], read["after"])
        return Findings(fault, language, norm)

    def state_fault(self, optimizer: torch.optim.Optimizer) -> Fault | None:
        """Return what is wrong with parameters and moments now."""
        read = self.state_sizes(optimizer)
        return self._state.judge(read["parameters"], read["moments"])

    def state_sizes(self, optimizer: torch.optim.Optimizer) -> dict[str, Sizes]:
        """Return the largest absolute value of each of the ``parameters`` and ``moments``."""
        return _read(torch.zeros(0, device=self._device), self._state_sizes(optimizer))[1]

    def _state_sizes(self, optimizer: torch.optim.Optimizer) -> dict[str, tuple[list[str], Tensor]]:
        groups: dict[str, Mapping[str, Tensor]]
        groups = {"parameters": self.parameters, "moments": moments(optimizer, self.parameters)}
        return {kind: (list(held), magnitudes([*held.values()], self._device)) for kind, held in groups.items()}

    def _gradient_sizes(self) -> tuple[list[str], Tensor]:
        held = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        return list(held), magnitudes([*held.values()], self._device)

    def _soft(self, language: float, total: float, norm: float, before: Sizes, after: Sizes) -> Fault | None:
        """Return what dropping the batch can answer; ``before`` and ``after`` are gradients around clipping."""
        fault = self.losses.judge(language, norm)
        if fault is not None and not math.isfinite(language):
            fault = self._frozen() or fault
        if fault is None and not math.isfinite(total):
            fault = Fault(Cause.LOSS, detail=f"the loss is {total} with the penalty, {language:.4g} without")
        if fault is None and _broken(after):
            fault = Fault(Cause.GRADIENT, detail="a gradient is not finite after clipping")
        if fault is None or fault.cause is not Cause.GRADIENT:
            return fault
        sizes = after if _broken(after) and not _broken(before) else before
        largest = max(sizes.values(), default=0.0)
        worst = [name for name, size in sizes.items() if size == largest]
        layers = {layer_of(name) for name in worst}
        where = f"; largest in {worst[0]}" if worst else ""
        return Fault(fault.cause, layers.pop() if len(layers) == 1 else None, fault.detail + where)

    def _frozen(self) -> Fault | None:
        """Return the fault of a frozen weight that is not finite; looked for only where the loss is not."""
        assert self._model is not None, "a step is judged only while training"
        held = {n: p for n, p in self._model.named_parameters() if not p.requires_grad and measurable(p)}
        group = (list(held), magnitudes([*held.values()], self._device))
        read = _read(torch.zeros(0, device=self._device), {"frozen": group})[1]["frozen"]
        bad = [name for name, size in read.items() if not math.isfinite(size)]
        return Fault(Cause.FROZEN, layer_of(bad[0]), f"{bad[0]} is not finite") if bad else None

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def state(self) -> dict[str, Any]:
        """Return what is remembered of the losses, as JSON values."""
        return self.losses.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` returned."""
        self.losses.load(state)


def wrong_rates(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a learning rate is not finite, negative, or above the one its schedule starts from."""
    rates = [(float(group["lr"]), float(group.get("initial_lr", math.inf))) for group in optimizer.param_groups]
    return any(not 0 <= rate <= min(highest * (1 + 1e-6), 1e300) for rate, highest in rates)


def over_processes(sums: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums over, and maxima of, all processes; what is not finite in one is infinite in all.

    Args:
        sums: this process' parts of sums.
        largest: this process' magnitudes.
    """
    largest = torch.where(torch.isfinite(largest), largest, math.inf)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums, dist.ReduceOp.SUM)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return sums, largest


def _read(sums: Tensor, groups: Mapping[str, tuple[list[str], Tensor]]) -> tuple[list[float], dict[str, Sizes]]:
    """Bring sums and named magnitudes to the host together, over all processes."""
    sums, largest = over_processes(sums, torch.cat([sizes for _, sizes in groups.values()]))
    found = torch.cat([sums, largest]).tolist()
    numbers = iter(found[len(sums) :])
    return found[: len(sums)], {kind: {name: next(numbers) for name in names} for kind, (names, _) in groups.items()}


def _broken(sizes: Sizes) -> bool:
    return not all(math.isfinite(size) for size in sizes.values())
