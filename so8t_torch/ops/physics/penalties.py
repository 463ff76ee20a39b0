"""Penalties on what a trajectory does with its energy, and on how a layer treats the symplectic form.

    energy_drift           mean (ΔE / (⟨|E|⟩ + ε))²                       0 iff the energy is constant
    energy_balance         mean ((ΔE + h ḡᵀRḡ − supply) / (⟨|E|⟩ + ε))²   0 iff power in = power stored + power lost
    hamiltonian_residual   ⟨|f − (J − R)∇H|²⟩ / (⟨|f|²⟩ + ε)              0 iff the increment is h (J − R)∇H
    lyapunov_hinge         mean max(0, E′ − (1 − αh)E − supply)² / (⟨|E|⟩ + ε)²
    symplectic_defect      mean (ω(DF u, DF w) − e^{−γh} ω(u, w))² / (|u|² |w|²)
    anchor                 (⟨|∇H|²⟩ − 1)²

Symbols as in the room; ⟨·⟩ is the mean over states (and layers), held constant in the gradient where it is ⟨|E|⟩; ΔE
and E′ belong to one layer, ḡ is a discrete gradient between its two states, and the supply is the work of what enters
from outside, ⟨ḡ, external increment⟩, 0 for a closed system. Axes before those named are independent problems.
Computed and returned in float32 (float64 for float64).
Cost: one pass; two JVPs of the layer for the symplectic defect. Twin: so8t_jax/ops/physics/penalties.py. Derivation:
docs/math/physics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.ops.physics.arguments import (
    Diagnostics,
    check_duration,
    check_numbers,
    match,
    monitors,
    not_negative,
    widened,
)
from so8t_torch.ops.physics.phase_space import form

TOKENS = (-2, -1)


def energy_drift(
    energies: Float[Tensor, "*batch l s"], *, eps: float = 1e-12
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
    """Return mean ((E_{l+1} − E_l) / (⟨|E|⟩ + ε))²; ⟨|E|⟩ is held constant in the gradient.

    Args:
        energies: E of L + 1 ≥ 2 layers or steps and S states.
        eps: ε, in units of E.

    Returns:
        The value, and the scale ⟨|E|⟩, the largest |ΔE| and the mean of E_L − E_0, both in units of the scale.

    Raises:
        ShapeError: no S states of at least two layers.
        DomainError: a dtype that is not real floating.
        ConfigError: eps is not positive.
    """
    check_numbers("energy_drift", eps=eps)
    match("energy_drift", energies=(energies, "... l+1 s"))
    (energies,) = widened("energy_drift", energies)
    scale = _scale(energies, eps)
    drift = energies.diff(dim=-2) / scale[..., None, None]
    total = (energies[..., -1, :] - energies[..., 0, :]).mean(-1) / scale
    return drift.square().mean((-2, -1)), monitors(scale=scale, worst=drift.abs().amax((-2, -1)), total=total)


def energy_balance(
    energies: Float[Tensor, "*batch l s"],
    gradients: Float[Tensor, "*batch k s n"],
    resistance: Float[Tensor, " n"],
    supply: Float[Tensor, "*batch k s"] | None = None,
    *,
    step: float = 1.0,
    eps: float = 1e-12,
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
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

    Raises:
        ShapeError: shapes that do not fit.
        DomainError: a dtype that is not real floating, or a negative resistance.
        ConfigError: step or eps is out of range.
    """
    op = "energy_balance"
    check_numbers(op, eps=eps)
    check_duration(op, step)
    match(
        op,
        energies=(energies, "... l+1 s"),
        gradients=(gradients, "... l s n"),
        resistance=(resistance, "n"),
        supply=(supply, "... l s"),
    )
    not_negative(op, resistance=resistance)
    energies, gradients, resistance = widened(op, energies, gradients, resistance)
    scale = _scale(energies, eps)
    lost = step * (resistance * gradients.square()).sum(-1)
    residual = (energies.diff(dim=-2) + lost - _supplied(op, supply, energies)) / scale[..., None, None]
    return residual.square().mean((-2, -1)), monitors(
        scale=scale, worst=residual.abs().amax((-2, -1)), dissipation=lost.mean((-2, -1)) / scale
    )


