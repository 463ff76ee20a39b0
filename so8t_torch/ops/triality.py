"""The three eight-dimensional representations of Spin(8), by octonions.

    A(xy) = (B x) y + x (C y)   for all octonions x, y      L₊: A ↦ B,   L₋: A ↦ C
    g(xy) = (g₊x)(g₋y)          g = exp A,  g₊ = exp(L₊A),  g₋ = exp(L₋A)

Symbols: xy is the octonion product on ℝ⁸ = span(1, e₁ … e₇) with e_i e_{i+1} = e_{i+3} (indices mod 7); A, B, C are
skew, each given by 28 coordinates (strict upper triangle, row-major). L₊ and L₋ are built in closed form: let
l_u, r_u be left and right multiplication by the imaginary unit u. Alternativity gives

    u(xy) = (ux + xu) y − x (uy),   that is   L₊ l_u = l_u + r_u,   L₋ l_u = −l_u,

and the 7 matrices l_u with the 21 commutators [l_u, l_v]/2 are an orthogonal basis of so(8), on which L₊ and L₋
follow because they are homomorphisms. All entries are exact halves.
Cost: 2·28² products and three exponentials per element. Derivation: docs/math/triality.md.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_torch.core.errors import DomainError, ShapeError
from so8t_torch.core.tensors import expect_tensors
from so8t_torch.ops import rotation

__all__ = [
    "apply",
    "left_spinor",
    "octonion_conjugate",
    "octonion_product",
    "representations",
    "right_spinor",
]


def _left_multiplications() -> Tensor:
    """Return l (8, 8, 8) with l[i] the matrix of x ↦ e_i x."""
    left = torch.zeros(8, 8, 8, dtype=torch.float64)
    left[0] = torch.eye(8, dtype=torch.float64)
    for i in range(7):
        a, b, c = 1 + i, 1 + (i + 1) % 7, 1 + (i + 3) % 7
        left[a, a, 0], left[a, 0, a] = 1.0, -1.0
        for u, v, w in ((a, b, c), (b, c, a), (c, a, b)):
            left[u, w, v], left[u, v, w] = 1.0, -1.0
    return left


def _span(units: Tensor) -> Tensor:
    """Return 28 coordinates each of the seven matrices u and of their 21 commutators [u, v]/2."""
    pairs = itertools.combinations(units, 2)
    matrices = torch.stack([*units, *((u @ v - v @ u) / 2 for u, v in pairs)])
    rows, columns = torch.triu_indices(8, 8, 1)
    return matrices[:, rows, columns]


def _homomorphisms(left: Tensor) -> tuple[Tensor, Tensor]:
    """Return L₊ and L₋ (28, 28) from their values on an orthogonal basis whose elements have squared norm 4."""
    left_units, right_units = left[1:], left.permute(2, 1, 0)[1:]
    source = _span(left_units) / 4
    return _span(left_units + right_units).T @ source, _span(-left_units).T @ source


_PRODUCT = _left_multiplications()
_LEFT, _RIGHT = _homomorphisms(_PRODUCT)


def octonion_product(x: Float[Tensor, "*batch 8"], y: Float[Tensor, "*batch 8"]) -> Float[Tensor, "*batch 8"]:
    """Return the octonion product xy.

    Args:
        x: coefficients of 1, e₁ … e₇.
        y: the same.

    Returns:
        Coefficients of xy. Neither commutative nor associative; |xy| = |x| |y|.

    Raises:
        ShapeError: the last axis of an argument is not 8.
        DomainError: the dtype is not real floating.

    Numerics: sums of eight products, carried in float64 and rounded once.
    Source: J. Baez, "The octonions", Bull. Amer. Math. Soc. 39 (2002), section 2.
    """
    _expect_last("octonion_product", 8, x=x, y=y)
    table = _PRODUCT.to(x.device)
    return torch.einsum("ikj,...i,...j->...k", table, x.double(), y.double()).to(x.dtype)


def octonion_conjugate(x: Float[Tensor, "*batch 8"]) -> Float[Tensor, "*batch 8"]:
    """Return x̄: the imaginary coefficients change sign, so that x x̄ = |x|².

    Raises:
        ShapeError: the last axis is not 8.
        DomainError: the dtype is not real floating.
    """
    _expect_last("octonion_conjugate", 8, x=x)
    return torch.cat([x[..., :1], -x[..., 1:]], dim=-1)


def left_spinor(coordinates: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 28"]:
    """Return L₊A, the generator that acts on the left factor: A(xy) = (L₊A x) y + x (L₋A y).

    Args:
        coordinates: A, strict upper triangle, row-major, in radians.

    Returns:
        Coordinates of L₊A, in the same order.

    Raises:
        ShapeError: the last axis is not 28.
        DomainError: the dtype is not real floating.
    """
    return _spinor(coordinates, _LEFT, "left_spinor")


def right_spinor(coordinates: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 28"]:
    """Return L₋A, the generator that acts on the right factor: A(xy) = (L₊A x) y + x (L₋A y).

    Args:
        coordinates: A, strict upper triangle, row-major, in radians.

    Returns:
        Coordinates of L₋A, in the same order.

    Raises:
        ShapeError: the last axis is not 28.
        DomainError: the dtype is not real floating.
    """
    return _spinor(coordinates, _RIGHT, "right_spinor")


def representations(coordinates: Float[Tensor, "*batch 28"]) -> Float[Tensor, "*batch 3 8 8"]:
    """Return one element of Spin(8) in its three representations: exp(A), exp(L₊A), exp(L₋A).

    Args:
        coordinates: A, strict upper triangle, row-major, in radians.

    Returns:
        Rotations of V, S₊ and S₋, in this order. A turn by 2π in a coordinate plane is +1 on V and −1 on S₊, S₋.

    Raises:
        ShapeError: the last axis is not 28.
        DomainError: the dtype is not real floating.

    Numerics: computed in float64 and rounded once, so the three stay one group element whatever the dtype.
    """
    _expect_last("representations", 28, coordinates=coordinates)
    vector = coordinates.double()
    generators = torch.stack([vector, left_spinor(vector), right_spinor(vector)], dim=-2)
    return rotation.exponential(generators).to(coordinates.dtype)


def apply(
    coordinates: Float[Tensor, "n 28"], x: Float[Tensor, "*batch d"], *, backend: str = "auto"
) -> Float[Tensor, "*batch d"]:
    """Rotate every block of 24 channels, a vector and two spinors, by one element of Spin(8).

    Args:
        coordinates: one element of so(8) per block.
        x: d = 24 n channels; block k holds v, s₊, s₋ of eight channels each.
        backend: passed to ``rotation.apply``.

    Returns:
        (g v, g₊ s₊, g₋ s₋) per block: the trilinear form ⟨v, s₊ s₋⟩ is unchanged.

    Raises:
        ShapeError: x is not 24 channels wide per row of coordinates.
        DomainError: the dtype of the coordinates is not real floating.
        BackendError: the backend cannot run this call.
    """
    expect_tensors("triality.apply", coordinates=coordinates, x=x)
    if coordinates.ndim != 2 or coordinates.shape[-1] != 28 or x.shape[-1:] != (24 * coordinates.shape[0],):
        raise ShapeError(
            f"triality.apply: expected coordinates (n, 28) and x (..., 24 n), got {tuple(coordinates.shape)} "
            f"and {tuple(x.shape)}; give one row of coordinates per 24 channels."
        )
    return rotation.apply(representations(coordinates).flatten(0, 1), x, backend=backend)


def _spinor(coordinates: Tensor, constant: Tensor, name: str) -> Tensor:
    """Return constant · coordinates, carried in float64 and rounded once."""
    _expect_last(name, 28, coordinates=coordinates)
    return (coordinates.double() @ constant.T.to(coordinates.device)).to(coordinates.dtype)


def _expect_last(op: str, size: int, **given: Tensor) -> None:
    """Raise unless the last axes have the given size and the dtypes are real floating, as results keep the dtype."""
    expect_tensors(f"triality.{op}", **given)
    for x in given.values():
        if x.ndim == 0 or x.shape[-1] != size:
            raise ShapeError(f"triality.{op}: expected a last axis of {size}, got shape {tuple(x.shape)}.")
        if not x.is_floating_point():
            raise DomainError(f"triality.{op}: expected a real floating dtype, got {x.dtype}; convert it first.")
