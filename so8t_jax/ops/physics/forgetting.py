"""Whether memories keep their books: fast weights, decay rates, and the resolvent of a dissipative chain.

    memory      E_t = ½‖S_t‖²,  S_t = a_t S_{t−1} + η_t k_t v_tᵀ
                E_t − E_{t−1} = −(1 − a²)/2 ‖S_{t−1}‖² + aη ⟨S_{t−1}, k vᵀ⟩ + (η²/2)|k|²|v|²
    budget      mean_h (mean_t Γ_{t,h} / Γ*_h − 1)²          half-lives  ln 2 / Γ, log-uniform in [shortest, longest]
    Ward        Im G_ii = Σ_j |G_ij|² w_j,  w_j = Γ_j + Im z                       (Hermitian hopping)
    resolvent   V = −(1/N) Re log det(H − z) = −(1/N) Σ_i log|L_i|

Symbols: S fast weights, a retention, η write strength, k and v key and value; Γ decay per token; G the resolvent of a
tridiagonal H with diagonal ratios L (left) and R (right), b and c its upper and lower couplings.
Cost: one pass; O(N) for the Ward sums. Derivation: docs/math/physics.md.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact

from so8t_jax.ops.physics.monitors import Diagnostics, monitors

REFERENCE_POINTS = 16
"""Points per bin of the histogram that log-uniform half-lives have."""


def memory_balance(
    states: Float[Array, "t1 dk dv"],
    keys: Float[Array, "t dk"],
    values: Float[Array, "t dv"],
    retention: Float[Array, " t"],
    eta: Float[Array, " t"],
    bound: Float[Array, " t"] | None = None,
    *,
    eps: float = 1e-12,
) -> tuple[Float[Array, ""], Diagnostics]:
    """Return mean (residual_t / (⟨E⟩ + ε))² + mean max(0, E_t / (½ bound_t² + ε) − 1)² of one head.

    The first part is 0 up to rounding for every memory of the rule above and serves as an assertion; the second is the
    regulariser, once the bound is a budget.

    Args:
        states: S_0 … S_T.
        keys: k_1 … k_T, as they were written (after any normalisation).
        values: v_1 … v_T.
        retention: a ∈ [0, 1].
        eta: η, the write strength.
        bound: what ‖S_t‖ may reach, t = 1 … T; by default what it can reach at most,
            a^t ‖S_0‖ + η|k||v| (1 − a^t)/(1 − a), with the largest a and the largest η|k||v|. Held constant.
        eps: ε, in units of E.

    Returns:
        The value, and the means of energy, dissipation and supply, the largest |residual| in units of ⟨E⟩ + ε, and
        the largest E_t / (½ bound_t² + ε). ⟨E⟩ is held constant in the gradient.
    """
    energy = jnp.sum(states**2, axis=(-2, -1)) / 2
    strength = eta**2 * jnp.sum(keys**2, axis=-1) * jnp.sum(values**2, axis=-1)
    overlap = jnp.einsum("tkv,tk,tv->t", states[:-1], keys, values)
    dissipation = (1 - retention**2) * energy[:-1]
    supply = retention * eta * overlap + strength / 2
    scale = jax.lax.stop_gradient(jnp.mean(energy)) + eps
    residual = (jnp.diff(energy) + dissipation - supply) / scale
    reach = _reach(*jax.lax.stop_gradient((energy[0], strength, retention))) if bound is None else bound
    filled = energy[1:] / (jax.lax.stop_gradient(reach) ** 2 / 2 + eps)
    value = jnp.mean(residual**2) + jnp.mean(jax.nn.relu(filled - 1) ** 2)
    means = {"energy": energy, "dissipation": dissipation, "supply": supply}
    worst = {"residual": jnp.max(jnp.abs(residual)), "filled": jnp.max(filled)}
    return value, monitors(**{name: jnp.mean(series) for name, series in means.items()}, **worst)


def decay_budget(decay: Float[Array, "t h"], target: Float[Array, " h"]) -> tuple[Float[Array, ""], Diagnostics]:
    """Return mean_h (mean_t Γ_{t,h} / Γ*_h − 1)²: forgetting neither frozen nor overdamped.

    Args:
        decay: Γ ≥ 0 per token.
        target: Γ* > 0 of every head.

    Returns:
        The value, the mean of Γ, and the share of (token, head) with a half-life below one token.
    """
    ratio = jnp.mean(decay, axis=0) / target
    overdamped = jnp.mean((decay > math.log(2.0)).astype(decay.dtype))
    return jnp.mean((ratio - 1) ** 2), monitors(mean=jnp.mean(decay), overdamped=overdamped)


def half_life_divergence(
    decay: Float[Array, "t h"], *, shortest: float = 4.0, longest: float = 4096.0, bins: int = 10
) -> tuple[Float[Array, ""], Diagnostics]:
    """Return KL(p ‖ p*) of the soft histogram of log half-lives from that of log-uniform ones in [shortest, longest].

    More than a few bins outside of the range the memberships no longer change and the gradient dies out; there
    ``decay_budget`` pulls.

    Args:
        decay: Γ > 0 per token.
        shortest: half-life in tokens.
        longest: half-life in tokens.
        bins: number of bins of equal width in the logarithm; a half-life belongs to bin i with weight
            softmax_i(−½ (position − centre_i)²), positions in units of a bin.

    Returns:
        The value, and the geometric mean of the half-lives.
    """
    width = math.log(longest / shortest) / bins
    log_half_lives = math.log(math.log(2.0)) - jnp.log(decay)
    position = (log_half_lives - math.log(shortest)) / width
    uniform = (jnp.arange(bins * REFERENCE_POINTS, dtype=decay.dtype) + 0.5) / REFERENCE_POINTS
    found, wanted = (_log_histogram(points.ravel(), bins) for points in (position, uniform))
    return jnp.sum(jnp.exp(found) * (found - wanted)), monitors(half_life=jnp.exp(jnp.mean(log_half_lives)))


def ward_residual(
    green: Complex[Array, " n"],
    left: Complex[Array, " n"],
    right: Complex[Array, " n"],
    upper: Inexact[Array, " n_minus_1"],
    lower: Inexact[Array, " n_minus_1"],
    width: Float[Array, " n"],
) -> tuple[Float[Array, ""], Diagnostics]:
    """Return mean_i (w_i (Im G_ii − Σ_j |G_ij|² w_j))²: 0 where what flows in at i is lost along the chain.

    Args:
        green: G_ii.
        left: L_0 = d_0, L_i = d_i − b_{i−1} c_{i−1} / L_{i−1}.
        right: R_{N−1} = d_{N−1}, R_i = d_i − b_i c_i / R_{i+1}.
        upper: b_i = H[i, i+1].
        lower: c_i = H[i+1, i].
        width: w = Γ + Im z > 0; G is at most 1/w, so the residual has no unit. The factor w_i is held constant in the
            gradient: else a chain without Hermitian hopping would lower its residual by ceasing to forget.

    Returns:
        The value, and the largest |w_i (Im G_ii − Σ_j |G_ij|² w_j)|.
    """
    ahead = _modulus(upper) / _modulus(right[1:])
    behind = _modulus(lower) / _modulus(left[:-1])
    after = _accumulate(ahead[::-1], width[::-1])[::-1]
    before = _accumulate(behind, width)
    residual = jax.lax.stop_gradient(width) * (jnp.imag(green) - _modulus(green) * (after + before - width))
    return jnp.mean(residual**2), monitors(worst=jnp.max(jnp.abs(residual)))


def resolvent_energy(left: Complex[Array, " n"]) -> Float[Array, ""]:
    """Return −(1/N) Re log det(H − z) = −(1/N) Σ_i log|L_i|.

    Args:
        left: L_i, the ratios of ``ward_residual``; none is zero.
    """
    return -jnp.mean(jnp.log(_modulus(left))) / 2


def _reach(energy: Float[Array, ""], strength: Float[Array, " t"], retention: Float[Array, " t"]) -> Float[Array, " t"]:
    """Return a^t ‖S_0‖ + write · Σ_{j<t} a^j for t = 1 … T."""
    a, write = jnp.max(retention), jnp.sqrt(jnp.max(strength))
    powers = jnp.cumprod(jnp.full(retention.shape, a))
    geometric = jnp.cumsum(jnp.concatenate([jnp.ones(1, powers.dtype), powers[:-1]]))
    return powers * jnp.sqrt(2 * energy) + write * geometric


def _log_histogram(position: Float[Array, " n"], bins: int) -> Float[Array, " bins"]:
    """Return the log of the mean membership of every bin."""
    centres = jnp.arange(bins, dtype=position.dtype) + 0.5
    membership = jax.nn.log_softmax(-((position[:, None] - centres[None]) ** 2) / 2, axis=-1)
    return jax.nn.logsumexp(membership, axis=0) - math.log(position.size)


def _accumulate(factor: Float[Array, " n_minus_1"], term: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return x_0 = term_0, x_i = term_i + factor_{i−1} x_{i−1}."""

    def add(
        x: Float[Array, ""], inputs: tuple[Float[Array, ""], Float[Array, ""]]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        x = inputs[0] * x + inputs[1]
        return x, x

    _, rest = jax.lax.scan(add, term[0], (factor, term[1:]))
    return jnp.concatenate([term[:1], rest])


def _modulus(z: Inexact[Array, ...]) -> Float[Array, ...]:
    """Return |z|²."""
    return jnp.real(z) ** 2 + jnp.imag(z) ** 2
