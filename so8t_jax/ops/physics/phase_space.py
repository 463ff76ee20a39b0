"""The Hamiltonian of a state, its gradients, the symplectic form, and the damped leapfrog.

    H(q, p) = ½ Σ_i p_i²/M_i + (κ/2)|q|² + Σ_m s_m softplus(w_m·q + b_m)
    leapfrog, one step:  p ← c p,  p ← p − (h/2)∇V(q),  q ← q + h M⁻¹ p,  p ← p − (h/2)∇V(q),  p ← c p,  c = e^{−γh/2}

Symbols as in the room. The kicks and the drift preserve ω; the two factors c scale it by e^{−γh}. The inverse of a step
is the step of −h.
Cost: two products with w per force. Derivation: docs/math/physics.md.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def energy(
    x: Float[Array, " two_d"],
    inverse_mass: Float[Array, " d"],
    kappa: Float[Array, ""],
    scales: Float[Array, " m"],
    weights: Float[Array, "m d"],
    biases: Float[Array, " m"],
) -> Float[Array, ""]:
    """Return H(x) = ½ pᵀ M⁻¹ p + V(q), bounded below and growing in every direction.

    Args:
        x: the state (q, p).
        inverse_mass: 1/M, positive.
        kappa: κ > 0, the stiffness that no other parameter can collapse.
        scales: s ≥ 0.
        weights: w.
        biases: b.
    """
    q, p = jnp.split(x, 2)
    return jnp.sum(inverse_mass * p**2) / 2 + _potential(q, kappa, scales, weights, biases)


def energy_gradient(
    x: Float[Array, " two_d"],
    inverse_mass: Float[Array, " d"],
    kappa: Float[Array, ""],
    scales: Float[Array, " m"],
    weights: Float[Array, "m d"],
    biases: Float[Array, " m"],
) -> Float[Array, " two_d"]:
    """Return ∇H(x) = (∇V(q), M⁻¹ p); the arguments are those of ``energy``."""
    return jax.grad(energy)(x, inverse_mass, kappa, scales, weights, biases)


def discrete_gradient(
    gradient: Float[Array, " n"], change: Float[Array, " n"], energy_change: Float[Array, ""]
) -> Float[Array, " n"]:
    """Return Gonzalez' discrete gradient ḡ = g + (ΔE − g·Δx) Δx/|Δx|², for which ḡ·Δx = ΔE; g itself where Δx = 0.

    Args:
        gradient: g = ∇H at the midpoint of the two states.
        change: Δx, from the first state to the second.
        energy_change: ΔE = H(second) − H(first).

    Source: O. Gonzalez, "Time integration and discrete Hamiltonian systems", J. Nonlinear Sci. 6 (1996).
    """
    square = jnp.sum(change**2)
    moved = square > 0
    missing = (energy_change - jnp.sum(gradient * change)) / jnp.where(moved, square, 1.0)
    return gradient + jnp.where(moved, missing, 0.0) * change


def symplectic_form(u: Float[Array, " two_d"], w: Float[Array, " two_d"]) -> Float[Array, ""]:
    """Return ω(u, w) = u_q·w_p − u_p·w_q.

    Args:
        u: a tangent vector (q, p).
        w: another.
    """
    (u_q, u_p), (w_q, w_p) = jnp.split(u, 2), jnp.split(w, 2)
    return jnp.sum(u_q * w_p - u_p * w_q)


def leapfrog(
    x: Float[Array, " two_d"],
    inverse_mass: Float[Array, " d"],
    kappa: Float[Array, ""],
    scales: Float[Array, " m"],
    weights: Float[Array, "m d"],
    biases: Float[Array, " m"],
    *,
    step: float,
    damping: float = 0.0,
    steps: int = 1,
) -> Float[Array, " two_d"]:
    """Return the state after some steps of the damped leapfrog of H.

    Args:
        x: the state (q, p).
        inverse_mass: 1/M, positive.
        kappa: κ > 0.
        scales: s ≥ 0.
        weights: w.
        biases: b.
        step: h; of either sign, −h undoes h.
        damping: γ ≥ 0 per unit of time: ω shrinks by e^{−γh} a step.
        steps: how many.

    Numerics: conformally symplectic to rounding whatever h; stable for h² κ/M < 4 and less where V is stiffer. The
        energy error is O(h²) and does not drift.
    Source: Hairer, Lubich, Wanner, "Geometric Numerical Integration" (2006), chapters I and VI.
    """
    q, p = jnp.split(x, 2)
    kept = jnp.exp(jnp.asarray(-damping * step / 2, x.dtype))
    force = jax.grad(lambda q: -_potential(q, kappa, scales, weights, biases))
    for _ in range(steps):
        p = kept * p + step / 2 * force(q)
        q = q + step * inverse_mass * p
        p = kept * (p + step / 2 * force(q))
    return jnp.concatenate([q, p])


def _potential(
    q: Float[Array, " d"],
    kappa: Float[Array, ""],
    scales: Float[Array, " m"],
    weights: Float[Array, "m d"],
    biases: Float[Array, " m"],
) -> Float[Array, ""]:
    """Return V(q)."""
    return kappa / 2 * jnp.sum(q**2) + jnp.sum(scales * jax.nn.softplus(weights @ q + biases))
