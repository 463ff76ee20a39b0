"""Declarations of the room ``physics``: energies, the damped leapfrog, penalties, and the augmented Lagrangian."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection
from parity_tests.ops import physics_inputs as draw
from parity_tests.ops import physics_oracles as oracle
from so8t_jax.ops import physics as reference
from so8t_torch.core.errors import BackendError, ConfigError, DomainError, ShapeError
from so8t_torch.ops import physics as production

WHOLE = ("float64", "float32")
"""Dtypes of complex arguments, and of a layer whose derivative is taken: its own rounding is no part of the defect."""
ENERGY = (1, 2, 3, 4, 5)
"""Positions of the parameters of an energy."""
STATES = ({"d": 2, "m": 3}, {"d": 7, "m": 11})
TRAJECTORIES = ({"l": 2, "s": 2, "n": 3}, {"l": 6, "s": 9, "n": 8})
FIELDS = ({"s": 2, "d": 2}, {"s": 9, "d": 5})
PROBES = ({"s": 2, "n": 2, "d": 1}, {"s": 3, "n": 4, "d": 3})
MEMORIES = ({"t": 3, "k": 2, "v": 3}, {"t": 12, "k": 5, "v": 4})
TOKENS = ({"t": 3, "h": 2}, {"t": 16, "h": 3})
CHAINS = ({"n": 4}, {"n": 33})
STEP = {"step": 0.25}


def flip(x: np.ndarray) -> np.ndarray:
    """Return the state with its momenta reversed."""
    q, p = np.split(x, 2)
    return np.concatenate([q, -p])


def reversal_law(f: Any, example: Example) -> np.ndarray:
    """Without damping the flow runs back through its states once the momenta are reversed."""
    x, *rest = example
    back = flip(np.asarray(f(flip(np.asarray(f(x, *rest))), *rest)))
    return np.asarray((back - x) / np.abs(x).max())


def antisymmetry_law(f: Any, example: Example) -> np.ndarray:
    """ω(u, w) = −ω(w, u)."""
    u, w = example
    return np.asarray((f(u, w) + f(w, u)) / (np.linalg.norm(u) * np.linalg.norm(w)))


def secant_law(f: Any, example: Example) -> np.ndarray:
    """ḡ·Δx = ΔE."""
    gradient, change, energy_change = example
    size = 1.0 + np.abs(gradient * change).sum() + abs(float(energy_change))
    return np.asarray((np.asarray(f(*example)) @ change - energy_change) / size)


def unit_law(f: Any, example: Example) -> np.ndarray:
    """The drift does not depend on the unit of energy."""
    once, changed = (float(f(example[0] * unit)[0]) for unit in (1.0, 1024.0))
    return np.asarray((once - changed) / max(once, 1e-3))


def books_law(f: Any, example: Example) -> np.ndarray:
    """A memory that obeys its rule balances, and stays within what it can reach."""
    generator = np.random.default_rng(zlib.crc32(example[1].tobytes()))
    _, keys, values = example[:3]
    size = {"t": len(keys), "k": keys.shape[1], "v": values.shape[1]}
    value, monitors = f(*draw.memory(generator, size)[:5], None)
    return np.asarray([float(value), float(monitors["residual"])])


def ward_law(f: Any, example: Example) -> np.ndarray:
    """Flux balances on a chain with Hermitian hopping."""
    generator = np.random.default_rng(zlib.crc32(example[0].tobytes()))
    value, monitors = f(*draw.chain(generator, {"n": len(example[0])}))
    return np.asarray([float(value), float(monitors["worst"])])


def pair(name: str, oracle: Any, inputs: dict[str, Any], sizes: Any, wrt: tuple[int, ...], **fields: Any) -> OpPair:
    """Declare one function; a suffix after a colon names another choice of keywords."""
    function = name.partition(":")[0]
    return OpPair(
        name=f"physics.{name}",
        reference=getattr(reference, function),
        production=getattr(production, function),
        oracle=oracle,
        inputs=inputs,
        sizes=sizes,
        wrt=wrt,
        **fields,
    )


def energy_arguments(width: int = 4, **changed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a state of some width and an energy for width 4, some of it changed."""
    half = torch.ones(2)
    given = {"mass": half, "kappa": torch.ones(()), "scales": torch.ones(3), "w": torch.ones(3, 2), "b": torch.ones(3)}
    return torch.ones(5, width), *(given | changed).values()


