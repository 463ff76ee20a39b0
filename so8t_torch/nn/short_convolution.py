"""A causal filter of a few taps for each channel: what the keys of a memory are made of.

    y_t = Σ_j taps_j ⊙ x_{t−j},   j = 0 … K − 1;    y_t ≈ x_{t−1} at the start

A value is then written under the token before it, and a query like that token reads it.

Symbols: x activations (B, N, D); taps (K, D). Nothing crosses from one document to another, and the last K − 1 inputs
are the state. Operation: so8t_torch/ops/semiseparable.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError
from so8t_torch.ops import semiseparable

__all__ = ["ShortConvolution"]


class ShortConvolution(nn.Module):
    """The filter.

    Args:
        d_model: D.
        taps: K, at least 1.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a size below 1.
    """

    def __init__(
        self, d_model: int, taps: int = 4, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if min(d_model, taps) < 1:
            raise ConfigError(f"ShortConvolution: expected d_model and taps of 1 or more, got {d_model} and {taps}.")
        super().__init__()
        self.taps = nn.Parameter(torch.empty(taps, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the tap of the token before (of the token itself, if that is all) to 1, and others to N(0, 0.02²)."""
        nn.init.normal_(self.taps, std=0.02)
        with torch.no_grad():
            self.taps[min(1, len(self.taps) - 1)].fill_(1.0)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        state: Float[Tensor, "b k-1 d"],
        segment_ids: Int[Tensor, "b n"] | None = None,
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b k-1 d"]]:
        """Return filtered tokens, and the last K − 1 inputs.

        Args:
            x: activations.
            state: the K − 1 inputs before them; zeros where a document begins.
            segment_ids: equal numbers for the tokens of one document; padding has that of the token before.
            padding_mask: False where a token is padding, behind the other tokens of its row: the state is theirs.

        Raises:
            ShapeError, DomainError: as ``ops.semiseparable.banded``.
        """
        y, last = semiseparable.banded(x, self.taps.to(x.dtype), state, segment_ids)
        if padding_mask is None or len(self.taps) == 1:
            return y, last
        return y, _last(x, state, segment_ids, padding_mask)

    def extra_repr(self) -> str:
        """Return the sizes."""
        return f"{self.taps.shape[1]}, taps={self.taps.shape[0]}"


def _last(x: Tensor, state: Tensor, segment_ids: Tensor | None, padding_mask: Tensor) -> Tensor:
    """Return the last K − 1 inputs before the padding, zero where they belong to an earlier document."""
    before, counts = state.shape[1], padding_mask.sum(1, keepdim=True)
    places = counts + torch.arange(before, device=x.device)
    inputs = torch.cat([state, x.to(state.dtype)], 1)
    last = inputs.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
    if segment_ids is None:
        return last
    numbers = torch.cat([segment_ids[:, :1].expand(-1, before), segment_ids], 1)
    same = numbers.gather(1, places) == segment_ids[:, -1:]
    return torch.where(same[..., None], last, 0.0)
