"""Declarations of the room ``tridiagonal``: dense matrices judge the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Carry, Example, Law, OpPair, Rejection
from parity_tests.ops.tridiagonal_inputs import CHAINS, HERMITIAN, STREAMS, TOKENS
from so8t_jax.ops import tridiagonal as reference
from so8t_torch.core.errors import BackendError, ConfigError, DomainError, ShapeError
from so8t_torch.ops import tridiagonal as production

DTYPES = ("float64", "float32")
BACKENDS = ("blocked", "triton")
HOST_BACKENDS = ("blocked",)
"""For what adds nothing to the sweeps of other pairs: an interpreted kernel takes seconds."""
SIZES = ({"N": 3}, {"N": 17}, {"N": 40})
LONG = ({"N": 3}, {"N": 17}, {"N": 256})
EDGES = ({"N": 1}, {"N": 2})


def operator(diagonal: Any, upper: Any, lower: Any, z: Any, segment_ids: Any = None) -> np.ndarray:
    """Return H − z as a dense matrix without couplings between segments."""
    matrix = np.diag(np.asarray(diagonal, np.complex128) - z)
    for i in range(len(upper)):
        if segment_ids is None or segment_ids[i] == segment_ids[i + 1]:
            matrix[i, i + 1], matrix[i + 1, i] = upper[i], lower[i]
    return matrix


def corners(matrix: np.ndarray) -> np.ndarray:
    """Return the last diagonal entry of the inverse of every leading block."""
    n = len(matrix)
    return np.asarray([np.linalg.solve(matrix[:k, :k], np.eye(k)[-1])[-1] for k in range(1, n + 1)])


def dense_ratios(*chain: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return L and R from solutions with every leading and every trailing block."""
    matrix = operator(*chain)
    return 1.0 / corners(matrix), 1.0 / corners(matrix[::-1, ::-1])[::-1]


def dense_green(*chain: Any, mode: str = "causal") -> np.ndarray:
    """Return the diagonal of the dense inverse, or the last entries of the inverses of leading blocks."""
    matrix = operator(*chain)
    return corners(matrix) if mode == "causal" else np.diag(np.linalg.inv(matrix)).copy()


def dense_log_det(*chain: Any) -> np.ndarray:
    """Return the sum of the logarithms of ratios of leading determinants."""
    return np.asarray(-np.log(corners(operator(*chain))).sum())


