"""The resolvent of a tridiagonal matrix along a chain: diagonal, causal part, neighbours, determinant (BK-core).

    G = (H − z)⁻¹,  H_ii = h_i, H_{i,i+1} = b_i, H_{i+1,i} = c_i        d_i = h_i − z,  β_i = b_i c_i
    L_i = d_i − β_{i−1}/L_{i−1}    R_i = d_i − β_i/R_{i+1}              (L_0 = d_0, R_{N−1} = d_{N−1})
    full: G_ii = 1/(L_i + R_i − d_i)    causal: g_i = 1/L_i, the last diagonal entry of (H_{0…i} − z)⁻¹
    log det(H − z) = Σ_i log L_i    G_{i,i+1} = −(b_i/R_{i+1}) G_ii    G_{i+1,i} = −(c_i/R_{i+1}) G_ii

Symbols: h diagonal (N,), real or v − iΓ with decay rates Γ; b upper and c lower couplings (N−1,); z a complex number;
β_i = 0 parts the chain between i and i + 1, whatever stands beyond, finite or not. If β ≥ 0, Γ ≥ 0 and Im z > 0 then
Im L_i, Im R_i ≤ −(Γ_i + Im z), so that |g_i|, |G_ii| ≤ 1/(Γ_i + Im z): nothing is clamped.
Cost: one division and two sums per site and direction. Derivation: docs/math/tridiagonal.md.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Inexact, Int

__all__ = ["advance", "green", "log_det", "off_diagonals", "ratios", "step"]


def ratios(
    diagonal: Inexact[Array, " n"],
    upper: Inexact[Array, " n-1"],
    lower: Inexact[Array, " n-1"],
    z: Inexact[Array, ""],
    segment_ids: Int[Array, " n"] | None = None,
    *,
    require_dissipation: bool = True,
) -> tuple[Complex[Array, " n"], Complex[Array, " n"]]:
    """Return the left and the right ratios L, R of leading and trailing minors.

    Args:
        diagonal: h, in units of energy like all else; complex for v − iΓ.
        upper: b_i = H_{i,i+1}.
        lower: c_i = H_{i+1,i}.
        z: where the resolvent is taken.
        segment_ids: couplings between sites of different numbers count as zero.
        require_dissipation: NaN where Im z ≤ 0 or Im h_i > 0, that is where |G_ii| has no bound; production raises.

    Returns:
        L and R, complex.

    Raises:
        ValueError: the chain has no sites.
    """
    d, b, c = _operator(diagonal, upper, lower, z, segment_ids, require_dissipation)
    return _ratios(d, b * c)


def green(
    diagonal: Inexact[Array, " n"],
    upper: Inexact[Array, " n-1"],
    lower: Inexact[Array, " n-1"],
    z: Inexact[Array, ""],
    segment_ids: Int[Array, " n"] | None = None,
    *,
    mode: Literal["causal", "full"] = "causal",
    require_dissipation: bool = True,
) -> Complex[Array, " n"]:
    """Return the diagonal of the resolvent, or its causal part, which depends on sites 0 … i alone.

    Args:
        diagonal: h, real or v − iΓ.
        upper: b_i = H_{i,i+1}.
        lower: c_i = H_{i+1,i}.
        z: where the resolvent is taken.
        segment_ids: couplings between sites of different numbers count as zero.
        mode: ``"causal"`` for 1/L_i, ``"full"`` for G_ii, in which later sites enter.
        require_dissipation: as for ``ratios``.

    Returns:
        g or G_ii, complex.

    Raises:
        ValueError: the mode is unknown, or the chain has no sites.
    """
    d, b, c = _operator(diagonal, upper, lower, z, segment_ids, require_dissipation)
    left, right = _ratios(d, b * c)
    if mode == "causal":
        return 1.0 / left
    if mode == "full":
        return 1.0 / (left + right - d)
    raise ValueError(f"expected mode 'causal' or 'full', got {mode!r}")


def log_det(
    diagonal: Inexact[Array, " n"],
    upper: Inexact[Array, " n-1"],
    lower: Inexact[Array, " n-1"],
    z: Inexact[Array, ""],
    segment_ids: Int[Array, " n"] | None = None,
    *,
    require_dissipation: bool = True,
) -> Complex[Array, ""]:
    """Return log det(H − z) as the sum of the principal logarithms of L_i; exp of it is the determinant.

    Args:
        diagonal: h, real or v − iΓ.
        upper: b_i = H_{i,i+1}.
        lower: c_i = H_{i+1,i}.
        z: where the determinant is taken.
        segment_ids: couplings between sites of different numbers count as zero; all segments are summed.
        require_dissipation: as for ``ratios``.
    """
    d, b, c = _operator(diagonal, upper, lower, z, segment_ids, require_dissipation)
    return jnp.sum(jnp.log(_sweep(d, b * c)))


def off_diagonals(
    diagonal: Inexact[Array, " n"],
    upper: Inexact[Array, " n-1"],
    lower: Inexact[Array, " n-1"],
    z: Inexact[Array, ""],
    segment_ids: Int[Array, " n"] | None = None,
    *,
    require_dissipation: bool = True,
) -> tuple[Complex[Array, " n-1"], Complex[Array, " n-1"]]:
    """Return G_{i,i+1} and G_{i+1,i} of the resolvent; zero between segments.

    Args:
        diagonal: h, real or v − iΓ.
        upper: b_i = H_{i,i+1}.
        lower: c_i = H_{i+1,i}.
        z: where the resolvent is taken.
        segment_ids: couplings between sites of different numbers count as zero.
        require_dissipation: as for ``ratios``.
    """
    d, b, c = _operator(diagonal, upper, lower, z, segment_ids, require_dissipation)
    left, right = _ratios(d, b * c)
    joined = _joined(d, segment_ids)
    here = jnp.where(joined, 1.0 / (left + right - d)[:-1], 0.0)
    beyond = jnp.where(joined, right[1:], 1.0)
    return -(b / beyond) * here, -(c / beyond) * here


def advance(
    state: Complex[Array, ""], d: Complex[Array, " t"], beta: Inexact[Array, " t"]
) -> tuple[Complex[Array, " t"], Complex[Array, ""]]:
    """Return the causal g of t more sites, and the state after them; pieces of any length give what one run gives.

    Args:
        state: g of the site before, 0 at the start of a chain.
        d: h_t − z of each site.
        beta: coupling of each site to the one before it; 0 starts a segment.

    Returns:
        g, and its last entry as the state.

    Raises:
        ValueError: no sites.
    """
    if d.shape[0] == 0:
        raise ValueError("expected at least one site, got none")

    def site(g: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        g, _ = step(g, *now)
        return g, g

    last, g = jax.lax.scan(site, state, (d, beta))
    return g, last


def step(
    state: Complex[Array, ""], d_t: Complex[Array, ""], beta_t: Inexact[Array, ""]
) -> tuple[Complex[Array, ""], Complex[Array, ""]]:
    """Return g_t = 1/(d_t − β_t g_{t−1}) and the next state, which is g_t again: one complex number per chain.

    Args:
        state: g_{t−1}, 0 at the start of a chain.
        d_t: h_t − z of this site.
        beta_t: coupling of this site to the one before; 0 starts a segment.
    """
    before = jnp.where((beta_t != 0) | jnp.isfinite(state), state, 0.0)
    g = 1.0 / (d_t - beta_t.astype(d_t.dtype) * before)
    return g, g


def _operator(
    diagonal: Array, upper: Array, lower: Array, z: Array, segment_ids: Array | None, require_dissipation: bool
) -> tuple[Array, Array, Array]:
    """Return d = h − z and the couplings, complex, without those between segments."""
    if diagonal.shape[0] == 0:
        raise ValueError("expected a chain of at least one site, got none")
    dtype = jnp.complex128 if diagonal.dtype in (jnp.float64, jnp.complex128) else jnp.complex64
    d = diagonal.astype(dtype) - z.astype(dtype)
    if require_dissipation:
        d = jnp.where((jnp.imag(diagonal) > 0) | (jnp.imag(z) <= 0), jnp.nan, d)
    joined = _joined(d, segment_ids)
    b, c = (jnp.where(joined, coupling.astype(dtype), 0.0) for coupling in (upper, lower))
    return d, b, c


def _joined(d: Array, segment_ids: Array | None) -> Array:
    """Return where a site and the next belong to one segment (N − 1,)."""
    if segment_ids is None:
        return jnp.ones(d.shape[0] - 1, bool)
    return segment_ids[1:] == segment_ids[:-1]


def _ratios(d: Array, beta: Array) -> tuple[Array, Array]:
    """Return L and R of d (N,) and β (N − 1,)."""
    return _sweep(d, beta), _sweep(d[::-1], beta[::-1])[::-1]


def _sweep(d: Array, beta: Array) -> Array:
    """Return x_0 = d_0, x_i = d_i − β_{i−1}/x_{i−1}."""

    def site(before: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        d_i, beta_before = now
        parted = (beta_before == 0) & ~(jnp.isfinite(before) & (before != 0))
        x = d_i - beta_before / jnp.where(parted, 1.0, before)
        return x, x

    _, rest = jax.lax.scan(site, d[0], (d[1:], beta))
    return jnp.concatenate([d[:1], rest])
