"""Layers that see a fast-weight memory in the zeta basis and attenuate the modes without energy.

    S′ = Q_kᵀ S Q_v        S ↦ S − w Q_k ((1 − m) ∘ S′) Q_vᵀ,   w = σ(resonance_gate)

Symbols: S (…, H, K, V) the states of H heads; Q_k, Q_v orthonormal bases made of the zeta zeros; m the gate of each
mode by its relative energy; w how far each head goes, learned, 0.018 at the start.
Applied to the state that enters a chunk of tokens the layer is causal, and it holds no state of its own.
Operation: so8t_torch/ops/resonance.py. Derivation: docs/math/resonance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops import resonance

__all__ = ["MemoryResonanceLayer", "ZetaBasisTransform"]

CLOSED = -4.0
"""Start of the learned gate: σ(−4) = 0.018."""


class ZetaBasisTransform(nn.Module):
    """The change to the zeta basis and back.

    The bases are buffers: saved, moved with the module and never trained. In a module of half precision they stay
    float32, because a rounded basis is orthonormal to three digits only, and where the dtype changes they are made
    anew, because digits that a rounding took do not come back.

    Args:
        key_dim: K, at least 1.
        value_dim: V; K where it is left out.
        device: of the buffers.
        dtype: of the buffers; float32 stands in for half precision.

    Raises:
        ConfigError: a size below 1.
    """

    key_basis: Tensor
    value_basis: Tensor

    def __init__(
        self,
        key_dim: int,
        value_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.key_dim, self.value_dim = key_dim, key_dim if value_dim is None else value_dim
        wide = accumulation_dtype(dtype or torch.get_default_dtype())
        for name, size in (("key_basis", self.key_dim), ("value_basis", self.value_dim)):
            if not isinstance(size, int) or size < 1:
                raise ConfigError(f"ZetaBasisTransform: expected a whole number {name[:-6]}_dim ≥ 1, got {size!r}.")
            self.register_buffer(name, torch.empty(size, size, device=device, dtype=wide))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the bases, which a module that was built without data does not have."""
        self.key_basis.copy_(resonance.basis(self.key_dim))
        self.value_basis.copy_(resonance.basis(self.value_dim))

    def forward(self, state: Float[Tensor, "*batch h k v"]) -> Float[Tensor, "*batch h k v"]:
        """Return S′ = Q_kᵀ S Q_v."""
        return resonance.transform(state, self.key_basis, self.value_basis)

    def inverse(self, modes: Float[Tensor, "*batch h k v"]) -> Float[Tensor, "*batch h k v"]:
        """Return S = Q_k S′ Q_vᵀ."""
        return resonance.transform(modes, self.key_basis.mT, self.value_basis.mT)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.key_dim}, {self.value_dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ZetaBasisTransform:
        """Move and convert like any module, but to no dtype below float32, and never from one to another."""
        bases = self.key_basis, self.value_basis
        super()._apply(fn, recurse)
        for name, before in zip(("key_basis", "value_basis"), bases, strict=True):
            after = getattr(self, name)
            wide = accumulation_dtype(after.dtype)
            if wide != before.dtype:
                setattr(self, name, resonance.basis(len(before)).to(after.device, wide))
            elif wide != after.dtype:
                setattr(self, name, before.to(after.device))
        return self


class MemoryResonanceLayer(nn.Module):
    """The filter with a learned strength for every head; it starts close to the identity.

    Args:
        head_dim: K, at least 1.
        num_heads: H, at least 1.
        energy_threshold: relative energy at which a mode passes by half; the mean over modes is 1.
        value_dim: V; K where it is left out.
        temperature: width of the transition, positive.
        energy: ``"row"`` (norm of the mode's row) or ``"diag"`` (its diagonal entry, for K = V).
        hard: gates are 0 or 1 in value, with the gradient of the soft ones.
        gate_init: start of ``resonance_gate`` (H,); σ of it is the share of the filtered state.
        device: of parameters and buffers.
        dtype: of the parameters.

    Raises:
        ConfigError: a size below 1; the first call raises for the other options.
    """

    def __init__(
        self,
        head_dim: int = 64,
        num_heads: int = 8,
        energy_threshold: float = 0.1,
        *,
        value_dim: int | None = None,
        temperature: float = 0.05,
        energy: Literal["row", "diag"] = "row",
        hard: bool = False,
        gate_init: float = CLOSED,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads < 1:
            raise ConfigError(f"MemoryResonanceLayer: expected num_heads ≥ 1, got {num_heads}.")
        super().__init__()
        self.num_heads, self.energy_threshold, self.temperature = num_heads, energy_threshold, temperature
        self.energy, self.hard = energy, hard
        self.transform = ZetaBasisTransform(head_dim, value_dim, device=device, dtype=dtype)
        self.gate_init = gate_init
        self.resonance_gate = nn.Parameter(torch.full((num_heads,), gate_init, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the gates back to their start; ``transform`` resets its own bases."""
        nn.init.constant_(self.resonance_gate, self.gate_init)

    def forward(self, state: Float[Tensor, "*batch h k v"]) -> tuple[Float[Tensor, "*batch h k v"], dict[str, Tensor]]:
        """Return the filtered states and what was found.

        Args:
            state: S of every head, as it enters a chunk of tokens.

        Returns:
            The states in their dtype, and detached tensors: ``diag_energy`` (..., H, K) the energy of every mode,
            ``resonance_mask`` (..., H, K) its gate, and over modes ``num_resonant`` (gates of at least one half),
            ``total_energy`` (Σ e_j²) and ``sparsity_ratio`` (share of the other modes), each (..., H).

        Raises:
            ShapeError, DomainError, ConfigError: as ``resonance.resonance``.
        """
        found = resonance.resonance(
            state,
            self.transform.key_basis,
            self.transform.value_basis,
            torch.sigmoid(self.resonance_gate.to(accumulation_dtype(self.resonance_gate.dtype))),
            threshold=self.energy_threshold,
            temperature=self.temperature,
            energy=self.energy,
            hard=self.hard,
        )
        return found.state, self._report(found.energy.detach(), found.gate.detach())

    def get_resonance_strength(self, state: Float[Tensor, "*batch h k v"], i: int, j: int) -> Float[Tensor, "*batch h"]:
        """Return |S′_ij| of every head: how strongly mode i of the keys is tied to mode j of the values."""
        return self.transform(state)[..., i, j].abs()

    def extra_repr(self) -> str:
        """Return heads and options."""
        return (
            f"num_heads={self.num_heads}, energy_threshold={self.energy_threshold:g}, "
            f"temperature={self.temperature:g}, energy={self.energy!r}, hard={self.hard}"
        )

    @staticmethod
    def _report(energy: Tensor, gate: Tensor) -> dict[str, Any]:
        resonant = gate >= 0.5
        return {
            "diag_energy": energy,
            "resonance_mask": gate,
            "num_resonant": resonant.sum(-1),
            "total_energy": energy.to(accumulation_dtype(energy.dtype)).square().sum(-1),
            "sparsity_ratio": 1.0 - resonant.float().mean(-1),
        }
