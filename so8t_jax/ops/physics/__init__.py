"""Energy, balance and forgetting of a network's states: quantities, penalties, and the integrator that needs none.

    x = (q, p) ∈ ℝ^{2d}      H(x) = ½ pᵀ M⁻¹ p + V(q),   V(q) = (κ/2)|q|² + Σ_m s_m softplus(w_m·q + b_m)
    ẋ = (J − R) ∇H,  J = [[0, I], [−I, 0]],  R ≥ 0       ω(u, w) = u_q·w_p − u_p·w_q

Symbols: x a state (the last axis of a layer's output, halved into positions q and momenta p), M⁻¹ the inverse masses,
κ > 0 and s_m ≥ 0, so that V is bounded below and coercive; J the symplectic matrix, R the resistance (diagonal),
ω the symplectic form. A trajectory is L + 1 states, one per layer or integrator step, and E_l its energies.

Every penalty is a pure function of arrays: one example is a batch of S states, the answer is (value, diagnostics), the
value has no unit, and the diagnostics are monitors that carry no gradient. Where a scale is held constant in the
gradient, the docstring says so.
Cost: one pass over the arguments; a JVP pair for ``symplectic_defect``. Derivation: docs/math/physics.md.
"""

from so8t_jax.ops.physics.forgetting import (
    decay_budget,
    half_life_divergence,
    memory_balance,
    resolvent_energy,
    ward_residual,
)
from so8t_jax.ops.physics.lagrangian import augmented_lagrangian, update_multipliers
from so8t_jax.ops.physics.penalties import (
    anchor,
    energy_balance,
    energy_drift,
    hamiltonian_residual,
    lyapunov_hinge,
    symplectic_defect,
)
from so8t_jax.ops.physics.phase_space import discrete_gradient, energy, energy_gradient, leapfrog, symplectic_form

__all__ = [
    "anchor",
    "augmented_lagrangian",
    "decay_budget",
    "discrete_gradient",
    "energy",
    "energy_balance",
    "energy_drift",
    "energy_gradient",
    "half_life_divergence",
    "hamiltonian_residual",
    "leapfrog",
    "lyapunov_hinge",
    "memory_balance",
    "resolvent_energy",
    "symplectic_defect",
    "symplectic_form",
    "update_multipliers",
    "ward_residual",
]
