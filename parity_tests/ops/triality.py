"""Declarations of the room ``triality``: octonions as pairs of quaternions and so(8) = L ⊕ R ⊕ g₂ judge it."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection, Size
from so8t_jax.ops import triality as reference
from so8t_torch.core.errors import ShapeError
from so8t_torch.ops import triality as production

UPPER = np.triu_indices(8, 1)
CONJUGATION = np.diag([1.0] + [-1.0] * 7)


def quaternion_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Hamilton product of two quaternions (real part first)."""
    real = a[0] * b[0] - a[1:] @ b[1:]
    return np.concatenate([[real], a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])])


def conjugated(a: np.ndarray) -> np.ndarray:
    """Return the quaternion with its imaginary part reversed."""
    return a * np.array([1.0, -1.0, -1.0, -1.0])


def doubled_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the octonion product by doubling: (a, b)(c, d) = (ac − d̄b, da + bc̄).

    The quaternions are 1, e₁, e₂, e₄ = e₁e₂; the second half is multiplied by e₃ from the right, which gives
    e₃, e₁e₃ = e₇, e₂e₃ = e₅ and e₄e₃ = −e₆.
    """
    order, sign = [0, 1, 2, 4, 3, 7, 5, 6], np.array([1.0, 1, 1, 1, 1, 1, 1, -1])
    (a, b), (c, d) = ((v[order] * sign).reshape(2, 4) for v in (x, y))
    first = quaternion_product(a, c) - quaternion_product(conjugated(d), b)
    second = quaternion_product(d, a) + quaternion_product(b, conjugated(c))
    result = np.empty(8)
    result[order] = np.concatenate([first, second]) * sign
    return result


def multiplications(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrices of x ↦ ux and of x ↦ xu."""
    unit = np.eye(8)
    left = np.stack([doubled_product(u, e) for e in unit], axis=1)
    return left, np.stack([doubled_product(e, u) for e in unit], axis=1)


def skew_matrix(coordinates: np.ndarray) -> np.ndarray:
    """Return the skew matrix of 28 coordinates."""
    matrix = np.zeros((8, 8))
    matrix[UPPER] = coordinates
    return matrix - matrix.T


