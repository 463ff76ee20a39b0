"""A layer that conserves energy, or loses it at a set rate, by construction: the damped leapfrog of a learned energy.

    x = (q, p),  H(x) = ½ pᵀM⁻¹p + (κ/2)|q|² + Σ_m softplus(r_m) softplus(w_m·q + b_m),   y = leapfrog(x; h, γ, n steps)
    JᵀΩJ = e^{−γhn} Ω,  J = ∂y/∂x

Symbols: q and p the halves of the channels; w, b and r trainable; M⁻¹ = 1, or 1/(softplus(r_M) + mass_floor) trainable;
κ fixed: it anchors the scale of the energy. The energy acts on each token alone, so the layer is causal.
Cost: n + 1 forces of two products with w, forward. With ``adjoint="reversible"`` the backward pass takes the steps once
more, and its memory does not grow with n.
Operations: so8t_torch/ops/physics. Derivation: docs/math/physics.md.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.ops import physics
from so8t_torch.ops.physics import reversible

__all__ = ["HamiltonianBlock"]

Adjoint = Literal["stored", "reversible"]


class HamiltonianBlock(nn.Module):
    """A residual-free layer y = leapfrog(x), conformally symplectic to rounding whatever it learns.

    Args:
        d_model: number of channels, even; the first half are positions.
        features: M, the number of terms of the learned potential; ``d_model`` by default.
        step: h, finite and not 0.
        steps: n ≥ 1.
        damping: γ ≥ 0 per unit of time.
        kappa: κ > 0, kept as a buffer.
        learn_mass: whether M⁻¹ is trainable; 1 without it.
        mass_floor: least mass, positive.
        adjoint: ``"stored"`` (autograd keeps every step), or ``"reversible"`` (the steps are run backwards).
        reconstruction_tolerance: with ``"reversible"``, the relative error in max norm of the recovered first state at
            which a forward pass that needs gradients warns and stores its steps after all. Reading it waits for a
            device, breaks the graph of ``torch.compile``, and costs n steps more. Under forward-mode differentiation
            and ``vmap``, where it cannot be read, the steps are stored.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: an option out of range.
    """

    kappa: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        features: int | None = None,
        step: float = 0.1,
        steps: int = 1,
        damping: float = 0.0,
        kappa: float = 1.0,
        learn_mass: bool = False,
        mass_floor: float = 1e-3,
        adjoint: Adjoint = "stored",
        reconstruction_tolerance: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        features = d_model if features is None else features
        whole = all(isinstance(n, int) for n in (d_model, features, steps))
        if not whole or d_model < 2 or d_model % 2 or features < 1 or steps < 1:
            raise ConfigError(
                "HamiltonianBlock: expected whole numbers, an even d_model ≥ 2, features ≥ 1 and steps ≥ 1, "
                f"got {d_model!r}, {features!r} and {steps!r}."
            )
        if not (0 < abs(step) < math.inf and 0 <= damping < math.inf):
            raise ConfigError(f"HamiltonianBlock: expected step ≠ 0 and damping ≥ 0, got {step!r} and {damping!r}.")
        if not (0 < kappa < math.inf and 0 < mass_floor < math.inf and reconstruction_tolerance > 0):
            raise ConfigError(
                "HamiltonianBlock: expected finite kappa and mass_floor > 0 and reconstruction_tolerance > 0, "
                f"got {kappa!r}, {mass_floor!r} and {reconstruction_tolerance!r}."
            )
        if adjoint not in ("stored", "reversible"):
            raise ConfigError(f"HamiltonianBlock: expected adjoint 'stored' or 'reversible', got {adjoint!r}.")
        super().__init__()
        self.d_model, self.step, self.steps, self.damping = d_model, float(step), steps, float(damping)
        self.mass_floor, self.adjoint, self.reconstruction_tolerance = mass_floor, adjoint, reconstruction_tolerance
        half = d_model // 2
        self.weights = nn.Parameter(torch.empty(features, half, device=device, dtype=dtype))
        self.biases = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.raw_scales = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        raw_mass = torch.empty(half, device=device, dtype=dtype) if learn_mass else None
        self.raw_mass = nn.Parameter(raw_mass) if raw_mass is not None else None
        self.stiffness = float(kappa)
        self.register_buffer("kappa", torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw w with unit variance of w·q for unit q, and set b = 0, s = 1/M, masses 1 + mass_floor, and κ.

        Args:
            generator: of the device of the parameters; by default the global one.
        """
        features, half = self.weights.shape
        self.kappa.fill_(self.stiffness)
        nn.init.normal_(self.weights, std=1 / math.sqrt(half), generator=generator)
        nn.init.zeros_(self.biases)
        nn.init.constant_(self.raw_scales, _inverse_softplus(1 / features))
        if self.raw_mass is not None:
            nn.init.constant_(self.raw_mass, _inverse_softplus(1.0))

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the state after n steps, in the dtype of x; computed in float32 (float64 for float64).

        Args:
            x: the state (q, p) of every token.

        Raises:
            ShapeError: the last axis of x is not ``d_model``.
            DomainError: x is not real floating-point.
        """
        self._check(x)
        parameters = self.hamiltonian()
        if self.adjoint == "reversible" and self._needs_gradient(x, *parameters) and reversible.plain(x, *parameters):
            y, error = self._run_reversibly(x, parameters)
            if error <= self.reconstruction_tolerance:
                return y
            warnings.warn(
                f"HamiltonianBlock: running {self.steps} steps backwards misses the first state by {error:.2g} "
                f"(allowed {self.reconstruction_tolerance:.2g}); they are stored. Lower step · damping · steps.",
                stacklevel=2,
            )
        return physics.leapfrog(x, *parameters, step=self.step, damping=self.damping, steps=self.steps)

    def energy(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """Return H of every token, in float32 (float64 for float64)."""
        self._check(x)
        return physics.energy(x, *self.hamiltonian())

    def energy_gradient(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return ∇H of every token, in the dtype of x."""
        self._check(x)
        return physics.energy_gradient(x, *self.hamiltonian())

    def hamiltonian(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the parameters of H as the room ``physics`` takes them: 1/M, κ, s, w, b."""
        wide = accumulation_dtype(self.weights.dtype)
        if self.raw_mass is None:
            inverse_mass = torch.ones_like(self.weights[0], dtype=wide)
        else:
            inverse_mass = 1 / (softplus(self.raw_mass.to(wide)) + self.mass_floor)
        return inverse_mass, self.kappa, softplus(self.raw_scales.to(wide)), self.weights, self.biases

    def extra_repr(self) -> str:
        """Return the width and what decides the flow."""
        return (
            f"{self.d_model}, features={len(self.biases)}, step={self.step:g}, steps={self.steps}, "
            f"damping={self.damping:g}, adjoint={self.adjoint!r}"
        )

    def _run_reversibly(self, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, float]:
        """Return the state after n steps, connected to the adjoint that runs backwards, and what that misses."""
        wide = x.to(accumulation_dtype(x.dtype))
        flow = ([p.to(wide.dtype) for p in parameters], self.step, math.exp(-self.damping * self.step / 2), self.steps)
        with without_autocast(x.device):
            y = reversible.integrate_reversibly(wide, *flow)
            error = float(reversible.recovery_error(wide, y, *flow)) if x.numel() else 0.0
        return y.to(x.dtype), error

    def _needs_gradient(self, *tensors: Tensor) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    def _check(self, x: Tensor) -> None:
        """Raise unless the last axis of x is d_model and its dtype real floating."""
        if x.ndim == 0 or x.shape[-1] != self.d_model:
            raise ShapeError(f"HamiltonianBlock: expected x (..., {self.d_model}), got {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise DomainError(f"HamiltonianBlock: expected real floating-point x, got {x.dtype}; convert it first.")


def _inverse_softplus(y: float) -> float:
    """Return x with log(1 + eˣ) = y."""
    return math.log(math.expm1(y))
