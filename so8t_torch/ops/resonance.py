"""A filter that keeps the modes of a fast-weight memory that hold its energy, in the basis of unfolded zeta zeros.

    Q_n = polar factor of zeta.basis(n),  Q_nᵀ Q_n = I        S′ = Q_kᵀ S Q_v
    e_j = ‖S′_j,:‖₂  ("row")  or  |S′_jj|  ("diag")          ρ_j = e_j / mean_i e_i     (ρ_j = 1 where S = 0)
    m_j = σ((ρ_j − threshold)/temperature)                   S ↦ S − w Q_k ((1 − m) ∘ S′) Q_vᵀ

Symbols: S (…, H, K, V) the states of H heads, keys by values; Q_k, Q_v the bases of both sides; m the gate of each
mode, σ the logistic function; w (H,) how far each head goes from S to Q_k (m ∘ S′) Q_vᵀ (without w: all the way).
It is the identity where m = 1, never increases ‖S‖_F for w in [0, 1], and commutes with scaling S. Used on the state
that enters a chunk of tokens it is causal: it changes what later tokens read. Carried in float32 (float64 for float64).
Cost: 2 K²V + 2 K V² products per head. Twin: so8t_jax/ops/resonance.py. Derivation: docs/math/resonance.md.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none
from so8t_torch.ops import zeta

__all__ = ["basis", "resonance", "transform"]

NEWTON_STEPS = 12
"""Scaled Newton reaches an orthonormal matrix to rounding within nine steps for condition numbers below 10¹⁶."""

Energy = Literal["row", "diag"]


class Resonance(NamedTuple):
    """What the filter found and did.

    Attributes:
        state: the filtered states (..., H, K, V).
        energy: e_j of every head (..., H, K).
        gate: m_j of every head (..., H, K), in [0, 1].
    """

    state: Tensor
    energy: Tensor
    gate: Tensor


def basis(n: int) -> Float[Tensor, "n n"]:
    """Return the orthonormal matrix nearest to the cosines and sines of the unfolded zeta zeros.

    Args:
        n: at least 1.

    Returns:
        Q, the polar factor of ``zeta.basis(n)``, in float64 on the host.

    Raises:
        ConfigError: n is below 1.

    Numerics: Newton's iteration X ← (μX + X⁻ᵀ/μ)/2 without a singular value decomposition; the condition number of
        what it starts from is at most 39 for the powers of two up to 512, and 1362 at n = 467 at worst.
    Source: N. Higham, Functions of Matrices (2008), section 8.6.
    """
    x = zeta.basis(n)
    for _ in range(NEWTON_STEPS):
        inverse = torch.linalg.inv(x)
        scale = (_norm_product(inverse) / _norm_product(x)) ** 0.25
        x = (scale * x + inverse.mT / scale) / 2.0
    return x


def transform(
    state: Float[Tensor, "*batch h k v"], key_basis: Float[Tensor, "k k"], value_basis: Float[Tensor, "v v"]
) -> Float[Tensor, "*batch h k v"]:
    """Return S′ = Q_kᵀ S Q_v, the same memory in the coordinates of the bases.

    Args:
        state: S of every head.
        key_basis: Q_k, orthonormal.
        value_basis: Q_v, orthonormal.

    Raises:
        ShapeError: the bases do not fit the states.
        DomainError: an argument is not of a real floating dtype.
    """
    _check("transform", state, key_basis, value_basis)
    with without_autocast(state.device):
        return _rotate(*_wide(state, key_basis, value_basis)).to(state.dtype)


def resonance(
    state: Float[Tensor, "*batch h k v"],
    key_basis: Float[Tensor, "k k"],
    value_basis: Float[Tensor, "v v"],
    blend: Float[Tensor, " h"] | None = None,
    *,
    threshold: float = 0.1,
    temperature: float = 0.05,
    energy: Energy = "row",
    hard: bool = False,
) -> Resonance:
    """Return the states with the modes of little energy attenuated.

    Args:
        state: S of every head.
        key_basis: Q_k, orthonormal.
        value_basis: Q_v, orthonormal.
        blend: w in [0, 1] of every head: 0 leaves S as it is, 1 or None filters it fully.
        threshold: relative energy at which a mode passes by half; −∞ lets all pass.
        temperature: width of the transition in units of relative energy, positive.
        energy: ``"row"``: norm of the mode's row of S′; ``"diag"``: its diagonal entry, for K = V.
        hard: gates are 0 or 1 in value, with the gradient of the soft ones.

    Returns:
        The filtered states, the energies and the gates, in the dtype of the states.

    Raises:
        ShapeError: the bases or the blend do not fit the states, or ``"diag"`` and K ≠ V.
        DomainError: an argument is not of a real floating dtype.
        ConfigError: the energy is unknown, or threshold or temperature is out of range.
    """
    expect_tensors_or_none("resonance", blend=blend)
    _check("resonance", state, key_basis, value_basis)
    _check_options(state, blend, threshold, temperature, energy)
    with without_autocast(state.device):
        wide, q_k, q_v = _wide(state, key_basis, value_basis)
        modes = _rotate(wide, q_k, q_v)
        found = _mode_energy(modes, energy)
        removed = _removed(found, threshold, temperature, hard)
        noise = _rotate(removed[..., None] * modes, q_k.mT, q_v.mT)
        if blend is not None:
            noise = blend.to(wide.dtype)[:, None, None] * noise
        return Resonance(*(x.to(state.dtype) for x in (wide - noise, found, 1.0 - removed)))


def _rotate(state: Tensor, q_k: Tensor, q_v: Tensor) -> Tensor:
    """Return Q_kᵀ S Q_v, keys first: a mode of little energy is then rounded beside large ones once, not twice."""
    return (q_k.mT @ state) @ q_v


def _mode_energy(modes: Tensor, energy: str) -> Tensor:
    """Return e_j; the rows are measured in units of the largest entry, whose square may not exist in the dtype."""
    if energy == "diag":
        return modes.diagonal(dim1=-2, dim2=-1).abs()
    if modes.numel() == 0:
        return modes.sum(-1)
    largest = modes.detach().abs().amax((-2, -1))[..., None]
    unit = torch.where(largest > 0, largest, 1.0)
    square = (modes / unit[..., None]).square().sum(-1)
    # sqrt has no slope at 0, where a row of zeros is given the slope 0
    empty = square == 0
    return unit * torch.where(empty, 0.0, torch.where(empty, 1.0, square).sqrt())


def _removed(found: Tensor, threshold: float, temperature: float, hard: bool) -> Tensor:
    """Return 1 − m_j of the energies of every head; 1 less a gate that is almost 1 would be rounding."""
    mean = found.mean(-1, keepdim=True)
    silent = mean == 0
    relative = torch.where(silent, 1.0, found / torch.where(silent, 1.0, mean))
    soft = torch.sigmoid((threshold - relative) / temperature)
    # soft − soft is exactly zero, so that the sum is exactly 0 or 1
    return (relative < threshold).to(soft.dtype) + (soft - soft.detach()) if hard else soft


def _wide(state: Tensor, key_basis: Tensor, value_basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three in the dtype that sums are carried in."""
    dtype = accumulation_dtype(state.dtype)
    return state.to(dtype), key_basis.to(dtype), value_basis.to(dtype)


