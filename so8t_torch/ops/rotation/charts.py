"""Charts of SO(8): 28 numbers to a skew matrix, to a rotation, and back.

    A = Σ_{i<j} a_ij (E_ij − E_ji),   exp(A) = Σ A^k/k!,   cayley(A) = (I − A/2)⁻¹ (I + A/2)

a: coordinates, the strict upper triangle row by row; A ∈ so(8); R ∈ SO(8); ±iθ the eigenvalues of A.
Everything is computed in float64 and rounded once to the dtype that came in. The derivative of exp is its Fréchet
adjoint, ∂a = φ(ad_A)(RᵀG − GᵀR) with φ(z) = (eᶻ − 1)/z, one 8×8 product per Taylor term because [A, W] = AW − (AW)ᵀ.
Cost per block: 8 products of 8×8 for exp, 24 for its adjoint, 1 and 3 more for each halving of the norm.
Derivation: docs/math/rotation.md
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_torch.core.errors import DomainError

DEVICE_HALVINGS = 12
"""Halvings unrolled where the host must not read the norms; blocks of norm above 2¹² come out NaN there."""
EVEN_TERMS = 9
"""Taylor terms of cosh and of sinh(z)/z at norm 1: the first one dropped is 1/18! = 1.6e-16."""
ADJOINT_TERMS = 24
"""Taylor terms of φ at |ad_A| ≤ 2: the first one dropped is 2²⁴/25! = 1.1e-18."""
ROOTS, ROOT_ITERATIONS, LOG_NODES = 2, 16, 12


@functools.cache
def _indices(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each of the 64 entries finds its value in (a, −a, 0), and where each coordinate sits in 64."""
    row, column = torch.triu_indices(8, 8, offset=1)
    source = torch.full((64,), 56)
    source[row * 8 + column] = torch.arange(28)
    source[column * 8 + row] = torch.arange(28, 56)
    return source.to(device), (row * 8 + column).to(device)


def skew(coordinates: Tensor) -> Tensor:
    """Fill the strict upper triangle with the coordinates and the lower one with their negatives."""
    source, _ = _indices(coordinates.device)
    values = torch.cat([coordinates, -coordinates, torch.zeros_like(coordinates[..., :1])], dim=-1)
    return values.index_select(-1, source).unflatten(-1, (8, 8))


def unskew(matrix: Tensor) -> Tensor:
    """Read the strict upper triangle of (M − Mᵀ)/2."""
    _, upper = _indices(matrix.device)
    return ((matrix - matrix.mT) / 2).flatten(-2).index_select(-1, upper)


def halvings(A: Tensor, norm_limit: float = 1.0) -> Tensor:
    """Return per matrix how often A must be halved until its spectral norm is at most ``norm_limit``.

    The eigenvalues of a skew matrix come in pairs ±iθ, so that ‖A‖_F² = 2 Σ θ² and ‖A‖_F/√2 bounds the largest.
    """
    norm = torch.linalg.matrix_norm(A.detach()) / (math.sqrt(2) * norm_limit)
    return norm.frexp().exponent.clamp(min=0)


def halving_count(needed: Tensor) -> int:
    """Return how many halvings to unroll: the largest needed on the CPU, a constant where reading it would wait."""
    if needed.device.type == "cpu" and not isinstance(needed, torch._subclasses.FakeTensor):
        return int(needed.max()) if needed.numel() else 0
    return DEVICE_HALVINGS


def powers_of_exp(A: Tensor, needed: Tensor, count: int) -> list[Tensor]:
    """Return exp(A/2^s), and its squares up to exp(A), s per matrix; [j] is the value after at most j squarings."""
    X = torch.ldexp(A, -needed[..., None, None])
    R = _taylor(X)
    chain = [R]
    for j in range(count):
        R = torch.where((j < needed)[..., None, None], R @ R, R)
        chain.append(R)
    return chain


def _taylor(X: Tensor) -> Tensor:
    """Return Σ_{k<18} X^k/k! as cosh(X) + X·(sinh(X)/X), both polynomials in X² that share its powers."""
    identity = torch.eye(8, dtype=X.dtype, device=X.device).expand_as(X)
    B = X @ X
    B2 = B @ B
    powers = (identity, B, B2, B2 @ B)
    B4 = B2 @ B2

    def series(shift: int) -> Tensor:
        c = [1 / math.factorial(2 * k + shift) for k in range(EVEN_TERMS)]
        low = sum(ck * P for ck, P in zip(c[:4], powers, strict=True))
        high = sum(ck * P for ck, P in zip(c[4:8], powers, strict=True)) + c[8] * B4
        return low + B4 @ high

    return series(0) + X @ series(1)


