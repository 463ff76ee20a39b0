"""A mixer of tokens by the resolvent of a lossy tridiagonal operator (the BK layer), and the potential that it uses.

    v, Γ, Γ^mem = affine in x_t,  the rates through γ + softplus(·)      V_t = v_t − iΓ_t
    H = V + hopping b between neighbours      y_t = [Re g_t, Im g_t],  g = causal or full diagonal of (H − z)⁻¹

Symbols: x activations (B, N, D); K channels, each a chain of its own over the tokens; v potentials and Γ ≥ γ decay
rates (B, N, K); Γ^mem decay rates (B, N, M) per unit of time for M heads of a memory; γ the floors; z (K,) in the upper
half-plane, Im z = 0.01 + softplus(·). A state ψ under i dψ/dt = Hψ loses d‖ψ‖²/dt = −2 ψ†Γψ: the rates enter the
resolvent, and a token with a large rate hides what came before it.
The couplings do not know positions, so chains have any length. Computed in float32 (float64 for float64), also under
autocast. Cost: one projection of width 2K + M and ``ops.tridiagonal`` on B·K chains.
Operation: so8t_torch/ops/tridiagonal. Derivation: docs/math/tridiagonal.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops import tridiagonal

__all__ = ["DissipativeBKLayer", "Mixed", "NonHermitianPotential", "Potential", "decay_statistics"]

LEAST_IMAGINARY = 1e-2
"""Least Im z: from there on float32 keeps five digits over 65,536 sites (docs/math/tridiagonal.md)."""
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


class Mixed(NamedTuple):
    """What the layer gives.

    Attributes:
        features: Re g of all channels, then Im g (B, N, 2K).
        state: g at the last token (B, K), to be handed back with the next tokens; ``None`` in mode ``"full"``.
        potential: what entered, for a memory that decays with it.
    """

    features: Float[Tensor, "b n c"]
    state: Complex[Tensor, "b k"] | None
    potential: Potential


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
        adaptive_decay: bool = True,
        dt: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_widths("NonHermitianPotential", d_model, channels, memory_heads)
        _check_rates(base_decay, memory_base_decay, dt, adaptive_decay)
        self.channels, self.memory_heads, self.adaptive_decay = channels, memory_heads, adaptive_decay
        self.base_decay, self.memory_base_decay, self.dt = base_decay, memory_base_decay, dt
        width = 2 * channels + memory_heads if adaptive_decay else channels
        self.projection = nn.Linear(d_model, width, device=device, dtype=dtype)
        constant = memory_heads and not adaptive_decay
        memory = nn.Parameter(torch.empty(memory_heads, device=device, dtype=dtype)) if constant else None
        self.register_parameter("memory_bias", memory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights of v to N(0, 1/D), those of the rates to a tenth of that, and the biases to v = 0 and Γ."""
        rates = torch.tensor([_softplus_inverse(rate - self.memory_base_decay) for rate in self._initial_rates()])
        weight, bias, split = self.projection.weight, self.projection.bias, self.channels
        with torch.no_grad():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            weight[split:] *= 0.1
            bias.zero_()
            if self.adaptive_decay:
                bias[split : 2 * split] = _softplus_inverse(INITIAL_DECAY - self.base_decay)
            (bias[2 * split :] if self.memory_bias is None else self.memory_bias).copy_(rates)

    def forward(self, x: Float[Tensor, "b n d"]) -> Potential:
        """Return v, Γ and Γ^mem of each token.

        Args:
            x: activations of the dtype of the parameters; under autocast any that it casts (not float64).

        Raises:
            ShapeError: x is not (B, N, D).
            DomainError: x is not real floating-point, or of another dtype than the parameters.
        """
        _check_activations("NonHermitianPotential", x, self.projection.weight)
        raw = self.projection(x).to(accumulation_dtype(x.dtype))
        v, rates = raw[..., : self.channels], raw[..., self.channels :]
        if self.adaptive_decay:
            gamma, memory = self.base_decay + softplus(rates[..., : self.channels]), rates[..., self.channels :]
        else:
            gamma, memory = torch.full_like(v, self.base_decay), rates
        if self.memory_bias is not None:
            memory = self.memory_bias.to(raw.dtype).expand(*x.shape[:2], -1)
        return Potential(v, gamma, self.memory_base_decay + softplus(memory))

    def extra_repr(self) -> str:
        """Return the number of channels and heads, and the floors."""
        return (
            f"channels={self.channels}, memory_heads={self.memory_heads}, base_decay={self.base_decay:g}, "
            f"memory_base_decay={self.memory_base_decay:g}, adaptive_decay={self.adaptive_decay}, dt={self.dt:g}"
        )

    def _initial_rates(self) -> list[float]:
        """Return ln 2/(half-life dt) for half-lives even in their logarithm, longest last."""
        low, high = (math.log(life) for life in HALF_LIVES)
        share = [head / max(self.memory_heads - 1, 1) for head in range(self.memory_heads)]
        return [math.log(2) / (math.exp(low + part * (high - low)) * self.dt) for part in share]


