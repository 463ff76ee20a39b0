"""The Hamiltonian of a state, its gradients, the symplectic form, and the damped leapfrog.

    H(q, p) = ½ Σ_i p_i²/M_i + (κ/2)|q|² + Σ_m s_m softplus(w_m·q + b_m)      ∇V(q) = κq + Σ_m s_m σ(w_m·q + b_m) w_m
    leapfrog, one step:  p ← c p,  p ← p − (h/2)∇V(q),  q ← q + h M⁻¹ p,  p ← p − (h/2)∇V(q),  p ← c p,  c = e^{−γh/2}

Symbols as in the room; σ is the logistic function. Two kicks that meet between steps share one force. Parameters have
no batch axes. Computed in float32 (float64 for float64), autocast or not.
Cost: two products with w per force, n + 1 forces for n steps. Twin: so8t_jax/ops/physics/phase_space.py. Derivation:
docs/math/physics.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import softplus

from so8t_torch.core.backend import Candidate, choose, explain
from so8t_torch.core.errors import ConfigError
from so8t_torch.core.precision import without_autocast
from so8t_torch.ops.physics import reversible
from so8t_torch.ops.physics.arguments import check_numbers, match, not_negative, positive, widened


def energy(
    x: Float[Tensor, "*batch two_d"],
    inverse_mass: Float[Tensor, " d"],
    kappa: Float[Tensor, ""],
    scales: Float[Tensor, " m"],
    weights: Float[Tensor, "m d"],
    biases: Float[Tensor, " m"],
) -> Float[Tensor, "*batch"]:
    """Return H(x) = ½ pᵀ M⁻¹ p + V(q), bounded below and growing in every direction.

    Args:
        x: the state (q, p).
        inverse_mass: 1/M, positive.
        kappa: κ > 0, the stiffness that no other parameter can collapse.
        scales: s ≥ 0.
        weights: w.
        biases: b.

    Returns:
        The energies in float32 (float64 for float64).

    Raises:
        ShapeError: an odd width, or parameters that do not fit it.
        DomainError: a dtype that is not real floating, or a parameter of the wrong sign.
    """
    x, inverse_mass, *potential = _checked("energy", x, inverse_mass, kappa, scales, weights, biases)
    q, p = x.chunk(2, -1)
    with without_autocast(x.device):
        return (inverse_mass * p.square()).sum(-1) / 2 + _potential(q, *potential)


def energy_gradient(
    x: Float[Tensor, "*batch two_d"],
    inverse_mass: Float[Tensor, " d"],
    kappa: Float[Tensor, ""],
    scales: Float[Tensor, " m"],
    weights: Float[Tensor, "m d"],
    biases: Float[Tensor, " m"],
) -> Float[Tensor, "*batch two_d"]:
    """Return ∇H(x) = (∇V(q), M⁻¹ p) in the dtype of x; arguments and errors are those of ``energy``."""
    wide, inverse_mass, *potential = _checked("energy_gradient", x, inverse_mass, kappa, scales, weights, biases)
    q, p = wide.chunk(2, -1)
    with without_autocast(x.device):
        return torch.cat([-reversible.force(q, *potential), inverse_mass * p], -1).to(x.dtype)


def discrete_gradient(
    gradient: Float[Tensor, "*batch n"], change: Float[Tensor, "*batch n"], energy_change: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch n"]:
    """Return Gonzalez' discrete gradient ḡ = g + (ΔE − g·Δx) Δx/|Δx|², for which ḡ·Δx = ΔE; g itself where Δx = 0.

    Args:
        gradient: g = ∇H at the midpoint of the two states.
        change: Δx, from the first state to the second.
        energy_change: ΔE = H(second) − H(first).

    Returns:
        ḡ in the dtype of g.

    Raises:
        ShapeError: shapes that do not fit.
        DomainError: a dtype that is not real floating.

    Numerics: ΔE − g·Δx cancels where Δx is small; take the energies in float64 there.
    Source: O. Gonzalez, "Time integration and discrete Hamiltonian systems", J. Nonlinear Sci. 6 (1996).
    """
    op = "discrete_gradient"
    match(op, gradient=(gradient, "... n"), change=(change, "... n"), energy_change=(energy_change, "..."))
    g, dx, de = widened(op, gradient, change, energy_change)
    square = dx.square().sum(-1)
    moved = square > 0
    missing = (de - (g * dx).sum(-1)) / torch.where(moved, square, 1.0)
    return (g + torch.where(moved, missing, 0.0).unsqueeze(-1) * dx).to(gradient.dtype)


def symplectic_form(u: Float[Tensor, "*batch two_d"], w: Float[Tensor, "*batch two_d"]) -> Float[Tensor, "*batch"]:
    """Return ω(u, w) = u_q·w_p − u_p·w_q.

    Args:
        u: a tangent vector (q, p).
        w: another.

    Returns:
        The form in float32 (float64 for float64).

    Raises:
        ShapeError: an odd width, or two widths.
        DomainError: a dtype that is not real floating.
    """
    match("symplectic_form", u=(u, "... 2d"), w=(w, "... 2d"))
    return form(*widened("symplectic_form", u, w))


def leapfrog(
    x: Float[Tensor, "*batch two_d"],
    inverse_mass: Float[Tensor, " d"],
    kappa: Float[Tensor, ""],
    scales: Float[Tensor, " m"],
    weights: Float[Tensor, "m d"],
    biases: Float[Tensor, " m"],
    *,
    step: float,
    damping: float = 0.0,
    steps: int = 1,
    backend: str = "auto",
) -> Float[Tensor, "*batch two_d"]:
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
        backend: ``"eager"`` (plain operations), ``"reversible"`` (keeps the last state alone and runs the steps
            backwards in the backward pass: memory does not grow with ``steps``), or ``"auto"``, which is eager: whether
            a long damped run can be run backwards is for the caller to check, by running it with −h.

    Returns:
        The state in the dtype of x.

    Raises:
        ShapeError: an odd width, or parameters that do not fit it.
        DomainError: a dtype that is not real floating, or a parameter of the wrong sign.
        ConfigError: step, damping or steps is out of range.
        BackendError: the backend cannot run this call.

    Numerics: conformally symplectic to rounding whatever h; stable for h² κ/M < 4 and less where V is stiffer. The
        energy error is O(h²) and does not drift. Running backwards multiplies the rounding of p by e^{γh} a step; the
        reversible backend carries the state in float64 for it.
    Source: Hairer, Lubich, Wanner, "Geometric Numerical Integration" (2006), chapters I and VI.
    """
    check_numbers("leapfrog", step=step, damping=damping)
    if not isinstance(steps, (int, torch.SymInt)) or steps < 0:
        raise ConfigError(f"physics.leapfrog: expected a whole number of steps ≥ 0, got {steps!r}.")
    parameters = (inverse_mass, kappa, scales, weights, biases)
    state, *wide = _checked("leapfrog", x, *parameters)
    chosen = choose("physics.leapfrog", backend, _candidates(x, *parameters))
    run = reversible.integrate if chosen == "eager" else reversible.integrate_reversibly
    with without_autocast(x.device):
        return run(state, wide, step, math.exp(-damping * step / 2), steps).to(x.dtype)