def dense_off_diagonals(*chain: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbours of the diagonal of the dense inverse."""
    inverse = np.linalg.inv(operator(*chain))
    return np.diag(inverse, 1).copy(), np.diag(inverse, -1).copy()


def dense_advance(state: Any, d: Any, beta: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the causal g of a chain whose first site carries the self-energy of what came before."""
    energies = np.array(d)
    energies[0] -= beta[0] * state
    g = corners(operator(energies, beta[1:], np.ones(len(d) - 1), 0.0))
    return g, g[-1]


def dense_step(state: Any, d_t: Any, beta_t: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the last entry of the inverse of two coupled sites, the first of which has the given g alone."""
    g = np.linalg.inv(np.asarray([[1.0 / state, beta_t], [1.0, d_t]]))[1, 1]
    return g, g


def herglotz_law(f: Any, example: Example) -> np.ndarray:
    """Im L and Im R are at most −(Γ + Im z); the first site of each sweep has d itself."""
    d = example[0] - example[3]
    left, right = (np.asarray(side) for side in f(*example))
    above = np.maximum(left.imag - d.imag, 0.0), np.maximum(right.imag - d.imag, 0.0)
    return np.concatenate([*above, np.abs([left[0] - d[0], right[-1] - d[-1]])]) / np.abs(d).max()


def ward_law(f: Any, example: Example) -> np.ndarray:
    """Im G_ii = Σ_j |G_ij|² (Γ_j + Im z): what flows in is what is lost."""
    rates = example[3].imag - example[0].imag
    found, others = np.asarray(f(*example)), np.abs(np.linalg.inv(operator(*example))) ** 2
    np.fill_diagonal(others, 0.0)
    lost = others @ rates + np.abs(found) ** 2 * rates
    return (found.imag - lost) / np.abs(lost).max()


def shift_law(f: Any, example: Example) -> np.ndarray:
    """Moving the diagonal by a number moves −z by it: both leave the resolvent alone."""
    diagonal, upper, lower, z, *rest = example
    before, after = np.asarray(f(*example)), np.asarray(f(diagonal + 0.25, upper, lower, z + 0.25, *rest))
    return (after - before) / np.abs(before).max()


def gauge_law(f: Any, example: Example) -> np.ndarray:
    """Only the products b c count: b doubled and c halved change nothing, bit for bit."""
    diagonal, upper, lower, *rest = example
    before, after = np.asarray(f(*example)), np.asarray(f(diagonal, 2.0 * upper, 0.5 * lower, *rest))
    return (after - before) / np.abs(before).max()


def causal_law(f: Any, example: Example) -> np.ndarray:
    """Edits of later sites, finite or not, change no bit of an earlier one."""
    diagonal, upper, lower, *rest = example
    half = len(diagonal) // 2
    before = np.asarray(f(*example))[:half]
    differences = []
    for value in (7.0, np.nan):
        edited, couplings = diagonal.copy(), upper.copy()
        edited[half:], couplings[half - 1 :] = value, 3.0
        differences.append(np.asarray(f(edited, couplings, lower, *rest))[:half] - before)
    return np.concatenate(differences)


def segment_law(f: Any, example: Example) -> np.ndarray:
    """A segment keeps every bit when another one is not a number."""
    diagonal, upper, lower, z = example[:4]
    half = len(diagonal) // 2
    ids = (np.arange(len(diagonal)) < half).astype(np.int64)
    lost = diagonal.copy()
    lost[:half] = np.nan
    before, after = (np.asarray(f(h, upper, lower, z, ids))[half:] for h in (diagonal, lost))
    return after - before


def determinant_law(f: Any, example: Example) -> np.ndarray:
    """The exponential of the sum of logarithms is the determinant."""
    phase, size = np.linalg.slogdet(operator(*example))
    return np.asarray(np.exp(np.asarray(f(*example)) - size) / phase - 1.0)


def inverse_law(f: Any, example: Example) -> np.ndarray:
    """Row i of (H − z) G has 1 on the diagonal: b_i G_{i+1,i} + d_i G_ii + c_{i−1} G_{i−1,i} = 1."""
    above, below = (np.asarray(side) for side in f(*example))
    matrix = operator(*example)
    full = np.diag(np.linalg.inv(matrix))
    total = np.diag(matrix) * full
    total[:-1] += np.diag(matrix, 1) * below
    total[1:] += np.diag(matrix, -1) * above
    return total - 1.0


def chain(n: int = 4, **changed: Any) -> tuple[torch.Tensor, ...]:
    """Return a sound chain of n sites with some arguments changed."""
    sound = {
        "diagonal": torch.zeros(n),
        "upper": torch.ones(n - 1),
        "lower": torch.ones(n - 1),
        "z": torch.tensor(0.5j),
    }
    return tuple((sound | changed).values())


REJECTIONS = (
    Rejection("no_sites", lambda: chain(1, diagonal=torch.zeros(0)), ShapeError, "N > 0"),
    Rejection("upper_too_long", lambda: chain(upper=torch.ones(4)), ShapeError, r"upper \(..., 3\) for 4 sites"),
    Rejection("lower_too_short", lambda: chain(lower=torch.ones(2)), ShapeError, r"lower \(..., 3\) for 4 sites"),
    Rejection(
        "z_per_site", lambda: chain(diagonal=torch.zeros(2, 4), z=torch.full((4,), 1j)), ShapeError, "one number"
    ),
    Rejection(
        "ids_too_short", lambda: (*chain(), torch.zeros(3, dtype=torch.int64)), ShapeError, r"segment_ids \(..., 4\)"
    ),
    Rejection("ids_of_floats", lambda: (*chain(), torch.zeros(4)), DomainError, "integer segment_ids"),
    Rejection("half", lambda: chain(diagonal=torch.zeros(4, dtype=torch.bfloat16)), DomainError, "to float32"),
    Rejection(
        "two_precisions", lambda: chain(z=torch.tensor(1j, dtype=torch.complex128)), DomainError, "one precision"
    ),
    Rejection("real_z", lambda: chain(z=torch.tensor(0.5)), DomainError, "Im z > 0"),
    Rejection("lower_half_plane", lambda: chain(z=torch.tensor(0.5 - 0.1j)), DomainError, "Im z > 0"),
    Rejection("gain", lambda: chain(diagonal=torch.full((4,), 0.1j)), DomainError, "Γ ≥ 0"),
    Rejection("unknown_backend", chain, BackendError, "expected one of auto", {"backend": "fast"}),
)
STREAM_REJECTIONS = (
    Rejection("real_state", lambda: (torch.zeros(()), torch.ones(3) * 1j, torch.ones(3)), DomainError, "complex state"),
    Rejection("no_beta", lambda: (torch.tensor(0j), torch.ones(3) * 1j, torch.ones(2)), ShapeError, "expected a state"),
)

# Eps of the largest entry of a chain. Where random signs bring a minor near zero, errors grow like 1/L².
BUDGET = Budget(forward=32.0, gradient=256.0)
CARRY = Carry(
    split=lambda example: (
        (example[0], example[1][:7], example[2][:7]),
        lambda state: (state, example[1][7:], example[2][7:]),
    ),
    join=lambda first, second: (np.concatenate([first[0], second[0]]), second[1]),
)


def pair(name: str, oracle: Any, *, inputs: Any = CHAINS, laws: tuple[Law, ...] = (), **options: Any) -> OpPair:
    """Declare a function of one chain."""
    function = name.partition(":")[0]
    return OpPair(
        name=f"tridiagonal.{name}",
        reference=getattr(reference, function),
        production=getattr(production, function),
        oracle=oracle,
        inputs=inputs,
        sizes=options.pop("sizes", SIZES),
        wrt=(0, 1, 2, 3),
        dtypes=DTYPES,
        budget=options.pop("budget", BUDGET),
        backends=options.pop("backends", BACKENDS),
        edge_sizes=EDGES,
        laws=laws,
        **options,
    )


GREEN_LAWS = (
    Law("shift", shift_law, 256.0),
    Law("gauge", gauge_law, 0.0),
    Law("causal", causal_law, 0.0),
    Law("segment", segment_law, 0.0),
)

PAIRS: tuple[OpPair, ...] = (
    pair("green", dense_green, sizes=LONG, laws=GREEN_LAWS, rejections=REJECTIONS),
    pair(
        "green:full",
        dense_green,
        sizes=LONG,
        keywords={"mode": "full"},
        laws=(Law("segment", segment_law, 0.0),),
        rejections=(Rejection("unknown_mode", chain, ConfigError, "'causal' or 'full'", {"mode": "both"}),),
    ),
    pair(
        "green:hermitian",
        dense_green,
        inputs=HERMITIAN,
        laws=(Law("ward", ward_law, 64.0),),
        keywords={"mode": "full"},
        backends=HOST_BACKENDS,
    ),
    pair("ratios", dense_ratios, rejections=REJECTIONS[:3]),
    pair(
        "ratios:hermitian",
        dense_ratios,
        inputs=HERMITIAN,
        laws=(Law("herglotz", herglotz_law, 4.0),),
        backends=HOST_BACKENDS,
    ),
    pair("log_det", dense_log_det, laws=(Law("determinant", determinant_law, 2048.0),), backends=HOST_BACKENDS),
    pair("off_diagonals", dense_off_diagonals, laws=(Law("inverse", inverse_law, 256.0),), backends=HOST_BACKENDS),
    OpPair(
        name="tridiagonal.advance",
        reference=reference.advance,
        production=production.advance,
        oracle=dense_advance,
        inputs=STREAMS,
        sizes=({"N": 3}, {"N": 40}),
        wrt=(0, 1, 2),
        dtypes=DTYPES,
        budget=BUDGET,
        backends=BACKENDS,
        edge_sizes=({"N": 1}, {"N": 2}),
        carry=CARRY,
        rejections=STREAM_REJECTIONS,
    ),
    OpPair(
        name="tridiagonal.step",
        reference=reference.step,
        production=production.step,
        oracle=dense_step,
        inputs=TOKENS,
        sizes=({},),
        wrt=(0, 1, 2),
        dtypes=DTYPES,
        budget=Budget(forward=16.0, gradient=16.0),
        rejections=(
            Rejection(
                "real_state", lambda: (torch.zeros(2), torch.ones(2) * 1j, torch.ones(2)), DomainError, "complex"
            ),
            Rejection("shapes", lambda: (torch.tensor(0j), torch.ones(2) * 1j, torch.ones(2)), ShapeError, "one shape"),
        ),
    ),
)
