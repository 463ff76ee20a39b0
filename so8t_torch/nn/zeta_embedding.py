"""Positions as sines and cosines whose frequencies are the inverse zeta zeros.

    E[p] = a·(sin φ_1, cos φ_1, sin φ_2, …),    φ_j = p·ω_max (γ_1/γ_j)^power

Symbols: p a position, a the amplitude, γ_j the j-th zero. The root mean square of a row is a/√2: to match the rows of a
token embedding of standard deviation s take a = √2 s.
Operation: so8t_torch/ops/zeta.py. Derivation: docs/math/zeta.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.ops import zeta

__all__ = ["ZetaEmbedding"]


class ZetaEmbedding(nn.Module):
    """The vectors of positions; they are computed, so that no position is out of range.

    Args:
        max_len: rows of the table when it is trained, at least 1; without training nothing is stored.
        d_model: width D, at least 1.
        trainable: the first ``max_len`` rows are parameters that start at the formula.
        scale: amplitude a, positive.
        omega_max: largest frequency in radians per position, in (0, π/2].
        power: exponent of γ_1/γ_j, positive.
        mode: ``"scaled"`` (the formula above), ``"inverse"`` 1/γ_j, or ``"direct"`` γ_j/2π, which is aliased.
        device: of the parameters.
        dtype: of the result, which is rounded once; frequencies are float64 in any module.

    Raises:
        ConfigError: an argument is out of range.
    """

    frequencies: Tensor
    like: Tensor
    """Nothing, on the device and in the dtype of the results."""

    def __init__(
        self,
        max_len: int,
        d_model: int,
        trainable: bool = False,
        scale: float = 1.0,
        *,
        omega_max: float = math.pi / 2,
        power: float = 1.0,
        mode: Literal["scaled", "inverse", "direct"] = "scaled",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (isinstance(max_len, int) and isinstance(d_model, int) and max_len >= 1 and d_model >= 1):
            raise ConfigError(
                f"ZetaEmbedding: expected whole numbers max_len and d_model ≥ 1, got {max_len!r} and {d_model!r}."
            )
        if not 0.0 < scale < math.inf:
            raise ConfigError(f"ZetaEmbedding: expected a scale > 0, got {scale!r}.")
        zeta.frequencies(1, omega_max=omega_max, power=power, mode=mode)
        super().__init__()
        self.max_len, self.d_model, self.scale = max_len, d_model, scale
        self.omega_max, self.power, self.mode = omega_max, power, mode
        self.register_buffer("like", torch.empty(0, device=device, dtype=dtype), persistent=False)
        self.register_buffer("frequencies", self._frequencies(), persistent=False)
        rows = torch.empty(max_len, d_model, device=device, dtype=dtype) if trainable else None
        self.weight = None if rows is None else nn.Parameter(rows)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the trained rows back to the formula."""
        if self.weight is not None:
            self.weight.copy_(self.formula(torch.arange(self.max_len, device=self.weight.device)))

    def formula(self, positions: Int[Tensor, "*batch t"]) -> Float[Tensor, "*batch t d"]:
        """Return a·(sin φ_1, cos φ_1, …) of any positions, trained rows or not."""
        return (self.scale * zeta.waves(positions, self.frequencies, self.d_model)).to(self.like.dtype)

    def forward(self, positions: Int[Tensor, "*batch t"]) -> Float[Tensor, "*batch t d"]:
        """Return the vectors of positions.

        Args:
            positions: whole numbers; rows of the table where it is trained, the formula beyond it and below 0.

        Raises:
            DomainError: positions are not integers.
        """
        if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
            raise DomainError(f"ZetaEmbedding: expected integer positions, got {positions.dtype}.")
        computed = self.formula(positions)
        if self.weight is None:
            return computed
        inside = (positions >= 0) & (positions < self.max_len)
        rows = nn.functional.embedding(torch.where(inside, positions, 0), self.weight)
        return torch.where(inside[..., None], rows, computed)

    def _frequencies(self) -> Tensor:
        """Return ω, a sine and a cosine for each, in float64."""
        count = (self.d_model + 1) // 2
        found = zeta.frequencies(count, omega_max=self.omega_max, power=self.power, mode=self.mode)
        return found.to(self.like.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZetaEmbedding:
        """Move and convert like any module, but frequencies to no other dtype."""
        super()._apply(fn, recurse)
        self.frequencies = self._frequencies()
        return self

    def extra_repr(self) -> str:
        """Return sizes and options."""
        return (
            f"{self.max_len}, {self.d_model}, trainable={self.weight is not None}, scale={self.scale:g}, "
            f"omega_max={self.omega_max:g}, power={self.power:g}, mode={self.mode!r}"
        )