def zeros(*shapes: tuple[int, ...]) -> Any:
    """Return a function that returns zeros of the given shapes."""
    return lambda: tuple(torch.zeros(shape) for shape in shapes)


ENERGY_REJECTIONS = (
    Rejection("odd", lambda: energy_arguments(5), ShapeError, r"x \(\.\.\., 2d\)"),
    Rejection("width", lambda: energy_arguments(6), ShapeError, "weights"),
    Rejection("mass", lambda: energy_arguments(mass=-torch.ones(2)), DomainError, "inverse_mass > 0"),
    Rejection("kappa", lambda: energy_arguments(kappa=torch.zeros(())), DomainError, "kappa > 0"),
    Rejection("scales", lambda: energy_arguments(scales=-torch.ones(3)), DomainError, "scales ≥ 0"),
)

PHASE_SPACE = (
    pair(
        "energy",
        oracle.energy_by_loops,
        {"generic": draw.state, "far": draw.far_state},
        STATES,
        (0, *ENERGY),
        shared=ENERGY,
        masters=ENERGY,
        returns="accumulation",
        budget=Budget(forward=32, gradient=64),
        rejections=ENERGY_REJECTIONS,
    ),
    pair(
        "energy_gradient",
        oracle.gradient_by_terms,
        {"generic": draw.state, "far": draw.far_state},
        STATES,
        (0, *ENERGY),
        shared=ENERGY,
        masters=ENERGY,
        # the gradient of a parameter adds terms of both signs, up to 8·4; measured 58 eps where κ's cancel
        budget=Budget(forward=32, gradient=128, gradient_floor=1.0),
        rejections=ENERGY_REJECTIONS[:2],
    ),
    pair(
        "discrete_gradient",
        oracle.discrete_by_projection,
        {"generic": draw.secant, "rest": draw.at_rest},
        ({"n": 3}, {"n": 12}),
        (0, 1, 2),
        budget=Budget(forward=64, gradient=256),
        laws=(Law("secant", secant_law, 64),),
        rejections=(Rejection("shape", zeros((3,), (4,), ()), ShapeError, "change"),),
    ),
    pair(
        "symplectic_form",
        oracle.form_by_matrix,
        {"generic": draw.tangents},
        ({"d": 1}, {"d": 9}),
        (0, 1),
        returns="accumulation",
        budget=Budget(forward=64, gradient=4, floor=1.0),
        laws=(Law("antisymmetry", antisymmetry_law, 4),),
        rejections=(Rejection("odd", zeros((3,), (3,)), ShapeError, "2d"),),
    ),
    pair(
        "leapfrog",
        oracle.leapfrog_by_maps,
        {"generic": draw.state},
        STATES,
        (0, *ENERGY),
        shared=ENERGY,
        masters=ENERGY,
        keywords={**STEP, "steps": 3},
        budget=Budget(forward=64, gradient=256),
        backends=("eager", "reversible"),
        laws=(Law("reversal", reversal_law, 256),),
        rejections=(
            *ENERGY_REJECTIONS[:2],
            Rejection("step", energy_arguments, ConfigError, "step other than 0", {"step": 0.0}),
            Rejection("damping", energy_arguments, ConfigError, "damping ≥ 0", {"damping": -0.1}),
            Rejection("steps", energy_arguments, ConfigError, "steps ≥ 0", {"steps": -1}),
            Rejection("backend", energy_arguments, BackendError, "reversible", {"backend": "fast"}),
        ),
    ),
    pair(
        "leapfrog:damped",
        oracle.leapfrog_by_maps,
        {"generic": draw.state},
        STATES,
        (0, *ENERGY),
        shared=ENERGY,
        masters=ENERGY,
        keywords={**STEP, "steps": 2, "damping": 0.5},
        budget=Budget(forward=64, gradient=256),
        backends=("eager", "reversible"),
    ),
)