def _norm_product(x: Tensor) -> Tensor:
    """Return ‖x‖₁ ‖x‖_∞, between ‖x‖₂² and n ‖x‖₂²."""
    magnitude = x.abs()
    return magnitude.sum(0).amax() * magnitude.sum(1).amax()


def _check(name: str, state: Tensor, key_basis: Tensor, value_basis: Tensor) -> None:
    """Raise unless states are (..., H, K, V), the bases (K, K) and (V, V), all real."""
    expect_tensors(f"resonance.{name}", state=state, key_basis=key_basis, value_basis=value_basis)
    if state.ndim < 3:
        raise ShapeError(f"resonance.{name}: expected states (..., H, K, V), got {tuple(state.shape)}.")
    k, v = state.shape[-2:]
    if tuple(key_basis.shape) != (k, k) or tuple(value_basis.shape) != (v, v) or min(k, v) < 1:
        raise ShapeError(
            f"resonance.{name}: expected bases ({k}, {k}) and ({v}, {v}) for states {tuple(state.shape)}, got "
            f"{tuple(key_basis.shape)} and {tuple(value_basis.shape)}; take resonance.basis of either side."
        )
    kinds = [x.dtype for x in (state, key_basis, value_basis) if not x.is_floating_point()]
    if kinds:
        raise DomainError(f"resonance.{name}: expected real floating dtypes, got {kinds[0]}; convert it first.")


def _check_options(state: Tensor, blend: Tensor | None, threshold: float, temperature: float, energy: str) -> None:
    """Raise unless the options are in range and fit the states."""
    if energy not in ("row", "diag"):
        raise ConfigError(f"resonance: expected energy 'row' or 'diag', got {energy!r}.")
    if energy == "diag" and state.shape[-2] != state.shape[-1]:
        raise ShapeError(f"resonance: expected K = V for energy 'diag', got {tuple(state.shape)}; take 'row'.")
    if not threshold < math.inf:
        raise ConfigError(f"resonance: expected a threshold below ∞, got {threshold!r}.")
    if not 0.0 < temperature < math.inf:
        raise ConfigError(f"resonance: expected a temperature > 0, got {temperature!r}.")
    if blend is not None and tuple(blend.shape) != (state.shape[-3],):
        raise ShapeError(
            f"resonance: expected one blend per head, ({state.shape[-3]},) for states {tuple(state.shape)}, got "
            f"{tuple(blend.shape)}."
        )
    if blend is not None and not blend.is_floating_point():
        raise DomainError(f"resonance: expected a blend of a real floating dtype, got {blend.dtype}; convert it first.")