class DissipativeBKLayer(nn.Module):
    """Features of each token from the resolvent of a lossy chain over the tokens up to it.

    Parameters per channel: ``hopping`` (b = softplus, 0.5 at the start), ``backward_hopping`` (c itself, 0.5 at the
    start, only without ``hermitian``), ``z_real`` (0.1) and ``z_imaginary`` (Im z = 0.01 + softplus, 0.1 at the start).

    Args:
        d_model: D.
        channels: K.
        mode: ``"causal"``, or ``"full"``, in which later tokens enter: for encoders only.
        hermitian: hopping with c = b, for which |g| ≤ 1/(Γ + Im z) always; without it c is a number of either sign, and
            g has no bound.
        adaptive_hopping: b between t − 1 and t is softplus(raw + w·x_t) instead of one number per channel.
        include_gamma_in_h: whether Γ enters the resolvent; without it the rates act on a memory alone.
        memory_heads: as for ``NonHermitianPotential``, like ``base_decay``, ``memory_base_decay``, ``adaptive_decay``
            and ``dt``.
        base_decay: see there.
        memory_base_decay: see there.
        adaptive_decay: see there.
        dt: see there.
        backend: of ``ops.tridiagonal``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a width below 1, an unknown mode, or what ``NonHermitianPotential`` refuses.
    """

    def __init__(
        self,
        d_model: int,
        *,
        channels: int = 1,
        mode: Literal["causal", "full"] = "causal",
        hermitian: bool = True,
        adaptive_hopping: bool = False,
        include_gamma_in_h: bool = True,
        memory_heads: int = 0,
        base_decay: float = 1e-3,
        memory_base_decay: float = 1e-4,
        adaptive_decay: bool = True,
        dt: float = 1.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mode not in ("causal", "full"):
            raise ConfigError(f"DissipativeBKLayer: expected mode 'causal' or 'full', got {mode!r}.")
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.potential = NonHermitianPotential(
            d_model,
            channels=channels,
            memory_heads=memory_heads,
            base_decay=base_decay,
            memory_base_decay=memory_base_decay,
            adaptive_decay=adaptive_decay,
            dt=dt,
            **options,
        )
        self.mode, self.hermitian, self.backend = mode, hermitian, backend
        self.adaptive_hopping, self.include_gamma_in_h = adaptive_hopping, include_gamma_in_h
        self.hopping, self.z_real, self.z_imaginary = (nn.Parameter(torch.empty(channels, **options)) for _ in range(3))
        if not hermitian:
            self.backward_hopping = nn.Parameter(torch.empty(channels, **options))
        if adaptive_hopping:
            self.hopping_weight = nn.Parameter(torch.empty(channels, d_model, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set b = c = 0.5 and z = 0.1 + 0.1i, the weights of the hopping to N(0, 0.01/D), and the potential's own."""
        self.potential.reset_parameters()
        with torch.no_grad():
            self.hopping.fill_(_softplus_inverse(0.5))
            self.z_real.fill_(0.1)
            self.z_imaginary.fill_(_softplus_inverse(0.1 - LEAST_IMAGINARY))
            if not self.hermitian:
                self.backward_hopping.fill_(0.5)
            if self.adaptive_hopping:
                nn.init.normal_(self.hopping_weight, std=0.1 * self.hopping_weight.shape[1] ** -0.5)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        state: Complex[Tensor, "b k"] | None = None,
        segment_ids: Int[Tensor, "b n"] | None = None,
    ) -> Mixed:
        """Return features, state and potential.

        Args:
            x: activations of the dtype of the parameters; under autocast any that it casts (not float64).
            state: what the call on the tokens before returned; ``None`` or zeros at the start of a document.
            segment_ids: chains restart where the number changes. Give padding a number of its own.

        Raises:
            ShapeError: x is not (B, N, D) with N > 0, or state or ids do not fit it.
            DomainError: x is not real floating-point, or of another dtype than the parameters, the state has another
                precision, or the ids are no whole numbers.
            ConfigError: a state in mode ``"full"``, where the past cannot be summed up.
        """
        potential = self.potential(x)
        energies = torch.complex(potential.v, -potential.gamma * self.include_gamma_in_h)
        d = (energies - self.z().to(energies.dtype)).mT
        beta = self._couplings(x, d, segment_ids)
        if self.mode == "full":
            if state is not None:
                raise ConfigError("DissipativeBKLayer: expected no state in mode 'full', which reads the whole chain.")
            g, last = self._full(d, beta[..., 1:]), None
        else:
            state = torch.zeros_like(d[..., 0]) if state is None else state
            g, last = tridiagonal.advance(state, d, beta, backend=self.backend)
        return Mixed(torch.cat([g.real, g.imag], -2).mT, last, potential)

    def z(self) -> Complex[Tensor, " k"]:
        """Return where the resolvent is taken, in the upper half-plane."""
        wide = accumulation_dtype(self.z_real.dtype)
        return torch.complex(self.z_real.to(wide), LEAST_IMAGINARY + softplus(self.z_imaginary.to(wide)))

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"mode={self.mode!r}, hermitian={self.hermitian}, adaptive_hopping={self.adaptive_hopping}, "
            f"include_gamma_in_h={self.include_gamma_in_h}"
        )

    def _full(self, d: Tensor, beta: Tensor) -> Tensor:
        """Return G_ii of d = h − z, whose dissipation is built in."""
        one, origin = torch.ones_like(beta), torch.zeros_like(d[..., 0])
        return tridiagonal.green(d, beta, one, origin, mode="full", require_dissipation=False, backend=self.backend)

    def _couplings(self, x: Tensor, d: Tensor, segment_ids: Tensor | None) -> Tensor:
        """Return β (B, K, N) of each token to the one before it, 0 where a segment begins inside."""
        wide = d.real.dtype
        raw = self.hopping.to(wide)[:, None].expand(d.shape)
        if self.adaptive_hopping:
            raw = raw + nn.functional.linear(x, self.hopping_weight).to(wide).mT
        b = softplus(raw)
        beta = b * (b if self.hermitian else self.backward_hopping.to(wide)[:, None])
        if segment_ids is None:
            return beta
        if segment_ids.shape != x.shape[:2]:
            raise ShapeError(
                f"DissipativeBKLayer: expected segment_ids {tuple(x.shape[:2])} for x {tuple(x.shape)}, got "
                f"{tuple(segment_ids.shape)}."
            )
        if segment_ids.is_floating_point() or segment_ids.is_complex():
            raise DomainError(
                f"DissipativeBKLayer: expected whole numbers in segment_ids, got {segment_ids.dtype}; convert them."
            )
        continues = pad(segment_ids[:, 1:] == segment_ids[:, :-1], (1, 0), value=True)
        return torch.where(continues[:, None], beta, 0.0)


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


def _softplus_inverse(y: float) -> float:
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
    width = weight.shape[1]
    if x.ndim != 3 or x.shape[-1] != width or x.shape[1] == 0:
        raise ShapeError(f"{name}: expected x (B, N, {width}) with N > 0, got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise DomainError(f"{name}: expected real floating-point x, got {x.dtype}; convert it first.")
    cast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    if weight.is_floating_point() and x.dtype != weight.dtype and not cast:
        raise DomainError(f"{name}: expected x in the {weight.dtype} of the parameters, got {x.dtype}; convert either.")
