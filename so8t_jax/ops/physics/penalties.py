"""Penalties on what a trajectory does with its energy, and on how a layer treats the symplectic form.

    energy_drift           mean (ΔE / (⟨|E|⟩ + ε))²                       0 iff the energy is constant
    energy_balance         mean ((ΔE + h ḡᵀRḡ − supply) / (⟨|E|⟩ + ε))²   0 iff power in = power stored + power lost
    hamiltonian_residual   ⟨|f − (J − R)∇H|²⟩ / (⟨|f|²⟩ + ε)              0 iff the increment is h (J − R)∇H
    lyapunov_hinge         mean max(0, E′ − (1 − αh)E − supply)² / (⟨|E|⟩ + ε)²
    symplectic_defect      mean (ω(DF u, DF w) − e^{−γh} ω(u, w))² / (|u|² |w|²)
    anchor                 (⟨|∇H|²⟩ − 1)²

Symbols as in the room; ⟨·⟩ is the mean over states (and layers), held constant in the gradient where it is ⟨|E|⟩; ΔE
and E′ belong to one layer, ḡ is a discrete gradient between its two states, and the supply is the work of what enters
from outside, ⟨ḡ, external increment⟩, 0 for a closed system.
Cost: one pass; two JVPs of the layer for the symplectic defect. Derivation: docs/math/physics.md.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from so8t_jax.ops.physics.monitors import Diagnostics, monitors


def energy_drift(energies: Float[Array, "l s"], *, eps: float = 1e-12) -> tuple[Float[Array, ""], Diagnostics]:
    """Return mean ((E_{l+1} − E_l) / (⟨|E|⟩ + ε))²; ⟨|E|⟩ is held constant in the gradient.

    Args:
        energies: E of L + 1 ≥ 2 layers or steps and S states.
        eps: ε, in units of E.

    Returns:
        The value, and the scale ⟨|E|⟩, the largest |ΔE| and the mean of E_L − E_0, both in units of the scale.
    """
    scale = _scale(energies, eps)
    drift = jnp.diff(energies, axis=0) / scale
    total = jnp.mean(energies[-1] - energies[0]) / scale
    return jnp.mean(drift**2), monitors(scale=scale, worst=jnp.max(jnp.abs(drift)), total=total)


def energy_balance(
    energies: Float[Array, "l s"],
    gradients: Float[Array, "k s n"],
    resistance: Float[Array, " n"],
    supply: Float[Array, "k s"] | None = None,
    *,
    step: float = 1.0,
    eps: float = 1e-12,
) -> tuple[Float[Array, ""], Diagnostics]:
    """Return mean ((ΔE + h ḡᵀRḡ − supply) / (⟨|E|⟩ + ε))², the port-Hamiltonian power balance of every step.

    Args:
        energies: E of L + 1 ≥ 2 layers or steps and S states.
        gradients: ḡ, discrete gradients between neighbouring states, L of them.
        resistance: the diagonal of R ≥ 0.
        supply: work done from outside in each step; None for a closed system.
        step: h > 0.
        eps: ε, in units of E.

    Returns:
        The value, and the scale ⟨|E|⟩ (held constant in the gradient), the largest residual and the mean dissipated
        energy per step, both in units of the scale.
    """
    scale = _scale(energies, eps)
    lost = step * jnp.einsum("n,lsn,lsn->ls", resistance, gradients, gradients)
    residual = (jnp.diff(energies, axis=0) + lost - (0.0 if supply is None else supply)) / scale
    worst = jnp.max(jnp.abs(residual))
    return jnp.mean(residual**2), monitors(scale=scale, worst=worst, dissipation=jnp.mean(lost) / scale)


def hamiltonian_residual(
    increments: Float[Array, "s two_d"],
    gradients: Float[Array, "s two_d"],
    resistance: Float[Array, " two_d"],
    *,
    step: float = 1.0,
    eps: float = 1e-12,
) -> tuple[Float[Array, ""], Diagnostics]:
    """Return ⟨|f − (J − R)∇H|²⟩ / (⟨|f|²⟩ + ε) with f = increment / h.

    Args:
        increments: what a layer adds to each of S states.
        gradients: ∇H at these states.
        resistance: the diagonal of R ≥ 0.
        step: h > 0.
        eps: ε, in units of |f|².

    Returns:
        The value, and ⟨|f|²⟩ and ⟨|(J − R)∇H|²⟩.
    """
    rate = increments / step
    g_q, g_p = jnp.split(gradients, 2, axis=-1)
    field = jnp.concatenate([g_p, -g_q], axis=-1) - resistance[None] * gradients
    size = _mean_square(rate)
    return _mean_square(rate - field) / (size + eps), monitors(increment=size, field=_mean_square(field))


def lyapunov_hinge(
    energies: Float[Array, "l s"],
    supply: Float[Array, "k s"] | None = None,
    *,
    rate: float,
    step: float = 1.0,
    eps: float = 1e-12,
) -> tuple[Float[Array, ""], Diagnostics]:
    """Return mean max(0, E_{l+1} − (1 − αh)E_l − supply_l)² / (⟨|E|⟩ + ε)²; ⟨|E|⟩ is held constant in the gradient.

    Args:
        energies: E of L + 1 ≥ 2 layers or steps and S states.
        supply: work done from outside in each step; None for a closed system.
        rate: α, the asked-for decay of energy per unit of time, 0 ≤ αh ≤ 1.
        step: h > 0.
        eps: ε, in units of E.

    Returns:
        The value, and the scale ⟨|E|⟩, the largest excess in units of the scale, and the share of steps with one.
    """
    scale = _scale(energies, eps)
    allowed = (1 - rate * step) * energies[:-1] + (0.0 if supply is None else supply)
    excess = jax.nn.relu(energies[1:] - allowed) / scale
    share = jnp.mean((excess > 0).astype(energies.dtype))
    return jnp.mean(excess**2), monitors(scale=scale, worst=jnp.max(excess), violations=share)


def symplectic_defect(
    layer: Callable[[Float[Array, "s n two_d"]], Float[Array, "s n two_d"]],
    x: Float[Array, "s n two_d"],
    u: Float[Array, "s n two_d"],
    w: Float[Array, "s n two_d"],
    *,
    damping: float = 0.0,
    step: float = 1.0,
) -> tuple[Float[Array, ""], Diagnostics]:
    """Return mean (ω(DF u, DF w) − e^{−γh} ω(u, w))² / (|u|² |w|²): 0 for a conformally symplectic layer F.

    A state is all N tokens of a sequence, so that F may mix tokens; ω and the norms sum over them.

    Args:
        layer: F, a smooth map of states; it may treat leading axes as a batch.
        x: S states.
        u: one probe per state, not zero; over random probes the mean is Hutchinson's estimate of ‖DFᵀΩDF − cΩ‖².
        w: another.
        damping: γ ≥ 0; 0 asks for a symplectic layer.
        step: h.

    Returns:
        The value, and the mean stretch |DF u|²/|u|²: 0 means that no derivative came through the layer.
    """
    (_, du), (_, dw) = (jax.jvp(layer, (x,), (tangent,)) for tangent in (u, w))
    kept = jnp.exp(jnp.asarray(-damping * step, x.dtype))
    size_u, size_w = _size(u), _size(w)
    defect = _form(du, dw) - kept * _form(u, w)
    return jnp.mean(defect**2 / (size_u * size_w)), monitors(stretch=jnp.mean(_size(du) / size_u))


def anchor(gradients: Float[Array, "s n"]) -> tuple[Float[Array, ""], Diagnostics]:
    """Return (⟨|∇H|²⟩ − 1)², which keeps a learned energy from being constant.

    Args:
        gradients: ∇H at S states.

    Returns:
        The value, and ⟨|∇H|²⟩.
    """
    square = _mean_square(gradients)
    return (square - 1) ** 2, monitors(mean_square=square)


def _scale(energies: Float[Array, "l s"], eps: float) -> Float[Array, ""]:
    """Return ⟨|E|⟩ + ε, held constant."""
    return jax.lax.stop_gradient(jnp.mean(jnp.abs(energies))) + eps


def _mean_square(x: Float[Array, "s n"]) -> Float[Array, ""]:
    """Return the mean over states of |x|²."""
    return jnp.mean(jnp.sum(x**2, axis=-1))


def _size(x: Float[Array, "s n d"]) -> Float[Array, " s"]:
    """Return |x|² of every state."""
    return jnp.sum(x**2, axis=(-2, -1))


def _form(u: Float[Array, "s n two_d"], w: Float[Array, "s n two_d"]) -> Float[Array, " s"]:
    """Return ω(u, w) of every state, summed over its tokens."""
    (u_q, u_p), (w_q, w_p) = jnp.split(u, 2, axis=-1), jnp.split(w, 2, axis=-1)
    return jnp.sum(u_q * w_p - u_p * w_q, axis=(-2, -1))