def explain_backend(x: Tensor) -> str:
    """Return one line per backend of ``leapfrog``: that it can run on x, or every reason why not."""
    return explain(_candidates(x))


def form(u: Tensor, w: Tensor) -> Tensor:
    """Return ω(u, w) over the last axis."""
    (u_q, u_p), (w_q, w_p) = u.chunk(2, -1), w.chunk(2, -1)
    return (u_q * w_p - u_p * w_q).sum(-1)


def _potential(q: Tensor, kappa: Tensor, scales: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Return V(q)."""
    # From 40 on log(1 + eᵃ) is a in float64 too; the default threshold, 20, is that of float32.
    return kappa / 2 * q.square().sum(-1) + (scales * softplus(q @ weights.mT + biases, threshold=40.0)).sum(-1)


def _checked(op: str, x: Tensor, *parameters: Tensor) -> list[Tensor]:
    """Return the state and the parameters of H in the accumulation dtype, or raise where they do not fit."""
    inverse_mass, kappa, scales, weights, biases = parameters
    match(
        op,
        x=(x, "... 2d"),
        inverse_mass=(inverse_mass, "d"),
        kappa=(kappa, ""),
        scales=(scales, "m"),
        weights=(weights, "m d"),
        biases=(biases, "m"),
    )
    positive(op, inverse_mass=inverse_mass, kappa=kappa)
    not_negative(op, scales=scales)
    return widened(op, x, *parameters)


def _candidates(*tensors: Tensor) -> list[Candidate]:
    """Return the implementations of the leapfrog in order of preference."""
    return [Candidate("eager"), Candidate("reversible", _forward_mode_reasons(*tensors))]


def _forward_mode_reasons(*tensors: Tensor) -> tuple[str, ...]:
    """Return why the reversed pass cannot run under forward-mode differentiation; empty outside of it."""
    if torch.compiler.is_compiling() or all(forward_ad.unpack_dual(t).tangent is None for t in tensors):
        return ()
    return ("an argument carries a forward-mode tangent, which only plain operations propagate",)
