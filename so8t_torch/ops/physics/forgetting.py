"""Whether memories keep their books: fast weights, decay rates, and the resolvent of a dissipative chain.

    memory      E_t = ½‖S_t‖²,  S_t = a_t S_{t−1} + η_t k_t v_tᵀ
                E_t − E_{t−1} = −(1 − a²)/2 ‖S_{t−1}‖² + aη ⟨S_{t−1}, k vᵀ⟩ + (η²/2)|k|²|v|²
    budget      mean_h (mean_t Γ_{t,h} / Γ*_h − 1)²          half-lives  ln 2 / Γ, log-uniform in [shortest, longest]
    Ward        Im G_ii = Σ_j |G_ij|² w_j,  w_j = Γ_j + Im z                       (Hermitian hopping)
    resolvent   V = −(1/N) Re log det(H − z) = −(1/N) Σ_i log|L_i|

Symbols: S fast weights, a retention, η write strength, k and v key and value; Γ decay per token; G the resolvent of a
tridiagonal H with diagonal ratios L (left) and R (right), b and c its upper and lower couplings. Axes before those
named are independent problems. Real results are float32 (float64 for float64 and complex128).
Cost: one pass; the sums along a chain double their reach ⌈log₂ N⌉ times, O(N log N) without a loop over sites.
Twin: so8t_jax/ops/physics/forgetting.py. Derivation: docs/math/physics.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex, Float, Inexact
from torch import Tensor
from torch.nn.functional import pad

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.ops.physics.arguments import (
    Diagnostics,
    check_numbers,
    match,
    monitors,
    not_negative,
    positive,
    widened,
)

REFERENCE_POINTS = 16
"""Points per bin of the histogram that log-uniform half-lives have."""


def memory_balance(
    states: Float[Tensor, "*batch t1 dk dv"],
    keys: Float[Tensor, "*batch t dk"],
    values: Float[Tensor, "*batch t dv"],
    retention: Float[Tensor, "*batch t"],
    eta: Float[Tensor, "*batch t"],
    bound: Float[Tensor, "*batch t"] | None = None,
    *,
    eps: float = 1e-12,
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
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

    Raises:
        ShapeError: shapes that do not fit.
        DomainError: a dtype that is not real floating, or a negative retention.
        ConfigError: eps is not positive.

    Numerics: the residual is a difference of nearly equal energies; all of it is carried in float64 and rounded once.
    """
    op = "memory_balance"
    check_numbers(op, eps=eps)
    match(
        op,
        states=(states, "... t+1 k v"),
        keys=(keys, "... t k"),
        values=(values, "... t v"),
        retention=(retention, "... t"),
        eta=(eta, "... t"),
        bound=(bound, "... t"),
    )
    not_negative(op, retention=retention)
    dtype = accumulation_dtype(states.dtype)
    states, keys, values, retention, eta = (x.double() for x in widened(op, states, keys, values, retention, eta))
    energy = states.square().sum((-2, -1)) / 2
    strength = eta.square() * keys.square().sum(-1) * values.square().sum(-1)
    with without_autocast(states.device):
        overlap = ((states[..., :-1, :, :] @ values[..., None])[..., 0] * keys).sum(-1)
    dissipation = (1 - retention.square()) * energy[..., :-1]
    supply = retention * eta * overlap + strength / 2
    scale = (energy.detach().mean(-1) + eps)[..., None]
    residual = (energy.diff(dim=-1) + dissipation - supply) / scale
    reach = _reach(energy[..., 0], strength, retention) if bound is None else widened(op, states, bound)[1]
    filled = energy[..., 1:] / (reach.detach().square() / 2 + eps)
    value = residual.square().mean(-1) + (filled - 1).relu().square().mean(-1)
    return value.to(dtype), monitors(
        energy=energy.mean(-1).to(dtype),
        dissipation=dissipation.mean(-1).to(dtype),
        supply=supply.mean(-1).to(dtype),
        residual=residual.abs().amax(-1).to(dtype),
        filled=filled.amax(-1).to(dtype),
    )


