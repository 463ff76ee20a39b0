"""Inclusive sums along any axis, differentiable in both directions: the recurrence with every multiplier at one.

    y_i = Σ_{j≤i} x_j,   reverse:  y_i = Σ_{j≥i} x_j        ∂x = the same sum of ∂y in the other direction

Cost: one pass over x, sums in float32 (float64 for float64). Derivation: docs/math/linear_recurrence.md.
"""

from __future__ import annotations

import math

from jaxtyping import Inexact
from torch import Tensor

from so8t_torch.core.errors import DomainError, ShapeError
from so8t_torch.ops.linear_recurrence import cumulative_sum


def fused_associative_scan(
    x: Inexact[Tensor, "*shape"], dim: int = -1, reverse: bool = False
) -> Inexact[Tensor, "*shape"]:
    """Return the sums of everything up to each place along one axis.

    Args:
        x: terms, real or complex; summed in float32, or float64 for float64.
        dim: the axis.
        reverse: sum from the other end.

    Raises:
        ShapeError: x has no such axis.
        DomainError: x is of no floating-point or complex dtype.
    """
    if not -x.ndim <= dim < x.ndim:
        raise ShapeError(
            f"fused_associative_scan: expected an axis of a tensor of shape {tuple(x.shape)}, got dim={dim}."
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise DomainError(f"fused_associative_scan: expected a floating-point or complex x, got {x.dtype}; convert it.")
    place = dim % x.ndim
    if 0 in x.shape:
        return x.clone()
    rows, length, width = math.prod(x.shape[:place]), x.shape[place], math.prod(x.shape[place + 1 :])
    return cumulative_sum(x.reshape(rows, length, width), reverse=reverse).reshape(x.shape)
