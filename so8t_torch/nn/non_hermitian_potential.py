"""Potentials and decay rates of the tokens of a chain, from one projection, and what a log of forgetting needs of them.

    v, Γ, Γ^mem = affine in x_t,  the rates through γ + softplus(·)      V_t = v_t − iΓ_t

Symbols: x activations (B, N, D); K channels, each a chain of its own over the tokens; v potentials and Γ ≥ γ decay
rates (B, N, K); Γ^mem decay rates (B, N, M) per unit of time for M heads of a memory; γ the floors.
Computed in float32 (float64 for float64), also under autocast. Derivation: docs/math/tridiagonal.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype, autocast_dtype
from so8t_torch.core.tensors import expect_tensors

__all__ = ["NonHermitianPotential", "Potential", "decay_statistics", "softplus_inverse"]

INITIAL_DECAY = 0.05
"""Γ of the chains at the start."""
HALF_LIVES = (4.0, 4096.0)
"""Shortest and longest half-life of the memory's heads at the start, in tokens."""


class Potential(NamedTuple):
    """What a potential gives for each token.

    Attributes:
        v: real part (B, N, K).
        gamma: decay rates Γ of the chains (B, N, K).
        memory_gamma: decay rates of the memory's heads (B, N, M).
    """

    v: Float[Tensor, "b n k"]
    gamma: Float[Tensor, "b n k"]
    memory_gamma: Float[Tensor, "b n m"]

    @property
    def values(self) -> Complex[Tensor, "b n k"]:
        """V = v − iΓ."""
        return torch.complex(self.v, -self.gamma)