def decay_budget(
    decay: Float[Tensor, "*batch t h"], target: Float[Tensor, " h"]
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
    """Return mean_h (mean_t Γ_{t,h} / Γ*_h − 1)²: forgetting neither frozen nor overdamped.

    Args:
        decay: Γ ≥ 0 per token.
        target: Γ* > 0 of every head.

    Returns:
        The value, the mean of Γ, and the share of (token, head) with a half-life below one token.

    Raises:
        ShapeError: shapes that do not fit.
        DomainError: a dtype that is not real floating, a negative decay, or a target that is not positive.
    """
    match("decay_budget", decay=(decay, "... t h"), target=(target, "h"))
    not_negative("decay_budget", decay=decay)
    positive("decay_budget", target=target)
    decay, target = widened("decay_budget", decay, target)
    ratio = decay.mean(-2) / target
    overdamped = (decay > math.log(2.0)).to(decay.dtype).mean((-2, -1))
    return (ratio - 1).square().mean(-1), monitors(mean=decay.mean((-2, -1)), overdamped=overdamped)


def half_life_divergence(
    decay: Float[Tensor, "*batch t h"], *, shortest: float = 4.0, longest: float = 4096.0, bins: int = 10
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
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

    Raises:
        ShapeError: no token, or no head.
        DomainError: a dtype that is not real floating, or a decay that is not positive.
        ConfigError: not 0 < shortest < longest, or fewer than two bins.
    """
    op = "half_life_divergence"
    if not 0 < shortest < longest < math.inf or bins < 2:
        raise ConfigError(
            f"physics.{op}: expected 0 < shortest < longest and bins ≥ 2, got {shortest!r}, {longest!r} and {bins!r}."
        )
    match(op, decay=(decay, "... t h"))
    positive(op, decay=decay)
    (decay,) = widened(op, decay)
    width = math.log(longest / shortest) / bins
    log_half_lives = math.log(math.log(2.0)) - decay.log()
    position = (log_half_lives - math.log(shortest)) / width
    points = torch.arange(bins * REFERENCE_POINTS, dtype=decay.dtype, device=decay.device)
    wanted = _log_histogram((points + 0.5) / REFERENCE_POINTS, bins)
    found = _log_histogram(position.flatten(-2), bins)
    return (found.exp() * (found - wanted)).sum(-1), monitors(half_life=log_half_lives.mean((-2, -1)).exp())


def ward_residual(
    green: Complex[Tensor, "*batch n"],
    left: Complex[Tensor, "*batch n"],
    right: Complex[Tensor, "*batch n"],
    upper: Inexact[Tensor, "*batch n_minus_1"],
    lower: Inexact[Tensor, "*batch n_minus_1"],
    width: Float[Tensor, "*batch n"],
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
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

    Raises:
        ShapeError: shapes that do not fit.
        DomainError: G, L or R is not complex, or a width that is not positive.
    """
    op = "ward_residual"
    match(
        op,
        green=(green, "... n"),
        left=(left, "... n"),
        right=(right, "... n"),
        upper=(upper, "... n-1"),
        lower=(lower, "... n-1"),
        width=(width, "... n"),
    )
    _require_complex(op, green, left, right)
    positive(op, width=width)
    ahead = _modulus(upper) / _modulus(right[..., 1:])
    behind = _modulus(lower) / _modulus(left[..., :-1])
    after = _accumulate(ahead.flip(-1), width.flip(-1)).flip(-1)
    before = _accumulate(behind, width)
    residual = width.detach() * (green.imag - _modulus(green) * (after + before - width))
    return residual.square().mean(-1), monitors(worst=residual.abs().amax(-1))


def resolvent_energy(left: Complex[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Return −(1/N) Re log det(H − z) = −(1/N) Σ_i log|L_i|.

    Args:
        left: L_i, the ratios of ``ward_residual``; none is zero.

    Returns:
        The energies, real.

    Raises:
        ShapeError: no site.
        DomainError: L is not complex.
    """
    match("resolvent_energy", left=(left, "... n"))
    _require_complex("resolvent_energy", left)
    return -_modulus(left).log().mean(-1) / 2


def _reach(energy: Tensor, strength: Tensor, retention: Tensor) -> Tensor:
    """Return a^t ‖S_0‖ + write · Σ_{j<t} a^j for t = 1 … T, held constant."""
    strength, retention = torch.broadcast_tensors(strength, retention)
    a, write = retention.detach().amax(-1, keepdim=True), strength.detach().amax(-1, keepdim=True).sqrt()
    powers = a.expand(strength.shape).cumprod(-1)
    geometric = torch.cat([torch.ones_like(a.expand(*strength.shape[:-1], 1)), powers[..., :-1]], -1).cumsum(-1)
    return powers * (2 * energy.detach()).sqrt()[..., None] + write * geometric


def _log_histogram(position: Tensor, bins: int) -> Tensor:
    """Return the log of the mean membership of every bin (..., bins)."""
    centres = torch.arange(bins, dtype=position.dtype, device=position.device) + 0.5
    membership = (-(position[..., None] - centres).square() / 2).log_softmax(-1)
    return membership.logsumexp(-2) - math.log(position.shape[-1])


def _accumulate(factor: Tensor, term: Tensor) -> Tensor:
    """Return x_0 = term_0, x_i = term_i + factor_{i−1} x_{i−1}, doubling the reach of every sum until it is whole."""
    n = term.shape[-1]
    factor, term = torch.broadcast_tensors(pad(factor, (1, 0)), term)
    # A single site takes one round too: of nothing, but it keeps couplings and ratios in the graph.
    for reach in (2**k for k in range(max(1, (n - 1).bit_length()))):
        head = [x[..., :reach] for x in (factor, term)]
        tail = factor[..., reach:]
        term = torch.cat([head[1], term[..., reach:] + tail * term[..., :-reach]], -1)
        factor = torch.cat([head[0], tail * factor[..., :-reach]], -1)
    return term


def _modulus(z: Tensor) -> Tensor:
    """Return |z|²."""
    return z.real.square() + z.imag.square() if z.is_complex() else z.square()


def _require_complex(op: str, *tensors: Tensor) -> None:
    """Raise unless all are complex."""
    for tensor in tensors:
        if not tensor.is_complex():
            raise DomainError(f"physics.{op}: expected complex resolvents and ratios, got {tensor.dtype}.")
