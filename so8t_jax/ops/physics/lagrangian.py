"""Several penalties as constraints c_k ≤ ε_k of one loss, by an augmented Lagrangian.

    loss = task + Σ_k λ_k c_k + (ρ_k/2) c_k²        λ_k ← clip(λ_k + ρ_k (c_k − ε_k), 0, λ_k^max)

Symbols: c_k the value of a penalty, λ_k its multiplier, ρ_k its weight, ε_k its target. A multiplier rises while its
constraint is violated and falls otherwise. It is no parameter: gradient descent on λ would lower λ, not c.
Cost: O(K). Derivation: docs/math/physics.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def augmented_lagrangian(
    task: Float[Array, ""],
    constraints: Float[Array, " k"],
    multipliers: Float[Array, " k"],
    penalties: Float[Array, " k"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return task + Σ_k (λ_k c_k + ρ_k c_k²/2); λ and ρ are held constant in the gradient.

    Args:
        task: the loss without constraints.
        constraints: c ≥ 0.
        multipliers: λ ≥ 0.
        penalties: ρ ≥ 0.

    Returns:
        The loss, and its two added parts ``linear`` and ``quadratic``, which carry no gradient.
    """
    constant = jax.lax.stop_gradient
    linear = jnp.sum(constant(multipliers) * constraints)
    quadratic = jnp.sum(constant(penalties) * constraints**2) / 2
    return task + linear + quadratic, {"linear": constant(linear), "quadratic": constant(quadratic)}


def update_multipliers(
    multipliers: Float[Array, " k"],
    constraints: Float[Array, " k"],
    penalties: Float[Array, " k"],
    targets: Float[Array, " k"],
    limits: Float[Array, " k"],
) -> Float[Array, " k"]:
    """Return clip(λ + ρ (c − ε), 0, λ_max), which carries no gradient; a constraint that is NaN stays visible as NaN.

    Args:
        multipliers: λ.
        constraints: c, measured on one or more batches.
        penalties: ρ ≥ 0.
        targets: ε, the value at which a constraint counts as met.
        limits: λ_max ≥ 0.
    """
    raised = multipliers + penalties * (constraints - targets)
    return jax.lax.stop_gradient(jnp.clip(raised, 0.0, limits))