PENALTIES = (
    pair(
        "energy_drift",
        oracle.drift_by_loops,
        {"generic": draw.energies, "large": draw.large_energies},
        TRAJECTORIES,
        (0,),
        returns="accumulation",
        finite_differences=False,
        budget=Budget(forward=32, gradient=64, floor=1.0),
        laws=(Law("unit", unit_law, 65536),),
        rejections=(
            Rejection("one_layer", zeros((1, 4)), ShapeError, r"l\+1"),
            Rejection("eps", zeros((2, 4)), ConfigError, "eps > 0", {"eps": 0.0}),
            Rejection("integers", lambda: (torch.ones(3, 2, dtype=torch.int64),), DomainError, "real floating"),
        ),
    ),
    pair(
        "energy_balance",
        oracle.balance_by_loops,
        {"open": draw.open_balance, "closed": lambda g, n: (*draw.closed_balance(g, n), None)},
        TRAJECTORIES,
        (0, 1, 2, 3),
        shared=(2,),
        keywords=STEP,
        returns="accumulation",
        finite_differences=False,
        budget=Budget(forward=32, gradient=64),
        rejections=(
            Rejection("layers", zeros((3, 4), (3, 4, 5), (5,)), ShapeError, "gradients"),
            Rejection(
                "negative",
                lambda: (torch.ones(3, 4), torch.ones(2, 4, 5), -torch.ones(5)),
                DomainError,
                "resistance ≥ 0",
            ),
        ),
    ),
    pair(
        "hamiltonian_residual",
        oracle.residual_by_matrix,
        {"generic": draw.field},
        FIELDS,
        (0, 1, 2),
        shared=(2,),
        keywords=STEP,
        returns="accumulation",
        budget=Budget(forward=32, gradient=64),
        rejections=(Rejection("odd", zeros((4, 5), (4, 5), (5,)), ShapeError, "2d"),),
    ),
    pair(
        "lyapunov_hinge",
        oracle.hinge_by_loops,
        {"open": draw.supplied, "closed": lambda g, n: (*draw.energies(g, n), None)},
        TRAJECTORIES,
        (0, 1),
        keywords={"rate": 0.4, **STEP},
        returns="accumulation",
        finite_differences=False,
        budget=Budget(forward=32, gradient=64, floor=1.0, gradient_floor=1.0),
        rejections=(Rejection("rate", zeros((3, 4)), ConfigError, "rate · step ≤ 1", {"rate": 5.0}),),
    ),
    pair(
        "symplectic_defect",
        oracle.defect_by_jacobian,
        {"generic": draw.probes},
        PROBES,
        (1, 2, 3),
        keywords={**STEP, "damping": 0.3},
        returns="accumulation",
        dtypes=WHOLE,
        budget=Budget(forward=256, gradient=512),
        rejections=(
            Rejection("odd", lambda: (draw.mixing_layer, *zeros(*[(2, 3, 5)] * 3)()), ShapeError, "2d"),
            Rejection("layer", lambda: (lambda x: x[..., :2], *zeros(*[(2, 3, 4)] * 3)()), ShapeError, r"layer\(x\)"),
        ),
    ),
    pair(
        "anchor",
        oracle.anchor_by_loops,
        {"generic": draw.gradients},
        ({"s": 2, "n": 3}, {"s": 9, "n": 4}),
        (0,),
        returns="accumulation",
        budget=Budget(forward=32, gradient=64),
        rejections=(Rejection("rank", zeros((3,)), ShapeError, "gradients"),),
    ),
)

