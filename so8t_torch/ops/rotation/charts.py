"""Charts of SO(8): 28 numbers to a skew matrix, to a rotation, and back.

    A = Σ_{i<j} a_ij (E_ij − E_ji),   exp(A) = Σ A^k/k!,   cayley(A) = (I − A/2)⁻¹ (I + A/2)

a: coordinates, the strict upper triangle row by row; A ∈ so(8); R ∈ SO(8); ±iθ the eigenvalues of A.
Everything is computed in float64 and rounded once to the dtype that came in. The gradient of exp is its Fréchet
derivative L(Aᵀ, G) = L(−A, G) = ∫₀¹ e^{−sA} G e^{−(1−s)A} ds, by the product rule along the series for e^{−A}.
Cost per block: 4 to 6 products of 8×8 for exp, 11 to 17 for its gradient, 1 and 3 more for each halving of the norm.
Derivation: docs/math/rotation.md
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from so8t_torch.core.errors import DomainError

NORM_LIMIT = 0.5
"""Blocks are halved until |a| ≤ 1/2; the Taylor degrees below are chosen for that norm."""
DEVICE_HALVINGS = 13
"""Halvings unrolled where the host must not wait for the norms: a block with |a| > 2¹² comes out NaN there."""
UNKNOWN_RANGE = (0, DEVICE_HALVINGS)
FAR_FROM_ROTATION = 0.5
"""max |RᵀR − I| from which the logarithm is refused: it continues off the group, but not to singular matrices."""
SERIES_DEGREE = {torch.float64: 15, torch.float32: 9}
"""Degree of Taylor's polynomial: the first term dropped is 7e-19, and 3e-10 for a float32 answer.

In the gradient it is 2e-17 and 5e-9.
"""
ROOTS, ROOT_ITERATIONS = 2, 16
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)
LOG_RULE = tuple((float((t + 1) / 2), float(w / 2)) for t, w in zip(_NODES, _WEIGHTS, strict=True))
"""Gauss–Legendre nodes and weights on (0, 1)."""


@functools.cache
def _build_layout(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each of the 64 entries finds its value in (a, −a, 0), and where each coordinate sits in 64."""
    row, column = torch.triu_indices(8, 8, offset=1)
    source = torch.full((64,), 56)
    source[row * 8 + column] = torch.arange(28)
    source[column * 8 + row] = torch.arange(28, 56)
    return source.to(device), (row * 8 + column).to(device)


@torch.compiler.assume_constant_result
def _layout(device: torch.device) -> tuple[Tensor, Tensor]:
    return _build_layout(device)


@functools.cache
def _basis(device: torch.device) -> Tensor:
    """Return the 28 matrices E_ij − E_ji, flattened, as the rows of one matrix."""
    return skew(torch.eye(28, dtype=torch.float64, device=device)).flatten(1)


def skew(coordinates: Tensor) -> Tensor:
    """Fill the strict upper triangle with the coordinates and the lower one with their negatives."""
    source, _ = _layout(coordinates.device)
    values = torch.cat([coordinates, -coordinates, torch.zeros_like(coordinates[..., :1])], dim=-1)
    return values.index_select(-1, source).unflatten(-1, (8, 8))


def unskew(matrix: Tensor) -> Tensor:
    """Read the strict upper triangle of (M − Mᵀ)/2."""
    return _upper((matrix - matrix.mT) / 2)


def _upper(matrix: Tensor) -> Tensor:
    _, upper = _layout(matrix.device)
    return matrix.flatten(-2).index_select(-1, upper)