def companions(coordinates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return B and C of A(xy) = (Bx)y + x(Cy), from the decomposition A = L_p + R_q + D with D a derivation.

    A derivation is its own companion, L_u has (L_u + R_u, −L_u) and R_u has (−R_u, L_u + R_u). With ⟨L_u, L_u⟩ = 8,
    ⟨L_u, R_u⟩ = −4 and D orthogonal to both, p and q follow from 2×2 systems; then B = A − R_{2q−p}, C = A − L_{2p−q}.
    """
    a = skew_matrix(coordinates)
    p, q = np.zeros(8), np.zeros(8)
    for k in range(1, 8):
        left, right = multiplications(np.eye(8)[k])
        p[k], q[k] = np.linalg.solve([[8.0, -4.0], [-4.0, 8.0]], [(a * left).sum(), (a * right).sum()])
    return a - multiplications(2.0 * q - p)[1], a - multiplications(2.0 * p - q)[0]


def left_by_decomposition(coordinates: np.ndarray) -> np.ndarray:
    """Return the coordinates of B."""
    return companions(coordinates)[0][UPPER]


def right_by_decomposition(coordinates: np.ndarray) -> np.ndarray:
    """Return the coordinates of C."""
    return companions(coordinates)[1][UPPER]


def exponentials(coordinates: np.ndarray) -> np.ndarray:
    """Return exp(A), exp(B), exp(C) through the eigenvectors of the Hermitian matrices iA, iB, iC."""
    angles, vectors = np.linalg.eigh(1j * np.stack([skew_matrix(coordinates), *companions(coordinates)]))
    return np.asarray((vectors * np.exp(-1j * angles)[:, None, :] @ vectors.conj().mT).real)


def dense_apply(coordinates: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return M x with M the explicit block-diagonal matrix of all channels."""
    return scipy.linalg.block_diag(*(block for row in coordinates for block in exponentials(row))) @ x


def octonions(*, count: int) -> dict[str, Any]:
    """Return strategies that draw some octonions."""

    def generic(generator: np.random.Generator, _: Size) -> Example:
        return tuple(generator.standard_normal((count, 8)))

    def uneven(generator: np.random.Generator, _: Size) -> Example:
        return tuple(generator.standard_normal((count, 8)) * np.logspace(-2, 2, 8))

    return {"generic": generic, "uneven": uneven}


def algebra_elements() -> dict[str, Any]:
    """Return strategies that draw one element of so(8): generic, tiny, a full turn in one plane, far from zero."""
    return {
        "generic": lambda generator, _: (generator.standard_normal(28),),
        "tiny": lambda generator, _: (1e-6 * generator.standard_normal(28),),
        "full_turn": lambda generator, _: (2.0 * np.pi * np.eye(28)[generator.integers(28)],),
        "far": lambda generator, _: (4.0 * generator.standard_normal(28),),
    }


def blocks(scale: float) -> Any:
    """Return a strategy that draws n elements of so(8) and 24 n channels."""

    def strategy(generator: np.random.Generator, size: Size) -> Example:
        return scale * generator.standard_normal((size["n"], 28)), generator.standard_normal(24 * size["n"])

    return strategy


def bracket_law(f: Any, example: Example) -> np.ndarray:
    """[LX, LY] = L[X, Y]."""
    x, y = example[0], np.roll(example[0], 5) + 1.0
    commutator = _commutator(x, y)
    size = 1.0 + np.abs(x).max() * np.abs(y).max()
    return np.asarray(_commutator(np.asarray(f(x)), np.asarray(f(y))) - np.asarray(f(commutator))) / size


def _commutator(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = skew_matrix(x), skew_matrix(y)
    return (a @ b - b @ a)[UPPER]


def order_two_law(f: Any, example: Example) -> np.ndarray:
    """L(LA) = A."""
    return np.asarray(np.asarray(f(np.asarray(f(example[0])))) - example[0]) / max(1.0, np.abs(example[0]).max())


def order_three_law(f: Any, example: Example) -> np.ndarray:
    """With K A = J A J, J octonion conjugation, (K L)³ A = A, while K L A ≠ A in general."""
    turned = example[0]
    for _ in range(3):
        turned = (CONJUGATION @ skew_matrix(np.asarray(f(turned))) @ CONJUGATION)[UPPER]
    return np.asarray(turned - example[0]) / max(1.0, np.abs(example[0]).max())


def norm_law(f: Any, example: Example) -> np.ndarray:
    """|xy| = |x| |y|."""
    x, y = example
    size = np.linalg.norm(x) * np.linalg.norm(y)
    return np.asarray(np.linalg.norm(np.asarray(f(x, y))) / size - 1.0)


def alternative_law(f: Any, example: Example) -> np.ndarray:
    """x(xy) = (xx)y."""
    x, y = example
    once = np.asarray(f(x, np.asarray(f(x, y)))) - np.asarray(f(np.asarray(f(x, x)), y))
    return once / (np.linalg.norm(x) ** 2 * np.linalg.norm(y))


def rule_law(f: Any, _: Example) -> np.ndarray:
    """e_i e_{i+1} = e_{i+3}, indices mod 7."""
    unit = np.eye(8)
    found = [np.asarray(f(unit[1 + i], unit[1 + (i + 1) % 7])) - unit[1 + (i + 3) % 7] for i in range(7)]
    return np.asarray(found)


def triality_law(f: Any, example: Example) -> np.ndarray:
    """g(xy) = (g₊x)(g₋y)."""
    g, plus, minus = np.asarray(f(example[0]))
    x, y = np.sin(np.arange(8) + 1.0), np.cos(3.0 * np.arange(8))
    whole = g @ doubled_product(x, y) - doubled_product(plus @ x, minus @ y)
    return np.asarray(whole / (np.linalg.norm(x) * np.linalg.norm(y)))


def full_turn_law(f: Any, example: Example) -> np.ndarray:
    """A turn by 2π in a coordinate plane is +1 on V and −1 on both spinors."""
    plane = int(np.argmax(np.abs(example[0])))
    found = np.asarray(f(2.0 * np.pi * np.eye(28)[plane]))
    return np.asarray(found - np.array([1.0, -1.0, -1.0])[:, None, None] * np.eye(8))


def weights_law(f: Any, example: Example) -> np.ndarray:
    """With angles θ on V, the spinors turn by (±θ₁ ± θ₂ ± θ₃ ± θ₄)/2, one with even and one with odd signs."""
    found = np.asarray(f(example[0]))
    angles = np.sort(scipy.linalg.eigvals(skew_matrix(example[0])).imag)[4:]
    signs = np.array(np.meshgrid(*[[1.0, -1.0]] * 4)).reshape(4, 16)
    half = 0.5 * angles @ signs
    expected = [np.cos(half[signs.prod(0) == parity]).sum() for parity in (1.0, -1.0)]
    traces = [np.trace(found[0]), *(np.trace(spinor) for spinor in found[1:])]
    # Which spinor is even depends on the orientation of the angles, the pair of characters does not.
    return np.asarray([traces[0] - 2.0 * np.cos(angles).sum(), *(np.sort(traces[1:]) - np.sort(expected))]) / max(
        1.0, np.abs(angles).max()
    )


def form_law(f: Any, example: Example) -> np.ndarray:
    """⟨v, s₊ s₋⟩ is the same before and after, block by block, relative to |v| |s₊| |s₋|."""
    before, after = (np.asarray(v).reshape(-1, 3, 8) for v in (example[1], f(*example)))
    forms = [np.asarray([b[0] @ doubled_product(b[1], b[2]) for b in side]) for side in (before, after)]
    return np.asarray((forms[1] - forms[0]) / np.linalg.norm(before, axis=2).prod(1))


# Against 40-digit arithmetic production's exponential is within 20 eps at these norms, the definition's too but for
# its scaling thresholds, where its Padé quotient loses up to 400 eps. Below float64 one rounding remains.
EXPONENTIAL = Budget(
    forward={"float64": 1000.0, "float32": 1.0, "bfloat16": 1.0, "float16": 1.0},
    gradient={"float64": 2000.0, "float32": 2.0, "bfloat16": 1.0, "float16": 1.0},
)
# The same, then sums of eight products in float32.
APPLIED = Budget(
    forward={"float64": 1000.0, "float32": 8.0, "bfloat16": 8.0, "float16": 8.0},
    gradient={"float64": 2000.0, "float32": 32.0, "bfloat16": 32.0, "float16": 32.0},
)


def spinor_pair(side: str, oracle: Any) -> OpPair:
    """Declare ``left_spinor`` or ``right_spinor``."""
    name = f"{side}_spinor"
    return OpPair(
        name=f"triality.{name}",
        reference=getattr(reference, name),
        production=getattr(production, name),
        oracle=oracle,
        inputs=algebra_elements(),
        sizes=({},),
        wrt=(0,),
        # Rows of L± hold four entries ±1/2; the oracle solves and sums over eight channels.
        budget=Budget(forward=32.0, gradient=32.0),
        laws=(
            Law("homomorphism", bracket_law, 64.0),
            Law("order_two", order_two_law, 16.0),
            Law("order_three", order_three_law, 16.0),
        ),
        rejections=(Rejection("width", lambda: (torch.zeros(2, 27),), ShapeError, "last axis of 28"),),
    )


PAIRS: tuple[OpPair, ...] = (
    OpPair(
        name="triality.octonion_product",
        reference=reference.octonion_product,
        production=production.octonion_product,
        oracle=doubled_product,
        inputs=octonions(count=2),
        sizes=({},),
        wrt=(0, 1),
        budget=Budget(forward=16.0, gradient=16.0),
        laws=(Law("norm", norm_law, 16.0), Law("alternative", alternative_law, 32.0), Law("rule", rule_law, 0.0)),
        rejections=(
            Rejection("left", lambda: (torch.zeros(7), torch.zeros(8)), ShapeError, "last axis of 8"),
            Rejection("right", lambda: (torch.zeros(8), torch.zeros(7)), ShapeError, "last axis of 8"),
        ),
    ),
    OpPair(
        name="triality.octonion_conjugate",
        reference=reference.octonion_conjugate,
        production=production.octonion_conjugate,
        oracle=lambda x: CONJUGATION @ x,
        inputs=octonions(count=1),
        sizes=({},),
        wrt=(0,),
        budget=Budget(forward=0.0, gradient=0.0),
        rejections=(Rejection("width", lambda: (torch.zeros(9),), ShapeError, "last axis of 8"),),
    ),
    spinor_pair("left", left_by_decomposition),
    spinor_pair("right", right_by_decomposition),
    OpPair(
        name="triality.representations",
        reference=reference.representations,
        production=production.representations,
        oracle=exponentials,
        inputs=algebra_elements(),
        sizes=({},),
        wrt=(0,),
        budget=EXPONENTIAL,
        laws=(
            Law("triality", triality_law, 2048.0),
            Law("full_turn", full_turn_law, 512.0),
            Law("weights", weights_law, 4096.0),
        ),
        rejections=(Rejection("width", lambda: (torch.zeros(2, 27),), ShapeError, "last axis of 28"),),
    ),
    OpPair(
        name="triality.apply",
        reference=reference.apply,
        production=production.apply,
        oracle=dense_apply,
        inputs={"generic": blocks(1.0), "tiny": blocks(1e-6), "far": blocks(4.0)},
        sizes=({"n": 1}, {"n": 3}),
        shared=(0,),
        masters=(0,),
        wrt=(0, 1),
        budget=APPLIED,
        laws=(Law("trilinear_form", form_law, 2048.0),),
        rejections=(
            Rejection("width", lambda: (torch.zeros(2, 28), torch.zeros(24)), ShapeError, "one row of coordinates"),
            Rejection("coordinates", lambda: (torch.zeros(28), torch.zeros(24)), ShapeError, r"\(n, 28\)"),
        ),
    ),
)
