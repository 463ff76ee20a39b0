"""The feed-forward part of a block: two maps with a GELU between, dense or as products of low rank.

    y = W₂ gelu(W₁ x + b₁) + b₂        compressed: W₁ = B₁ A₁, W₂ = B₂ A₂ through r channels

Symbols: x activations (…, D), W₁ (F, D), W₂ (D, F), A₁ (r, D), B₁ (F, r), A₂ (r, F), B₂ (D, r).
Cost for a token: 2 D F numbers in the dense form, 2 r (D + F) in the other.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from so8t_torch.nn.lns_linear import LNSLinear

__all__ = ["FeedForward"]


class FeedForward(nn.Module):
    """Two maps and a GELU.

    Args:
        d_model: D.
        inner: F.
        rank: r; ``None`` for dense maps.
        sign_log: whether the maps are computed in sign–log numbers.
        backend: of sign–log maps.
        outward: size of what the last map gives at the start, beside that of what it takes.
    """

    def __init__(
        self,
        d_model: int,
        inner: int,
        *,
        rank: int | None = None,
        sign_log: bool = False,
        backend: str = "auto",
        outward: float = 1.0,
    ) -> None:
        super().__init__()
        self.outward = outward

        def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
            return LNSLinear(inputs, outputs, bias, backend=backend) if sign_log else nn.Linear(inputs, outputs, bias)

        def through(inputs: int, outputs: int) -> nn.Module:
            if rank is None:
                return linear(inputs, outputs)
            return nn.Sequential(linear(inputs, rank, bias=False), linear(rank, outputs))

        self.up, self.down = through(d_model, inner), through(inner, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1/inputs), those of the last map times ``outward``, and put biases to zero."""
        maps = [module for module in self.modules() if isinstance(module, nn.Linear)]
        for part in maps:
            gain = self.outward if part is maps[-1] else 1.0
            nn.init.normal_(part.weight, std=gain * part.in_features**-0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return y.

        Args:
            x: activations.
        """
        return self.down(gelu(self.up(x)))
