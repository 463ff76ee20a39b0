"""Decays with a rotation: a complex semiseparable recurrence as a real one of twice the rank.

    S_t = diag(α_t e^{iωΔ_t}) S_{t−1} + u_t x_tᵀ,   y_t = Re(S_tᵀ v_t)
    φ_t = Σ_{s≤t} ω Δ_s,   P_t = e^{−iφ_t} S_t:      P_t = diag(α_t) P_{t−1} + (e^{−iφ_t} u_t) x_tᵀ
    y_t = [Re P_t; Im P_t]ᵀ [Re w_t; −Im w_t],       w_t = e^{iφ_t} v_t

Symbols: ω (R,) trained frequencies in radians per unit of time, Δ time steps, u and v complex (B, T, R), given and
returned as real and then imaginary parts; φ counts from the first token of the call, so that S enters a call as P, and
P is turned by the last φ when it leaves: no angle is carried from call to call.
Angles are summed in float64. Cost: a sine and a cosine for each token and channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Rotation", "folded"]


class Rotation(nn.Module):
    """Frequencies of rank channels.

    Args:
        rank: R.
        device: of the frequencies.
        dtype: of the frequencies.
    """

    def __init__(self, rank: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.zeros(rank, device=device, dtype=dtype))

    def forward(
        self, u: Float[Tensor, "b t c"], v: Float[Tensor, "b t c"], step: Float[Tensor, "*#b t *#r"]
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b t c"], Callable[[Tensor], Tensor]]:
        """Return e^{−iφ} u, the conjugate of e^{iφ} v, and the map from P to S after the last token.

        Args:
            u: what is written, C = 2R.
            v: what is read.
            step: Δ, which broadcasts to (B, T, R).
        """
        angle = (self.frequencies.double() * step).expand(-1, u.shape[1], -1).cumsum(1)
        wave = angle.cos().to(step.dtype), angle.sin().to(step.dtype)
        real, imaginary = _turned(v, *wave)
        last = wave[0][:, -1], wave[1][:, -1]

        def leave(mixer: Tensor) -> Tensor:
            cosine, sine = (part.to(mixer.dtype).view(*part.shape, *(1,) * (mixer.ndim - 2)) for part in last)
            return torch.cat(_turned(mixer, cosine, sine, 1), 1)

        written = torch.cat(_turned(u, wave[0], -wave[1]), -1)
        return written, torch.cat([real, -imaginary], -1), leave


def folded(products: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch r"]:
    """Return the sums of the products of real and of imaginary parts.

    Args:
        products: C = 2R.
    """
    real, imaginary = products.chunk(2, -1)
    return real + imaginary


def _turned(z: Tensor, cosine: Tensor, sine: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Return real and imaginary part of e^{iφ} z."""
    real, imaginary = z.chunk(2, axis)
    return real * cosine - imaginary * sine, real * sine + imaginary * cosine