class NonHermitianPotential(nn.Module):
    """Potentials and decay rates of each token from one projection with bias.

    At the start v has the scale of the projection, Γ is 0.05 and the half-lives of the memory's heads spread evenly in
    their logarithm from 4 to 4,096 tokens, as far as the floors allow.

    Args:
        d_model: D.
        channels: K.
        memory_heads: M, 0 for none.
        base_decay: γ of the chains, the least rate.
        memory_base_decay: γ of the memory's heads; half-lives reach ln 2/(γ dt) tokens at most.
        chain_decay: chains lose something; without it Γ = 0, and the rates are those of the memory alone.
        adaptive_decay: rates depend on the token; without it Γ is ``base_decay`` and Γ^mem is trained per head.
        dt: time from token to token, for half-lives.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a width below 1, a rate or dt that is not positive, or a floor above a rate of the start.
    """

    memory_bias: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        *,
        channels: int = 1,
        memory_heads: int = 0,
        base_decay: float = 1e-3,
        memory_base_decay: float = 1e-4,
        chain_decay: bool = True,
        adaptive_decay: bool = True,
        dt: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_widths("NonHermitianPotential", d_model, channels, memory_heads)
        _check_rates(base_decay, memory_base_decay, dt, adaptive_decay)
        self.channels, self.memory_heads = channels, memory_heads
        self.chain_decay, self.adaptive_decay = chain_decay, adaptive_decay
        self.base_decay, self.memory_base_decay, self.dt = base_decay, memory_base_decay, dt
        self.chain_rates = channels if adaptive_decay and chain_decay else 0
        width = channels + self.chain_rates + (memory_heads if adaptive_decay else 0)
        self.projection = nn.Linear(d_model, width, device=device, dtype=dtype)
        constant = memory_heads and not adaptive_decay
        memory = nn.Parameter(torch.empty(memory_heads, device=device, dtype=dtype)) if constant else None
        self.register_parameter("memory_bias", memory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights of v to N(0, 1/D), those of the rates to a tenth of that, and the biases to v = 0 and Γ."""
        rates = torch.tensor([softplus_inverse(rate - self.memory_base_decay) for rate in self._initial_rates()])
        weight, bias, split = self.projection.weight, self.projection.bias, self.channels
        with torch.no_grad():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            weight[split:] *= 0.1
            bias.zero_()
            if self.chain_rates:
                bias[split : split + self.chain_rates] = softplus_inverse(INITIAL_DECAY - self.base_decay)
            (bias[split + self.chain_rates :] if self.memory_bias is None else self.memory_bias).copy_(rates)

    def forward(self, x: Float[Tensor, "b n d"]) -> Potential:
        """Return v, Γ and Γ^mem of each token.

        Args:
            x: activations of the dtype of the parameters; under autocast any that it casts (not float64).

        Raises:
            ShapeError: x is not (B, N, D).
            DomainError: x is no tensor, not real floating-point, or of another dtype than the parameters.
        """
        _check_activations("NonHermitianPotential", x, self.projection.weight)
        raw = self.projection(x).to(accumulation_dtype(x.dtype))
        v, rates = raw[..., : self.channels], raw[..., self.channels :]
        gamma, memory = rates[..., : self.chain_rates], rates[..., self.chain_rates :]
        if self.chain_rates:
            gamma = self.base_decay + softplus(gamma)
        else:
            gamma = torch.full_like(v, self.base_decay if self.chain_decay else 0.0)
        if self.memory_bias is not None:
            memory = self.memory_bias.to(raw.dtype).expand(*x.shape[:2], -1)
        return Potential(v, gamma, self.memory_base_decay + softplus(memory))

    def extra_repr(self) -> str:
        """Return the number of channels and heads, and the floors."""
        return (
            f"channels={self.channels}, memory_heads={self.memory_heads}, base_decay={self.base_decay:g}, "
            f"memory_base_decay={self.memory_base_decay:g}, chain_decay={self.chain_decay}, "
            f"adaptive_decay={self.adaptive_decay}, dt={self.dt:g}"
        )

    def _initial_rates(self) -> list[float]:
        """Return ln 2/(half-life dt) for half-lives even in their logarithm, longest last."""
        low, high = (math.log(life) for life in HALF_LIVES)
        share = [head / max(self.memory_heads - 1, 1) for head in range(self.memory_heads)]
        return [math.log(2) / (math.exp(low + part * (high - low)) * self.dt) for part in share]


def decay_statistics(potential: Potential, *, dt: float = 1.0) -> dict[str, Tensor]:
    """Return what a log of forgetting needs, as tensors on the device: nothing waits for them here.

    Args:
        potential: what the layer returned.
        dt: time from token to token.

    Returns:
        Mean and standard deviation of Γ; the ratio of mean Γ to mean |v|; the quantiles 0.05, 0.5, 0.95 of Γ; the
        fraction of (token, channel) whose half-life is below one token. The same for the memory's heads where there
        are any, under ``memory_``, without the ratio.

    Raises:
        ShapeError: there is no token to speak of.
    """
    if potential.gamma.numel() == 0:
        raise ShapeError(f"decay_statistics: expected at least one token, got rates {tuple(potential.gamma.shape)}.")
    found = {f"gamma_{name}": value for name, value in _statistics(potential.gamma, dt).items()}
    found["energy_ratio"] = (potential.gamma.mean() / potential.v.abs().mean()).detach()
    if potential.memory_gamma.shape[-1]:
        found |= {f"memory_gamma_{name}": value for name, value in _statistics(potential.memory_gamma, dt).items()}
    return found


def _statistics(gamma: Tensor, dt: float) -> dict[str, Tensor]:
    gamma = gamma.detach()
    return {
        "mean": gamma.mean(),
        "std": gamma.std(correction=0),
        "quantiles": _quantiles(gamma.flatten(), (0.05, 0.5, 0.95)),
        "overdamped": (gamma * dt > math.log(2)).to(gamma.dtype).mean(),
    }


def _quantiles(x: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return quantiles between the two entries next to each, of any number of entries (torch's: at most 2²⁴)."""
    ordered = x.sort().values
    places = [level * (len(x) - 1) for level in levels]
    pairs = [(ordered[math.floor(place)], ordered[math.ceil(place)]) for place in places]
    return torch.stack([low.lerp(high, place % 1.0) for (low, high), place in zip(pairs, places, strict=True)])


def softplus_inverse(y: float) -> float:
    """Return x with log(1 + eˣ) = y > 0."""
    return y + math.log(-math.expm1(-y))


def _check_widths(name: str, d_model: int, channels: int, memory_heads: int) -> None:
    """Raise unless the widths are positive and the number of heads is not negative."""
    if min(d_model, channels) < 1 or memory_heads < 0:
        raise ConfigError(
            f"{name}: expected d_model and channels of at least 1 and memory_heads of at least 0, got {d_model}, "
            f"{channels} and {memory_heads}."
        )


def _check_rates(base_decay: float, memory_base_decay: float, dt: float, adaptive: bool) -> None:
    """Raise unless rates and dt are positive, and the floors below the rates of the start."""
    most = INITIAL_DECAY if adaptive else math.inf
    sound = 0 < base_decay < most and memory_base_decay > 0 and dt > 0
    if not (sound and memory_base_decay * HALF_LIVES[1] * dt < math.log(2)):
        raise ConfigError(
            f"NonHermitianPotential: expected base_decay in (0, {INITIAL_DECAY:g}) (or above, without adaptive_decay), "
            f"dt > 0 and memory_base_decay in (0, ln 2/({HALF_LIVES[1]:g} dt)), got {base_decay!r}, {dt!r} and "
            f"{memory_base_decay!r}."
        )


def _check_activations(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless x is (B, N, D) with at least one token, and of a dtype that the weights can be multiplied with."""
    expect_tensors(name, x=x)
    width = weight.shape[1]
    if x.ndim != 3 or x.shape[-1] != width or x.shape[1] == 0:
        raise ShapeError(f"{name}: expected x (B, N, {width}) with N > 0, got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise DomainError(f"{name}: expected real floating-point x, got {x.dtype}; convert it first.")
    cast = autocast_dtype(x) is not None and weight.dtype != torch.float64
    if weight.is_floating_point() and x.dtype != weight.dtype and not cast:
        raise DomainError(f"{name}: expected x in the {weight.dtype} of the parameters, got {x.dtype}; convert either.")
