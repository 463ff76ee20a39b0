"""Numbers put where they do not belong, once, in one optimiser step of a real training run.

Places: the language-model loss, one gradient, all gradients, a weight, a moment of the optimiser, an activation of a
gated layer, a learning rate, the penalty. Values: NaN, +Inf, 1e30, -Inf, and a denormal number. ``EXPECTED`` is the
stage of the recovery ladder that each of the 40 cases has to end in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import TrainerCallback

from so8t_torch.adapter import gated_layers
from so8t_torch.train import trainer as training
from so8t_torch.train.detection import moments, trainable

VALUES = {"nan": math.nan, "inf": math.inf, "1e30": 1e30, "-inf": -math.inf, "denormal": 1e-40}
PLACES = {
    "loss": "skip",
    "one_gradient": "skip",
    "all_gradients": "skip",
    "weight": "rollback",
    "moment": "rollback",
    "activation": "skip",
    "learning_rate": "skip",
    "penalty": "skip",
}
EXPECTED = {
    # a denormal number is a number: training is none the worse for one, so nothing is done about it
    (place, value): None if value == "denormal" else stage
    for place, stage in PLACES.items()
    for value in VALUES
}


class Injection(TrainerCallback):
    """Puts a value in place at chosen steps, each only once: steps done again after a roll-back are clean.

    Args:
        place: one of ``PLACES``.
        value: what is put there.
        steps: numbers of the optimiser steps.
    """

    def __init__(self, place: str, value: float, steps: set[int]) -> None:
        self.place, self.value, self.left = place, value, set(steps)
        self.fired: list[int] = []
        self.moved: list[list[str]] = []
        self._now: int | None = None
        self._striking = False
        self._hooks: list[Any] = []
        self._before: dict[str, torch.Tensor] = {}

    def due(self) -> bool:
        """Whether the step under way is one of those, and nothing was put in place yet; asking uses it up."""
        if self._now is None or self._now not in self.left:
            return False
        self.left.remove(self._now)
        self.fired.append(self._now)
        self._striking = True
        return True

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Hang hooks on parameters and on a gated layer."""
        self.on_train_end()
        held = list(trainable(model).values())
        if self.place == "one_gradient":
            held = held[:1]
        if "gradient" in self.place:
            self._hooks = [p.register_post_accumulate_grad_hook(self._gradient) for p in held]
        if self.place == "activation":
            _, layer = next(gated_layers(model))
            self._hooks = [layer.register_forward_hook(self._activation)]

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_step_begin(
        self, _args: Any, state: Any, _control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        """Break a weight or a moment before the step."""
        self._now, self._striking = state.global_step + 1, False
        if self.place == "weight" and self.due():
            self._break(next(iter(trainable(model).values())))
        if self.place == "moment" and self.due():
            self._break(_moment(optimizer, model))

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, optimizer: Any = None, **__: Any) -> None:
        """Break a learning rate; keep the parameters for comparison."""
        if self.place == "learning_rate" and self.due():
            optimizer.param_groups[0]["lr"] = self.value
        self._before = {name: p.detach().clone() for name, p in trainable(model).items()}

    def on_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Note which parameters the faulty step moved."""
        if self.fired and self._now == self.fired[-1]:
            now = trainable(model)
            self.moved.append([name for name, p in self._before.items() if not torch.equal(now[name], p)])

    def scaled(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor multiplied so that its sum is the injected value, gradient and all, if this step is due."""
        return value * (self.value / float(value.detach().sum())) if self.due() else value

    def _break(self, tensor: torch.Tensor) -> None:
        with torch.no_grad():
            tensor.view(-1)[0] = self.value

    def _gradient(self, parameter: torch.Tensor) -> None:
        if self._now in self.left or (self.place == "all_gradients" and self._striking):
            self.due()
            assert parameter.grad is not None
            if self.place == "all_gradients":
                parameter.grad.fill_(self.value)
            else:
                self._break(parameter.grad)

    def _activation(self, module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not module.training or not self.due():
            return None
        output = output.clone()
        # the first tokens of a row may be padding, which nothing looks at, and the last has no loss
        output[0, -2, 0] = self.value
        return output


def _moment(optimizer: Any, model: Any) -> torch.Tensor:
    """Return a moment, where there are any the scales of one that is held in 8 bits."""
    held = moments(optimizer, trainable(model))
    return next((value for name, value in held.items() if name.endswith(":absmax1")), next(iter(held.values())))


@contextmanager
def injected(place: str, value: str, steps: set[int]) -> Iterator[Injection]:
    """Yield a callback that does the injection; losses and penalties are broken while the block lasts.

    Args:
        place: one of ``PLACES``.
        value: one of ``VALUES``.
        steps: numbers of the optimiser steps.
    """
    injection = Injection(place, VALUES[value], steps)
    forward, penalty = training.SO8TTrainer._forward, training.penalty

    def broken_forward(self: Any, *args: Any) -> Any:
        nll, *rest = forward(self, *args)
        return (injection.scaled(nll), *rest)

    def broken_penalty(*args: Any, **kwargs: Any) -> torch.Tensor:
        return injection.scaled(penalty(*args, **kwargs))

    with ExitStack() as stack:
        if place == "loss":
            stack.enter_context(patch.object(training.SO8TTrainer, "_forward", broken_forward))
        if place == "penalty":
            stack.enter_context(patch.object(training, "penalty", broken_penalty))
        try:
            yield injection
        finally:
            injection.on_train_end()


class Late(TrainerCallback):
    """Breaks a weight once, behind the optimiser: nobody looks at it there before the next step.

    Args:
        step: number of the optimiser step.
        value: what is put there.
        part: of the parameter's name.
    """

    def __init__(self, step: int, value: float, part: str = "") -> None:
        self.step, self.value, self.part = step, value, part
        self.done = False

    def on_optimizer_step(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        """Break the weight."""
        if state.global_step == self.step - 1 and not self.done:
            self.done = True
            with torch.no_grad():
                next(p for name, p in trainable(model).items() if self.part in name).view(-1)[0] = self.value


class Shy:
    """Runs out of memory like a small card: over so many rows at once, or without checkpointing.

    Args:
        model: in training.
        rows: that fit.
        checkpointing: whether only a model that recomputes its activations fits.
        times: how often it runs out at most.
        after: passes that fit in any case, before.
    """

    def __init__(self, model: Any, rows: int, *, checkpointing: bool, times: int = 10**6, after: int = 0) -> None:
        self.model, self.rows, self.checkpointing, self.times, self.after = model, rows, checkpointing, times, after
        self.hook = model.get_base_model().model.layers[1].register_forward_hook(self)

    def __call__(self, module: Any, _inputs: Any, output: Any) -> None:
        """Run out of memory, if this pass is too large."""
        if not module.training or not self.times:
            return
        self.after -= 1
        if self.after >= 0:
            return
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.shape[0] > self.rows or (self.checkpointing and not self.model.is_activation_checkpointing):
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