def polish(R: Tensor) -> Tensor:
    """Return R(3I − RᵀR)/2, one Newton step to the nearest rotation: squarings leave 2^s·eps, this leaves eps."""
    identity = torch.eye(8, dtype=R.dtype, device=R.device)
    return R @ (1.5 * identity - 0.5 * (R.mT @ R))


def exponential(coordinates: Tensor) -> Tensor:
    """Return exp of the skew matrices, in float64 inside."""
    A = skew(coordinates.double())
    needed = halvings(A)
    R = polish(powers_of_exp(A, needed, halving_count(needed))[-1])
    return R.to(coordinates.dtype)


def exponential_adjoint(coordinates: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient with respect to the coordinates, given the one with respect to exp."""
    A = skew(coordinates.double())
    needed = halvings(A)
    chain = powers_of_exp(A, needed, halving_count(needed))
    M = chain[-1].mT @ grad.double()
    X = torch.ldexp(A, -needed[..., None, None])
    W = M - M.mT
    total = W
    for k in range(2, ADJOINT_TERMS + 1):
        P = X @ W
        W = (P - P.mT) / k
        total = total + W
    for j, R in enumerate(chain[:-1]):
        doubled = (total + R @ total @ R.mT) / 2
        total = torch.where((j < needed)[..., None, None], doubled, total)
    return unskew(total).to(coordinates.dtype)


def cayley(coordinates: Tensor) -> Tensor:
    """Return (I − A/2)⁻¹(I + A/2); I − A/2 is never singular, so the solver's check is skipped."""
    half = skew(coordinates.double()) / 2
    identity = torch.eye(8, dtype=half.dtype, device=half.device)
    R, _ = torch.linalg.solve_ex(identity - half, identity + half)
    return R.to(coordinates.dtype)


def _square_root(R: Tensor) -> Tensor:
    """Return the principal square root by the Denman–Beavers iteration, quadratic away from eigenvalue −1."""
    Y, Z = R, torch.eye(8, dtype=R.dtype, device=R.device).expand_as(R)
    for _ in range(ROOT_ITERATIONS):
        Y, Z = (Y + torch.linalg.inv_ex(Z)[0]) / 2, (Z + torch.linalg.inv_ex(Y)[0]) / 2
    return Y


def logarithm(rotation: Float[Tensor, "*batch 8 8"], cut_margin: float) -> Float[Tensor, "*batch 28"]:
    """Return the principal logarithm: two square roots, then ∫₀¹ (R − I)(I + t(R − I))⁻¹ dt by Gauss–Legendre."""
    R = rotation.double()
    identity = torch.eye(8, dtype=R.dtype, device=R.device)
    _refuse_cut(R.detach() + identity, cut_margin)
    for _ in range(ROOTS):
        R = _square_root(R)
    E = R - identity
    nodes, weights = _gauss_legendre()
    total = sum(w * torch.linalg.solve_ex(identity + t * E, E)[0] for t, w in zip(nodes, weights, strict=True))
    return unskew(2**ROOTS * total).to(rotation.dtype)


@functools.cache
def _gauss_legendre() -> tuple[tuple[float, ...], tuple[float, ...]]:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(LOG_NODES)
    return tuple((nodes + 1) / 2), tuple(weights / 2)


def _refuse_cut(shifted: Tensor, cut_margin: float) -> None:
    """Raise where the smallest singular value of R + I, 2·cos(θ/2), says that an angle is within the margin of π."""
    smallest = torch.linalg.svdvals(shifted)[..., -1]
    nearest = float(smallest.min()) if smallest.numel() else math.inf
    if not nearest > 2 * math.sin(cut_margin / 2):
        raise DomainError(
            f"logarithm: expected every rotation angle at least cut_margin = {cut_margin:g} rad below π, where the "
            f"principal logarithm is unique; the nearest is {2 * math.asin(min(nearest / 2, 1.0)):.3g} rad from π. "
            "Keep the coordinates instead of recovering them, or compose with a small rotation first."
        )
