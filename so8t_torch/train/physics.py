"""Physics terms in the loss of training, as constraints whose multipliers follow what is measured.

    L = task + Σ_k (λ_k c_k + (ρ_k/2) c_k²)        λ_k ← clip(λ_k + ρ_k (c_k − ε_k), 0, λ_k^max) after a step

A micro-batch counts by its share of the step's tokens, over all processes, and the square is of its own c_k; the c_k
of a step, which moves λ_k, is the mean so weighted. Every ``every``-th step from ``start_step`` on is looked at; on the
others the loss is the task's. A step that was dropped moves no multiplier. Multipliers are no parameters: they lie in
the checkpoint beside the sums of the loop. A term of weight 0 is measured and changes nothing.
Symbols: ρ ``weight``, ε ``target``, λ^max ``max``. Mathematics: ops/physics; what terms look at: observation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from so8t_torch.core.config import Section
from so8t_torch.core.errors import TrainingError
from so8t_torch.ops.physics import augmented_lagrangian, update_multipliers
from so8t_torch.train.observation import Calls, Observer, check_sources
from so8t_torch.train.physics_terms import find_term

NotNegative = Annotated[float, Field(ge=0)]


class TermSection(Section):
    """One term: its weight ρ, the value ε that satisfies it, the largest multiplier, and options of its function."""

    weight: NotNegative = 1.0
    target: NotNegative = 0.0
    max: NotNegative = 10.0
    options: dict[str, int | float] = Field(default_factory=dict)


class PhysicsSection(Section):
    """Physics terms by name (see ``physics_terms``), random probes a micro-batch, and at which steps they are taken."""

    terms: dict[str, TermSection] = Field(default_factory=dict)
    probes: Annotated[int, Field(ge=1)] = 1
    every: Annotated[int, Field(ge=1)] = 1
    start_step: Annotated[int, Field(ge=0)] = 0


class Physics(TrainerCallback):
    """Observes the forward pass, returns its part of the loss, and moves the multipliers after each step.

    Args:
        section: the terms.
        decoder: the model's stack of layers.
        seed: of the probes.
        process: number of this process.
        reduce: sums a tensor over processes.

    Raises:
        ConfigError: a term or an option is unknown.
        TrainingError: the model has nothing that a term looks at.
    """

    def __init__(
        self,
        section: PhysicsSection,
        decoder: nn.Module,
        seed: int,
        process: int = 0,
        reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        self._section, self._seed, self._process, self._reduce = section, seed, process, reduce
        self._terms = [find_term(name, term.options) for name, term in section.terms.items()]
        self._options = [dict(term.options) for term in section.terms.values()]
        self._observer = Observer(decoder, {term.kind for term in self._terms}) if self._terms else None
        asked = list(section.terms.values())
        rows = [[t.weight for t in asked], [t.target for t in asked], [t.max for t in asked]]
        self._weights, self._targets, self._limits = torch.tensor(rows, dtype=torch.float64)
        self.multipliers = torch.zeros(len(asked), dtype=torch.float64)
        self._due, self._step, self._total = False, 0, torch.tensor(1)
        self._calls: Calls | None = None
        self._measured: Tensor | None = None
        self.reset()
        self.undo()

    @property
    def due(self) -> bool:
        """Whether the step under way is looked at."""
        return self._due

    def begin(self, step: int, masks: list[Tensor], device: torch.device) -> None:
        """Begin an optimiser step.

        Args:
            step: how many were taken before.
            masks: attention mask of each of its micro-batches.
            device: of the model.
        """
        here = step - self._section.start_step
        self._due = bool(self._terms) and bool(masks) and here >= 0 and here % self._section.every == 0
        self._step = step
        self.undo()
        if self._due:
            self._total = self._reduce(torch.stack([mask.sum() for mask in masks]).sum().to(device))

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Look at the forward pass inside the block, if the step is looked at."""
        if not self._due or self._observer is None:
            yield
            return
        with self._observer.open() as self._calls:
            yield

    def part(self, mask: Int[Tensor, "b t"]) -> Float[Tensor, ""]:
        """Return this micro-batch's part of what the terms add to the step's loss.

        Args:
            mask: 1 for tokens, 0 for padding.

        Raises:
            TrainingError: a term with a weight has no gradient.
        """
        if self._calls is None:
            return torch.zeros((), device=mask.device)
        share = mask.sum() / self._total
        found = self._values(mask.bool())
        multipliers, weights = (x.to(found) for x in (self.multipliers, self._weights))
        added, _ = augmented_lagrangian(found.new_zeros(()), found, multipliers, weights)
        measured = torch.cat([found.detach(), added.detach()[None]]).double() * share
        self._measured = measured if self._measured is None else self._measured + measured
        self._calls = None
        return added * share

    def begin_anew(self) -> None:
        """Be as before the first step."""
        self.multipliers = torch.zeros_like(self.multipliers)
        self.reset()
        self.undo()

    def undo(self) -> None:
        """Forget what this step gave so far: it is taken again, or not at all."""
        self._measured = self._calls = None
        self._taken = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the multipliers by what the step measured."""
        del args, state, control, kwargs
        if self._measured is None:
            return
        measured = self._reduce(self._measured).cpu()
        self.multipliers = update_multipliers(
            self.multipliers, measured[:-1], self._weights, self._targets, self._limits
        )
        self._sums += measured
        self._steps += 1
        self.undo()

    def read(self) -> dict[str, float]:
        """Return the means since the last ``reset``, and the multipliers as they are."""
        if not self._terms:
            return {}
        found = {
            f"physics/{term.name}/multiplier": float(x) for term, x in zip(self._terms, self.multipliers, strict=True)
        }
        if self._steps:
            *values, added = (self._sums / self._steps).tolist()
            found |= {f"physics/{term.name}": value for term, value in zip(self._terms, values, strict=True)}
            found["loss/physics"] = added
        return found

    def reset(self) -> None:
        """Forget the sums, as after a log entry."""
        self._sums, self._steps = torch.zeros(len(self._terms) + 1, dtype=torch.float64), 0

    def state(self) -> dict[str, Any]:
        """Return multipliers and sums; they go back with the weights."""
        return {"multipliers": self.multipliers, "sums": self._sums, "steps": self._steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` returned."""
        self.multipliers, self._sums, self._steps = state["multipliers"], state["sums"].clone(), state["steps"]

    def _values(self, mask: Tensor) -> Tensor:
        """Return c of every term."""
        assert self._observer is not None, "there are terms"
        assert self._calls is not None, "a forward pass was observed"
        # not a stream that has to be restored: a step draws the same probes whenever it is taken
        generator = torch.Generator().manual_seed(_mixed(self._seed, self._step, self._process, self._taken))
        self._taken += 1
        found = []
        for term, options, weight in zip(self._terms, self._options, self._weights.tolist(), strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
                places = self._observer.places(term.kind, self._calls, mask, generator, self._section.probes)
                value = term.value(places, options)
            if weight > 0 and not value.requires_grad:
                raise TrainingError(f"physics.terms.{term.name} has no gradient; nothing trainable lies before it.")
            found.append(value.float())
        return torch.stack(found)


def check_physics(section: PhysicsSection, decoder: nn.Module) -> None:
    """Raise what ``Physics`` would raise for these settings and this stack, and leave no hook behind."""
    kinds = {find_term(name, term.options).kind for name, term in section.terms.items()}
    check_sources(decoder, kinds)


def _mixed(*numbers: int) -> int:
    """Return one number below 2⁶³ that differs wherever one of the numbers does, as good as surely."""
    found = 0
    for number in numbers:
        found = (found * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return found
