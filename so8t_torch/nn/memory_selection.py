"""Layers that tell signal from noise in a fast-weight memory: a filter of its rates, and the importance of its entries.

    Γ ↦ Γ (1 + (gamma_boost − 1)(1 − p))        η ↦ η (1 + (eta_boost − 1) p)        S ↦ S (1 − λ (1 − g))

Symbols: S (…, H, K, V) the states that enter a chunk of C tokens, Γ and η (…, C, H) the decay rates and write strengths
of its tokens, g the gate of each entry by its signal-to-noise ratio, p its mean over a head.
No layer here keeps anything between calls, and nothing is written back: what a chunk works with is returned.
Operation: so8t_torch/ops/snr_filter.py. Derivation: docs/math/snr_filter.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError
from so8t_torch.ops import snr_filter
from so8t_torch.ops.snr_filter import Filtered

__all__ = ["MemoryImportanceEstimator", "SNRMemoryFilter", "TopMemories"]


class SNRMemoryFilter(nn.Module):
    """``snr_filter.snr_filter`` with its options.

    Args:
        threshold: ratio at which an entry counts half as signal.
        gamma_boost: factor of Γ for a head that is all noise, at least 1.
        eta_boost: factor of η for a head that is all signal, at least 1.
        temperature: width of the transition, positive.
        cleanup: λ in [0, 1]; 0 leaves the state as it is.
        hard: entries are signal or noise in value, with the gradient of the soft gate.
        noise_floor: least noise in units of the mean of |S|.
    """

    def __init__(
        self,
        threshold: float = 2.0,
        gamma_boost: float = 2.0,
        eta_boost: float = 1.5,
        *,
        temperature: float = 0.25,
        cleanup: float = 0.0,
        hard: bool = False,
        noise_floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.threshold, self.gamma_boost, self.eta_boost = threshold, gamma_boost, eta_boost
        self.temperature, self.cleanup, self.hard, self.noise_floor = temperature, cleanup, hard, noise_floor

    def forward(
        self, state: Float[Tensor, "*batch h k v"], decay: Float[Tensor, "*batch c h"], eta: Float[Tensor, "*batch c h"]
    ) -> Filtered:
        """Return S, Γ and η for the tokens of a chunk, and p.

        Args:
            state: S as it enters the chunk.
            decay: Γ of its tokens, not negative.
            eta: η of its tokens.

        Raises:
            ShapeError, DomainError, ConfigError: as ``snr_filter.snr_filter``.
        """
        return snr_filter.snr_filter(
            state,
            decay,
            eta,
            threshold=self.threshold,
            temperature=self.temperature,
            gamma_boost=self.gamma_boost,
            eta_boost=self.eta_boost,
            cleanup=self.cleanup,
            hard=self.hard,
            noise_floor=self.noise_floor,
        )

    def get_statistics(self, state: Float[Tensor, "*batch h k v"]) -> dict[str, Tensor]:
        """Return ``mean_snr``, ``std_snr``, ``min_snr``, ``max_snr`` and ``low_snr_ratio`` of every head, detached."""
        return snr_filter.statistics(state, threshold=self.threshold, noise_floor=self.noise_floor)._asdict()

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"threshold={self.threshold:g}, gamma_boost={self.gamma_boost:g}, eta_boost={self.eta_boost:g}, "
            f"temperature={self.temperature:g}, cleanup={self.cleanup:g}, hard={self.hard}"
        )


class TopMemories(NamedTuple):
    """The most important entries of every head, the first the most important.

    Attributes:
        values: entries of S (..., H, k).
        indices: where they are among the K·V entries of their head, row by row (..., H, k).
        scores: their importance (..., H, k).
    """

    values: Tensor
    indices: Tensor
    scores: Tensor


class MemoryImportanceEstimator(nn.Module):
    """How much each entry of a memory matters, by its signal-to-noise ratio, its energy and its age.

    Args:
        snr_weight: of σ(r − threshold).
        energy_weight: of S²/max S².
        recency_weight: of exp(−age_rate · age).
        threshold: ratio at which the first term is one half.
        age_rate: per token, not negative.
        noise_floor: least noise in units of the mean of |S|.
    """

    def __init__(
        self,
        snr_weight: float = 0.5,
        energy_weight: float = 0.3,
        recency_weight: float = 0.2,
        *,
        threshold: float = 2.0,
        age_rate: float = 0.1,
        noise_floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.weights = (snr_weight, energy_weight, recency_weight)
        self.threshold, self.age_rate, self.noise_floor = threshold, age_rate, noise_floor

    def forward(
        self, state: Float[Tensor, "*batch h k v"], age: Float[Tensor, "*batch h k v"]
    ) -> Float[Tensor, "*batch h k v"]:
        """Return the scores, in [0, 1].

        Args:
            state: S of every head.
            age: tokens since the entry was last written; the caller counts it.

        Raises:
            ShapeError, DomainError, ConfigError: as ``snr_filter.importance``.
        """
        return snr_filter.importance(
            state,
            age,
            weights=self.weights,
            threshold=self.threshold,
            age_rate=self.age_rate,
            noise_floor=self.noise_floor,
        )

    def get_top_k_memories(
        self, state: Float[Tensor, "*batch h k v"], age: Float[Tensor, "*batch h k v"], k: int
    ) -> TopMemories:
        """Return the k most important entries of every head.

        Args:
            state: S of every head.
            age: tokens since the entry was last written.
            k: between 1 and K·V.

        Raises:
            ConfigError: k is out of range; else as ``forward``.
        """
        scores = self(state, age).flatten(-2)
        if not 1 <= k <= scores.shape[-1]:
            raise ConfigError(
                f"get_top_k_memories: expected k between 1 and {scores.shape[-1]} for states {tuple(state.shape)}, "
                f"got {k}."
            )
        scores, indices = torch.topk(scores, k)
        return TopMemories(state.flatten(-2).gather(-1, indices), indices, scores)

    def extra_repr(self) -> str:
        """Return the options."""
        return f"weights={self.weights}, threshold={self.threshold:g}, age_rate={self.age_rate:g}"
