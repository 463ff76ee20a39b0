"""Several penalties as constraints c_k ≤ ε_k of one loss, by an augmented Lagrangian.

    loss = task + Σ_k λ_k c_k + (ρ_k/2) c_k²        λ_k ← clip(λ_k + ρ_k (c_k − ε_k), 0, λ_k^max)

Symbols: c_k the value of a penalty, λ_k its multiplier, ρ_k its weight, ε_k its target. A multiplier rises while its
constraint is violated and falls otherwise. It is no parameter: gradient descent on λ would lower λ, not c.
Cost: O(K). Twin: so8t_jax/ops/physics/lagrangian.py. Derivation: docs/math/physics.md.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_torch.ops.physics.arguments import Diagnostics, match, monitors, not_negative, widened


def augmented_lagrangian(
    task: Float[Tensor, "*batch"],
    constraints: Float[Tensor, "*batch k"],
    multipliers: Float[Tensor, "*batch k"],
    penalties: Float[Tensor, "*batch k"],
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
    """Return task + Σ_k (λ_k c_k + ρ_k c_k²/2); λ and ρ are held constant in the gradient.

    Args:
        task: the loss without constraints.
        constraints: c ≥ 0.
        multipliers: λ ≥ 0.
        penalties: ρ ≥ 0.

    Returns:
        The loss in float32 (float64 for float64), and its two added parts ``linear`` and ``quadratic``, which carry no
        gradient.

    Raises:
        ShapeError: shapes that do not fit.
        DomainError: a dtype that is not real floating, or a negative multiplier or weight.
    """
    op = "augmented_lagrangian"
    series = {"constraints": constraints, "multipliers": multipliers, "penalties": penalties}
    match(op, task=(task, "..."), **{name: (tensor, "... k") for name, tensor in series.items()})
    not_negative(op, multipliers=multipliers, penalties=penalties)
    task, constraints, multipliers, penalties = widened(op, task, constraints, multipliers, penalties)
    linear = (multipliers.detach() * constraints).sum(-1)
    quadratic = (penalties.detach() * constraints.square()).sum(-1) / 2
    return task + linear + quadratic, monitors(linear=linear, quadratic=quadratic)


def update_multipliers(
    multipliers: Float[Tensor, "*batch k"],
    constraints: Float[Tensor, "*batch k"],
    penalties: Float[Tensor, "*batch k"],
    targets: Float[Tensor, "*batch k"],
    limits: Float[Tensor, "*batch k"],
) -> Float[Tensor, "*batch k"]:
    """Return clip(λ + ρ (c − ε), 0, λ_max), which carries no gradient; a constraint that is NaN stays visible as NaN.

    Args:
        multipliers: λ.
        constraints: c, measured on one or more batches.
        penalties: ρ ≥ 0.
        targets: ε, the value at which a constraint counts as met.
        limits: λ_max ≥ 0.

    Returns:
        The next multipliers, in float32 (float64 for float64).

    Raises:
        ShapeError: shapes that do not fit.
        DomainError: a dtype that is not real floating, or a negative weight or limit.
    """
    op = "update_multipliers"
    arguments = {"constraints": constraints, "penalties": penalties, "targets": targets, "limits": limits}
    match(op, multipliers=(multipliers, "... k"), **{name: (tensor, "... k") for name, tensor in arguments.items()})
    not_negative(op, penalties=penalties, limits=limits)
    with torch.no_grad():
        multipliers, constraints, penalties, targets, limits = widened(op, multipliers, *arguments.values())
        return torch.minimum((multipliers + penalties * (constraints - targets)).clamp(min=0), limits)