FORGETTING = (
    pair(
        "memory_balance",
        oracle.memory_by_loops,
        {"broken": draw.broken_memory, "budget": draw.memory},
        MEMORIES,
        (0, 1, 2, 3, 4),
        returns="accumulation",
        finite_differences=False,
        budget=Budget(forward=64, gradient=256, floor=1.0, gradient_floor=1.0),
        laws=(Law("books", books_law, 64),),
        rejections=(
            Rejection("states", zeros((3, 2, 4), (3, 2), (3, 4), (3,), (3,)), ShapeError, r"t\+1"),
            Rejection(
                "retention",
                lambda: (torch.ones(4, 2, 4), torch.ones(3, 2), torch.ones(3, 4), -torch.ones(3), torch.ones(3)),
                DomainError,
                "retention ≥ 0",
            ),
        ),
    ),
    pair(
        "decay_budget",
        oracle.budget_by_loops,
        {"generic": draw.budgeted},
        TOKENS,
        (0, 1),
        shared=(1,),
        returns="accumulation",
        budget=Budget(forward=32, gradient=64),
        rejections=(
            Rejection("negative", lambda: (-torch.ones(3, 2), torch.ones(2)), DomainError, "decay ≥ 0"),
            Rejection("target", lambda: (torch.ones(3, 2), torch.zeros(2)), DomainError, "target > 0"),
            Rejection("heads", zeros((3, 2), (3,)), ShapeError, "target"),
        ),
    ),
    pair(
        "half_life_divergence",
        oracle.divergence_by_loops,
        {"generic": draw.decays, "narrow": draw.narrow_decays},
        TOKENS,
        (0,),
        returns="accumulation",
        # far outside of the histogram memberships of order one cancel in the gradient
        budget=Budget(forward=64, gradient=128, gradient_floor=0.01),
        rejections=(
            Rejection("zero", zeros((3, 2)), DomainError, "decay > 0"),
            Rejection("range", zeros((3, 2)), ConfigError, "shortest < longest", {"shortest": 8.0, "longest": 4.0}),
        ),
    ),
    pair(
        "ward_residual",
        oracle.ward_by_matrix,
        {"free": draw.free_chain, "hermitian": draw.chain},
        CHAINS,
        (0, 1, 2, 3, 4, 5),
        dtypes=WHOLE,
        returns="input",
        finite_differences=False,
        edge_sizes=({"n": 1},),
        budget=Budget(forward=256, gradient=1024, floor=1.0, gradient_floor=1.0),
        laws=(Law("ward", ward_law, 512),),
        rejections=(
            Rejection("width", zeros(*[(4,)] * 5, (4,)), ShapeError, "upper"),
            Rejection("real", zeros(*[(4,)] * 3, (3,), (3,), (4,)), DomainError, "complex"),
            Rejection(
                "shift", lambda: (*[torch.ones(4) + 0j] * 3, *zeros((3,), (3,), (4,))()), DomainError, "width > 0"
            ),
        ),
    ),
    pair(
        "resolvent_energy",
        oracle.log_det_by_product,
        {"generic": draw.ratios},
        CHAINS,
        (0,),
        dtypes=WHOLE,
        budget=Budget(forward=64, gradient=64, floor=1.0),
        rejections=(Rejection("real", zeros((4,)), DomainError, "complex"),),
    ),
)

LAGRANGIAN = (
    pair(
        "augmented_lagrangian",
        oracle.lagrangian_by_loops,
        {"generic": draw.constraints},
        ({"k": 1}, {"k": 5}),
        (0, 1),
        returns="accumulation",
        budget=Budget(forward=16, gradient=16),
        rejections=(
            Rejection("count", zeros((), (3,), (3,), (2,)), ShapeError, "penalties"),
            Rejection(
                "negative",
                lambda: (torch.ones(()), torch.ones(2), -torch.ones(2), torch.ones(2)),
                DomainError,
                "multipliers ≥ 0",
            ),
        ),
    ),
    pair(
        "update_multipliers",
        oracle.update_by_loops,
        {"generic": draw.dual_step},
        ({"k": 1}, {"k": 9}),
        (),
        returns="accumulation",
        budget=Budget(forward=8, floor=1.0),
        rejections=(Rejection("count", zeros((3,), (3,), (3,), (2,), (3,)), ShapeError, "targets"),),
    ),
)

PAIRS: tuple[OpPair, ...] = (*PHASE_SPACE, *PENALTIES, *FORGETTING, *LAGRANGIAN)