@dataclass(frozen=True)
class _Scaled:
    """Generators brought under the norm limit, and how to undo that."""

    X: Tensor
    scale: Tensor
    needed: Tensor
    least: int
    most: int
    answer: torch.dtype

    def double(
        self, j: int, step: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Take the step for the blocks that still need their j-th doubling, and keep the tensors of the others."""
        if j < self.least:
            return step(*tensors, *others)
        needed = self.needed > j
        if (self.least, self.most) == UNKNOWN_RANGE:
            taken = step(*tensors, *others)
            return tuple(torch.where(needed[:, None, None], a, b) for a, b in zip(taken, tensors, strict=True))
        blocks, kept = needed.nonzero().squeeze(1), (~needed).nonzero().squeeze(1)
        if len(kept) < len(blocks):
            taken = step(*tensors, *others)
            return tuple(a.index_copy_(0, kept, b.index_select(0, kept)) for a, b in zip(taken, tensors, strict=True))
        taken = step(*(tensor.index_select(0, blocks) for tensor in (*tensors, *others)))
        return tuple(b.index_copy(0, blocks, a) for a, b in zip(taken, tensors, strict=True))


def _generators(coordinates: Tensor, sign: float = 1.0) -> _Scaled:
    """Return ±A (n, 8, 8) halved to the norm limit.

    The eigenvalues of A come in pairs ±iθ, so that |a|² = ‖A‖_F²/2 = Σ θ² bounds the largest angle.
    """
    a = coordinates.reshape(-1, 28).double()
    needed = (torch.linalg.vector_norm(a.detach(), dim=-1) / NORM_LIMIT).frexp().exponent.clamp(min=0)
    least, most = _range(needed) if needed.device.type == "cpu" else UNKNOWN_RANGE
    # torch.ldexp differentiates wrongly with respect to its first argument when the exponent is an integer tensor
    scale = torch.ldexp(torch.full_like(needed, sign, dtype=a.dtype), -needed)
    scale = scale.masked_fill(needed > most, torch.nan)
    X = ((a * scale[:, None]) @ _basis(a.device)).view(-1, 8, 8)
    # so many doublings would lift what the short series drops above the rounding of a float32 answer
    exact = coordinates.dtype == torch.float64 or most > DEVICE_HALVINGS
    answer = torch.float64 if exact else torch.float32
    return _Scaled(X, scale, needed, least, most, answer)


def _range(needed: Tensor) -> tuple[int, int]:
    """Return the fewest and the most halvings that any block needs."""
    return (int(needed.min()), int(needed.max())) if needed.numel() else (0, 0)


def _series(X: Tensor, degree: int) -> Tensor:
    """Return Σ_{k≤degree} X^k/k! in degree/3 + 1 products (Paterson and Stockmeyer).

    t_k = I/k! + X/(k+1)! + X²/(k+2)! + X³ t_{k+3} from t_degree = I/degree! down to t₀ = exp X.
    """
    identity = torch.eye(8, dtype=X.dtype, device=X.device)
    X2 = torch.bmm(X, X)
    X3 = torch.bmm(X2, X)
    total = _three_terms(identity, X, X2, degree - 3).add_(X3, alpha=1 / math.factorial(degree))
    for k in range(degree - 6, -1, -3):
        total = _three_terms(identity, X, X2, k).baddbmm_(X3, total)
    return total


def _three_terms(identity: Tensor, X: Tensor, X2: Tensor, k: int) -> Tensor:
    """Return I/k! + X/(k+1)! + X²/(k+2)!."""
    return torch.add(identity / math.factorial(k), X, alpha=1 / math.factorial(k + 1)).add_(
        X2, alpha=1 / math.factorial(k + 2)
    )


def _series_and_derivative(X: Tensor, dX: Tensor, degree: int, alone: bool) -> tuple[Tensor, Tensor]:
    """Return the series and its derivative along dX, by the product rule on every product of ``_series``.

    ``alone`` says that the derivative alone is wanted; the first tensor is then of no use.
    """
    identity = torch.eye(8, dtype=X.dtype, device=X.device)
    X2, dX2 = _square_and_derivative(X, dX)
    X3, dX3 = torch.bmm(X2, X), torch.bmm(X2, dX).baddbmm_(dX2, X)
    share = 1 / math.factorial(degree)
    total, dtotal = _three_terms(identity, X, X2, degree - 3).add_(X3, alpha=share), _two_terms(dX, dX2, degree - 3)
    dtotal = dtotal.add_(dX3, alpha=share)
    for k in range(degree - 6, -1, -3):
        dtotal = _two_terms(dX, dX2, k).baddbmm_(dX3, total).baddbmm_(X3, dtotal)
        if k or not alone:
            total = _three_terms(identity, X, X2, k).baddbmm_(X3, total)
    return total, dtotal


def _two_terms(dX: Tensor, dX2: Tensor, k: int) -> Tensor:
    """Return dX/(k+1)! + d(X²)/(k+2)!."""
    return (dX / math.factorial(k + 1)).add_(dX2, alpha=1 / math.factorial(k + 2))


def _square(R: Tensor) -> tuple[Tensor]:
    return (torch.bmm(R, R),)


def _square_and_derivative(R: Tensor, dR: Tensor) -> tuple[Tensor, Tensor]:
    return torch.bmm(R, R), *_derivative_of_square(dR, R)


def _derivative_of_square(dR: Tensor, R: Tensor) -> tuple[Tensor]:
    return (torch.bmm(R, dR).baddbmm_(dR, R),)


def exponential(coordinates: Tensor) -> Tensor:
    """Return exp of the skew matrices.

    Squaring s times leaves an orthogonality error of 2^s eps, nothing to a float32 answer; for a float64 one a Newton
    step R (3I − RᵀR)/2 brings it back to eps.
    """
    scaled = _generators(coordinates)
    R = _series(scaled.X, SERIES_DEGREE[scaled.answer])
    for j in range(scaled.most):
        (R,) = scaled.double(j, _square, (R,))
    if scaled.most and scaled.answer == torch.float64:
        (R,) = scaled.double(0, _polish, (R,))
    return R.view(*coordinates.shape[:-1], 8, 8).to(coordinates.dtype)


def _polish(R: Tensor) -> tuple[Tensor]:
    identity = torch.eye(8, dtype=R.dtype, device=R.device).expand_as(R)
    return (torch.bmm(R, torch.baddbmm(identity, R.mT, R, beta=1.5, alpha=-0.5)),)


def exponential_adjoint(coordinates: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient with respect to the coordinates, given the one with respect to exp.

    At X = −A/2^s the series and its derivative along G/2^s, then (R, dR) → (R², R dR + dR R) once per halving.
    """
    scaled = _generators(coordinates, sign=-1.0)
    G = grad.reshape(-1, 8, 8) * scaled.scale.abs()[:, None, None]
    R, dR = _series_and_derivative(scaled.X, G, SERIES_DEGREE[scaled.answer], alone=scaled.most == 0)
    for j in range(scaled.most - 1):
        R, dR = scaled.double(j, _square_and_derivative, (R, dR))
    if scaled.most:
        # the last square itself is not needed
        (dR,) = scaled.double(scaled.most - 1, _derivative_of_square, (dR,), R)
    return _upper(dR - dR.mT).view(coordinates.shape).to(coordinates.dtype)


def cayley(coordinates: Tensor) -> Tensor:
    """Return (I − A/2)⁻¹ (I + A/2); I − A/2 is never singular, so that the solver need not report to the host."""
    half = skew(coordinates.double()) / 2
    identity = torch.eye(8, dtype=half.dtype, device=half.device)
    R, _ = torch.linalg.solve_ex(identity - half, identity + half)
    return R.to(coordinates.dtype)


def logarithm(rotation: Tensor) -> Tensor:
    """Return the principal logarithm: two square roots, then ∫₀¹ (R − I)(I + t(R − I))⁻¹ dt by Gauss–Legendre."""
    R = rotation.double()
    identity = torch.eye(8, dtype=R.dtype, device=R.device)
    for _ in range(ROOTS):
        R = _square_root(R)
    E = R - identity
    log = torch.zeros_like(R)
    for t, weight in LOG_RULE:
        log = log + weight * torch.linalg.solve_ex(identity + t * E, E)[0]
    return unskew(2**ROOTS * log).to(rotation.dtype)


def _square_root(R: Tensor) -> Tensor:
    """Return the principal square root by the Denman–Beavers iteration, quadratic away from eigenvalue −1."""
    Y, Z = R, torch.eye(8, dtype=R.dtype, device=R.device).expand_as(R)
    for _ in range(ROOT_ITERATIONS):
        Y, Z = (Y + torch.linalg.inv_ex(Z)[0]) / 2, (Z + torch.linalg.inv_ex(Y)[0]) / 2
    return Y


def away_from_cut(rotation: Tensor, cut_margin: float) -> Tensor:
    """Return a copy of the rotations, all of whose angles are at least the margin below π.

    The smallest singular value of R + I is 2 cos(θ/2) at the largest angle θ. Reading it synchronises a device.
    """
    R = rotation.detach().double()
    if not bool(R.isfinite().all()):
        raise DomainError("logarithm: expected finite rotations, got NaN or infinity; find out where it came from.")
    if not cut_margin > 0:
        raise DomainError(f"logarithm: expected cut_margin > 0, got {cut_margin}; at π the logarithm is not unique.")
    identity = torch.eye(8, dtype=R.dtype, device=R.device)
    defect = float((R.mT @ R - identity).abs().max()) if R.numel() else 0.0
    if defect > FAR_FROM_ROTATION:
        raise DomainError(f"logarithm: expected rotations, got a matrix with max |RᵀR − I| = {defect:.3g}.")
    singular = torch.linalg.svdvals(R + identity)
    nearest = float(singular.min()) if singular.numel() else 2.0
    if nearest <= 2 * math.sin(cut_margin / 2):
        raise DomainError(
            f"logarithm: expected every rotation angle at least cut_margin = {cut_margin:g} rad below π, where the "
            f"principal logarithm is unique; the nearest is {2 * math.asin(min(nearest / 2, 1.0)):.3g} rad below. "
            "Keep the coordinates instead of recovering them, or compose with a small rotation first."
        )
    return rotation.clone()
