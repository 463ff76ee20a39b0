"""A mixer of tokens by the resolvent of a lossy tridiagonal operator (the BK layer).

    v, Γ, Γ^mem = affine in x_t,  the rates through γ + softplus(·)      V_t = v_t − iΓ_t
    H = V + hopping b between neighbours      y_t = [Re g_t, Im g_t],  g = causal or full diagonal of (H − z)⁻¹

Symbols: x activations (B, N, D); K channels, each a chain of its own over the tokens; v potentials and Γ ≥ γ decay
rates (B, N, K); Γ^mem decay rates (B, N, M) per unit of time for M heads of a memory; γ the floors; z (K,) in the upper
half-plane, Im z = 0.01 + softplus(·). A state ψ under i dψ/dt = Hψ loses d‖ψ‖²/dt = −2 ψ†Γψ: the rates enter the
resolvent, and a token with a large rate hides what came before it.
The couplings do not know positions, so chains have any length. Computed in float32 (float64 for float64), also under
autocast, and rounded once, to the dtype in which a linear layer would answer.
Cost: one projection of width 2K + M and ``ops.tridiagonal`` on B·K chains.
Operation: so8t_torch/ops/tridiagonal. Derivation: docs/math/tridiagonal.md.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype, autocast_dtype
from so8t_torch.core.tensors import expect_tensors_or_none
from so8t_torch.nn.non_hermitian_potential import (
    NonHermitianPotential,
    Potential,
    decay_statistics,
    softplus_inverse,
)
from so8t_torch.ops import tridiagonal

__all__ = ["DissipativeBKLayer", "Mixed", "NonHermitianPotential", "Potential", "decay_statistics"]

LEAST_IMAGINARY = 1e-2
"""Least Im z: from there on float32 keeps five digits over 65,536 sites (docs/math/tridiagonal.md)."""


class Mixed(NamedTuple):
    """What the layer gives.

    Attributes:
        features: Re g of all channels, then Im g (B, N, 2K), in the dtype of a linear layer's answer.
        state: g at the last token (B, K), to be handed back with the next tokens; ``None`` in mode ``"full"``.
        potential: what entered, for a memory that decays with it.
    """

    features: Float[Tensor, "b n c"]
    state: Complex[Tensor, "b k"] | None
    potential: Potential


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
        include_gamma_in_h: whether chains have rates, which enter the resolvent; without it Γ = 0, and the projection
            gives no rates but those of the memory.
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
            chain_decay=include_gamma_in_h,
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
            self.hopping.fill_(softplus_inverse(0.5))
            self.z_real.fill_(0.1)
            self.z_imaginary.fill_(softplus_inverse(0.1 - LEAST_IMAGINARY))
            if not self.hermitian:
                self.backward_hopping.fill_(0.5)
            if self.adaptive_hopping:
                nn.init.normal_(self.hopping_weight, std=0.1 * self.hopping_weight.shape[1] ** -0.5)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        state: Complex[Tensor, "b k"] | None = None,
        segment_ids: Int[Tensor, "*#b n"] | None = None,
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        shift: Float[Tensor, "b n k"] | None = None,
    ) -> Mixed:
        """Return features, state and potential.

        Args:
            x: activations of the dtype of the parameters; under autocast any that it casts (not float64).
            state: what the call on the tokens before returned; ``None`` or zeros at the start of a document.
            segment_ids: chains restart where the number changes; (N,) holds for all rows. Without a padding_mask give
                padding a number of its own.
            padding_mask: False where a token is padding, behind the other tokens of its row: the state is theirs.
            shift: is added to v, by a memory of the tokens before.

        Raises:
            ShapeError: x is not (B, N, D) with N > 0, or state or ids do not fit it.
            DomainError: x is not real floating-point, or of another dtype than the parameters, the state has another
                precision, or the ids are no whole numbers.
            ConfigError: a state in mode ``"full"``, where the past cannot be summed up.
        """
        expect_tensors_or_none(
            "DissipativeBKLayer", state=state, segment_ids=segment_ids, padding_mask=padding_mask, shift=shift
        )
        potential = self.potential(x)
        if shift is not None:
            potential = potential._replace(v=potential.v + shift.to(potential.v.dtype))
        energies = potential.values
        d = (energies - self.z().to(energies.dtype)).mT
        beta = self._couplings(x, d, segment_ids)
        if padding_mask is not None:
            _check_padding(x, padding_mask)
            beta = torch.where(padding_mask[:, None], beta, 0.0)
        if self.mode == "full":
            if state is not None:
                raise ConfigError("DissipativeBKLayer: expected no state in mode 'full', which reads the whole chain.")
            g, last = self._full(d, beta[..., 1:]), None
        else:
            state = torch.zeros_like(d[..., 0]) if state is None else state
            g, last = self._advanced(state, d, beta)
            if padding_mask is not None:
                last = _last(g, state, padding_mask)
        features = torch.cat([g.real, g.imag], -2).mT.to(autocast_dtype(x) or x.dtype)
        return Mixed(features, last, potential)

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

    def _advanced(self, state: Tensor, d: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the causal g, and the state after the last token; a single token needs no run."""
        if d.shape[-1] > 1:
            return tridiagonal.advance(state, d, beta, backend=self.backend)
        g, last = tridiagonal.step(state, d[..., 0], beta[..., 0].to(d.dtype))
        return g[..., None], last

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
        rows, length = x.shape[:2]
        if segment_ids.shape not in ((length,), (1, length), (rows, length)):
            raise ShapeError(
                f"DissipativeBKLayer: expected segment_ids {(rows, length)} or {(length,)} for x {tuple(x.shape)}, got "
                f"{tuple(segment_ids.shape)}."
            )
        if segment_ids.is_floating_point() or segment_ids.is_complex():
            raise DomainError(
                f"DissipativeBKLayer: expected whole numbers in segment_ids, got {segment_ids.dtype}; convert them."
            )
        continues = pad(segment_ids[..., 1:] == segment_ids[..., :-1], (1, 0), value=True)
        return torch.where(continues[..., None, :], beta, 0.0)


def _check_padding(x: Tensor, padding_mask: Tensor) -> None:
    """Raise unless the mask has one truth value per token."""
    if padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool:
        raise ShapeError(
            f"DissipativeBKLayer: expected a boolean padding_mask {tuple(x.shape[:2])}, True where a token counts, got "
            f"{padding_mask.dtype} {tuple(padding_mask.shape)}."
        )


def _last(g: Tensor, state: Tensor, padding_mask: Tensor) -> Tensor:
    """Return g (B, K, N) at the last token of each row that is none of padding, or what entered where there is none."""
    counts = padding_mask.sum(1)[:, None]
    places = (counts - 1).clamp(min=0).expand(state.shape)[..., None]
    return torch.where(counts > 0, g.gather(-1, places)[..., 0], state)
