"""What does a regulariser do to learning: the small model trained with it and without, from the same numbers.

Without means weight 0: it is measured all along and changes nothing. Both runs see the same batches and probes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from so8t_jax.regularizers.model import Observation, SmallModel, recall, recall_loss
from so8t_jax.regularizers.registry import Regularizer
from so8t_jax.train import Constraint, Curves, fit

TAIL = 0.1
"""Share of the steps, at the end, over which curves are averaged."""
SYMBOLS = 6


@dataclass(frozen=True)
class Trial:
    """Curves of the two runs, and what was demanded."""

    name: str
    without: Curves
    along: Curves
    target: float

    @property
    def summary(self) -> dict[str, dict[str, float]]:
        """Return task loss, term and multiplier at the end, without and with."""
        return {"without": _ends(self.without), "with": _ends(self.along)}

    def table(self) -> str:
        """Return the summary as lines."""
        rows = [f"{self.name:<12}{'task':>10}{'term':>12}{'multiplier':>12}"]
        for name, ends in self.summary.items():
            rows.append(f"{name:<12}{ends['task']:>10.4f}{ends['term']:>12.4g}{ends['multiplier']:>12.4g}")
        return "\n".join(rows)

    def plot(self, path: str | Path) -> None:
        """Draw task loss, term and multiplier, with and without.

        Args:
            path: PNG to write.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.5), layout="constrained")
        FigureCanvasAgg(figure)
        task, term, constraint = figure.subplots(1, 3)
        for curves, style, label in ((self.without, "--", "without"), (self.along, "-", "with")):
            task.plot(_smooth(curves.task), style, color="C0", label=label)
            term.plot(_smooth(curves.constraints[:, 0]), style, color="C1", label=label)
        constraint.plot(self.along.multipliers[:, 0], color="C2", label="multiplier λ")
        constraint.plot(self.along.added, color="C3", label="added to the loss")
        term.axhline(self.target, color="grey", linewidth=0.8, label="target")
        term.set_yscale("log")
        for axes, title in ((task, "task loss (nats)"), (term, self.name), (constraint, "constraint")):
            axes.set(title=title, xlabel="step")
            axes.legend()
        figure.savefig(path, dpi=120)


def try_out(
    regularizer: Regularizer,
    *,
    weight: float,
    target: float = 0.0,
    limit: float = 10.0,
    steps: int = 200,
    seed: int = 0,
    rate: float = 1e-2,
    options: dict[str, float] | None = None,
) -> Trial:
    """Train the small model on recall with a regulariser and without.

    Args:
        regularizer: a registered one.
        weight: ρ.
        target: ε.
        limit: λ^max.
        steps: of each run.
        seed: of parameters, batches and probes.
        rate: of Adam.
        options: of the function.

    Returns:
        Both runs.

    Raises:
        ValueError: weight, target or limit is negative, steps is not positive, or there is no such option.
    """
    if min(weight, target, limit) < 0 or steps < 1:
        raise ValueError(
            f"expected weight, target and limit ≥ 0 and steps ≥ 1, got {weight}, {target}, {limit} and {steps}"
        )
    if unknown := sorted((options or {}).keys() - set(regularizer.options)):
        raise ValueError(f"{regularizer.name} has no option {unknown[0]!r}; it has {', '.join(regularizer.options)}")
    demanded = constraint(regularizer, weight, target, limit, **(options or {}))
    optimiser = optax.adam(rate)
    without, along = (
        fit(
            SmallModel(2 * SYMBOLS, rngs=nnx.Rngs(seed)), recall_loss, recall(seed, steps), optimiser, [each], seed=seed
        )
        for each in (replace(demanded, weight=0.0), demanded)
    )
    return Trial(regularizer.name, without, along, target)


def constraint(
    regularizer: Regularizer, weight: float, target: float = 0.0, limit: float = 10.0, **options: float
) -> Constraint:
    """Return what ``so8t_jax.train.fit`` takes to demand a regulariser of a model.

    Args:
        regularizer: a registered one.
        weight: ρ.
        target: ε.
        limit: λ^max.
        options: of the function.
    """

    def measure(observation: Observation, key: jax.Array) -> jax.Array:
        places = observation[regularizer.kind]
        if regularizer.kind == "maps":
            places = [_probed(place, k) for place, k in zip(places, jax.random.split(key, len(places)), strict=True)]
        return regularizer.measure(places, **options)

    return Constraint(regularizer.name, measure, weight, target, limit)


def _probed(place: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    u, w = jax.random.normal(key, (2, *place["x"].shape))
    return place | {"u": u, "w": w}


def _ends(curves: Curves) -> dict[str, float]:
    last = max(1, round(TAIL * len(curves.task)))
    return {
        "task": float(curves.task[-last:].mean()),
        "term": float(curves.constraints[-last:, 0].mean()),
        "multiplier": float(curves.multipliers[-1, 0]),
    }


def _smooth(curve: np.ndarray) -> np.ndarray:
    """Return running means over a twentieth of the curve."""
    width = max(1, len(curve) // 20)
    return np.convolve(curve, np.full(width, 1 / width), mode="valid")