def hamiltonian_residual(
    increments: Float[Tensor, "*batch s two_d"],
    gradients: Float[Tensor, "*batch s two_d"],
    resistance: Float[Tensor, " two_d"],
    *,
    step: float = 1.0,
    eps: float = 1e-12,
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
    """Return ⟨|f − (J − R)∇H|²⟩ / (⟨|f|²⟩ + ε) with f = increment / h.

    Args:
        increments: what a layer adds to each of S states.
        gradients: ∇H at these states.
        resistance: the diagonal of R ≥ 0.
        step: h > 0.
        eps: ε, in units of |f|².

    Returns:
        The value, and ⟨|f|²⟩ and ⟨|(J − R)∇H|²⟩.

    Raises:
        ShapeError: an odd width, or shapes that do not fit.
        DomainError: a dtype that is not real floating, or a negative resistance.
        ConfigError: step or eps is out of range.
    """
    op = "hamiltonian_residual"
    check_numbers(op, eps=eps)
    check_duration(op, step)
    match(op, increments=(increments, "... s 2d"), gradients=(gradients, "... s 2d"), resistance=(resistance, "2d"))
    not_negative(op, resistance=resistance)
    increments, gradients, resistance = widened(op, increments, gradients, resistance)
    rate = increments / step
    g_q, g_p = gradients.chunk(2, -1)
    field = torch.cat([g_p, -g_q], -1) - resistance * gradients
    size = _mean_square(rate)
    return _mean_square(rate - field) / (size + eps), monitors(increment=size, field=_mean_square(field))


def lyapunov_hinge(
    energies: Float[Tensor, "*batch l s"],
    supply: Float[Tensor, "*batch k s"] | None = None,
    *,
    rate: float,
    step: float = 1.0,
    eps: float = 1e-12,
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
    """Return mean max(0, E_{l+1} − (1 − αh)E_l − supply_l)² / (⟨|E|⟩ + ε)²; ⟨|E|⟩ is held constant in the gradient.

    Args:
        energies: E of L + 1 ≥ 2 layers or steps and S states.
        supply: work done from outside in each step; None for a closed system.
        rate: α, the asked-for decay of energy per unit of time, 0 ≤ αh ≤ 1.
        step: h > 0.
        eps: ε, in units of E.

    Returns:
        The value, and the scale ⟨|E|⟩, the largest excess in units of the scale, and the share of steps with one.

    Raises:
        ShapeError: shapes that do not fit.
        DomainError: a dtype that is not real floating.
        ConfigError: rate, step or eps is out of range.
    """
    op = "lyapunov_hinge"
    check_numbers(op, eps=eps)
    check_duration(op, step)
    if not 0 <= rate * step <= 1:
        raise ConfigError(f"physics.{op}: expected 0 ≤ rate · step ≤ 1, got {rate!r} · {step!r}.")
    match(op, energies=(energies, "... l+1 s"), supply=(supply, "... l s"))
    (energies,) = widened(op, energies)
    scale = _scale(energies, eps)
    allowed = (1 - rate * step) * energies[..., :-1, :] + _supplied(op, supply, energies)
    excess = (energies[..., 1:, :] - allowed).relu() / scale[..., None, None]
    share = (excess > 0).to(energies.dtype).mean((-2, -1))
    return excess.square().mean((-2, -1)), monitors(scale=scale, worst=excess.amax((-2, -1)), violations=share)


def symplectic_defect(
    layer: Callable[[Float[Tensor, "*batch s n two_d"]], Float[Tensor, "*batch s n two_d"]],
    x: Float[Tensor, "*batch s n two_d"],
    u: Float[Tensor, "*batch s n two_d"],
    w: Float[Tensor, "*batch s n two_d"],
    *,
    damping: float = 0.0,
    step: float = 1.0,
) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
    """Return mean (ω(DF u, DF w) − e^{−γh} ω(u, w))² / (|u|² |w|²): 0 for a conformally symplectic layer F.

    A state is all N tokens of a sequence, so that F may mix tokens; ω and the norms sum over them.

    Args:
        layer: F, a smooth map of states that treats leading axes as a batch. It runs under forward-mode
            differentiation, in eager mode: an operator without a forward-mode rule must raise there.
        x: S states.
        u: one probe per state, not zero; over random probes the mean is Hutchinson's estimate of ‖DFᵀΩDF − cΩ‖².
        w: another.
        damping: γ ≥ 0; 0 asks for a symplectic layer.
        step: h.

    Returns:
        The value, and the mean stretch |DF u|²/|u|²: 0 means that no derivative came through the layer.

    Raises:
        ShapeError: an odd width, or shapes that do not fit, that of layer(x) included.
        DomainError: a dtype that is not real floating.
        ConfigError: step or damping is out of range.

    Numerics: the layer runs in the dtype of x, and its rounding counts as a defect: judge it in float32 or float64. The
        forms are summed in float32 (float64 for float64).
    """
    op = "symplectic_defect"
    check_numbers(op, step=step, damping=damping)
    match(op, x=(x, "... s n 2d"), u=(u, "... s n 2d"), w=(w, "... s n 2d"))
    widened(op, x, u, w)
    images = [torch.func.jvp(layer, (x,), (tangent.to(x.dtype).expand_as(x),))[1] for tangent in (u, w)]
    if images[0].shape != x.shape:
        raise ShapeError(f"physics.{op}: expected layer(x) of shape {tuple(x.shape)}, got {tuple(images[0].shape)}.")
    du, dw, u, w = widened(op, *images, u, w)
    size_u, size_w = u.square().sum(TOKENS), w.square().sum(TOKENS)
    defect = form(du, dw).sum(-1) - math.exp(-damping * step) * form(u, w).sum(-1)
    stretch = (du.square().sum(TOKENS) / size_u).mean(-1)
    return (defect.square() / (size_u * size_w)).mean(-1), monitors(stretch=stretch)


def anchor(gradients: Float[Tensor, "*batch s n"]) -> tuple[Float[Tensor, "*batch"], Diagnostics]:
    """Return (⟨|∇H|²⟩ − 1)², which keeps a learned energy from being constant.

    Args:
        gradients: ∇H at S states.

    Returns:
        The value, and ⟨|∇H|²⟩.

    Raises:
        ShapeError: no state, or no channel.
        DomainError: a dtype that is not real floating.
    """
    match("anchor", gradients=(gradients, "... s n"))
    square = _mean_square(*widened("anchor", gradients))
    return (square - 1).square(), monitors(mean_square=square)


def _scale(energies: Tensor, eps: float) -> Tensor:
    """Return ⟨|E|⟩ + ε, held constant."""
    return energies.detach().abs().mean((-2, -1)) + eps


def _supplied(op: str, supply: Tensor | None, energies: Tensor) -> Tensor | float:
    """Return the supply in the dtype of the energies, 0 for a closed system."""
    return 0.0 if supply is None else widened(op, energies, supply)[1]


def _mean_square(x: Tensor) -> Tensor:
    """Return the mean over states of |x|²."""
    return x.square().sum(-1).mean(-1)
