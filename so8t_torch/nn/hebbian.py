"""A mixer of tokens by fast weights that forget: every head writes values under keys and reads them with queries.

    q, k, v linear in x_t,  Γ_t = γ + softplus(affine in x_t),  η constant, per head, or per token
    S_t = e^{−Γ_t dt} S_{t−1} + η_t k̂_t v_tᵀ,    y_t = S_tᵀ q_t / √K,    out = W (y_t / rms(y_t)) + b
    feedback: δv = g · mean over heads of ⟨P, S⟩, for a potential that the next chunk of tokens sees

Symbols: x activations (B, N, D); H heads, keys of K = V = head_dim channels, k̂ a key of norm one; Γ ≥ γ decay rates per
unit of time; S (B, H, K, V) the state, an argument and a result and never an attribute, float32 or float64.
Under autocast the projections to q, k, v and the output are rounded; rates, strengths and the recurrence are not.
Cost: four projections and ``ops.hebbian``. Operation: so8t_torch/ops/hebbian. Derivation: docs/math/hebbian.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import rms_norm, softplus

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none
from so8t_torch.ops import hebbian
from so8t_torch.ops.hebbian.arguments import check_options

__all__ = ["DissipativeHebbianLayer", "Tokens"]

HALF_LIVES = (4.0, 4096.0)
"""Shortest and longest half-life of the heads at the start, in tokens."""


class Tokens(NamedTuple):
    """What the recurrence takes from tokens: decay and eta as they act, (B, N, H)."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    eta: Tensor


class DissipativeHebbianLayer(nn.Module):
    """Fast weights per head, written and read by projections of the tokens.

    At the start the half-lives of the heads spread evenly in their logarithm from 4 to 4,096 tokens.

    Args:
        d_model: D.
        num_heads: H.
        head_dim: K = V.
        eta: write strength: of all tokens, of all heads at the start, or the most that a token's gate gives.
        eta_mode: ``"constant"``, ``"head"`` (softplus of a parameter), ``"token"`` (eta · σ(affine in x), ½ eta at the
            start).
        rule: of ``ops.hebbian``, as are ``discretization``, ``key_norm`` and ``backend``.
        discretization: see there; ``"zoh"`` makes dt a matter of sampling alone.
        key_norm: see there.
        own_decay: whether Γ is made here; without it every call brings it along.
        base_decay: γ, the least rate.
        dt: time from token to token.
        norm_eps: floor in the mean square of what a head reads, under the root.
        feedback_channels: potentials that ``potential_feedback`` gives; 0 for none.
        backend: see there.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a size below 1, an unknown mode, or a number that is not positive.
    """

    eta_raw: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        num_heads: int = 8,
        head_dim: int = 64,
        *,
        eta: float = 0.1,
        eta_mode: Literal["constant", "head", "token"] = "constant",
        rule: Literal["hebb", "delta"] = "hebb",
        discretization: Literal["euler", "zoh"] = "zoh",
        key_norm: Literal["l2", "none"] = "l2",
        own_decay: bool = True,
        base_decay: float = 1e-4,
        dt: float = 1.0,
        norm_eps: float = 1e-6,
        feedback_channels: int = 0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(d_model, num_heads, head_dim, feedback_channels, eta_mode)
        check_options("DissipativeHebbianLayer", rule=rule, discretization=discretization, key_norm=key_norm)
        _check_numbers(eta=eta, base_decay=base_decay, dt=dt, norm_eps=norm_eps)
        longest = math.log(2) / (HALF_LIVES[1] * dt)
        if own_decay and base_decay >= longest:
            raise ConfigError(
                f"DissipativeHebbianLayer: expected base_decay below {longest:g}, the rate of the longest half-life at "
                f"the start, got {base_decay!r}."
            )
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, head_dim
        self.eta, self.eta_mode, self.base_decay, self.dt, self.norm_eps = eta, eta_mode, base_decay, dt, norm_eps
        self.rule, self.discretization, self.key_norm, self.backend = rule, discretization, key_norm, backend
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        width = num_heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, width, bias=False, **options) for _ in range(3))
        self.out_proj = nn.Linear(width, d_model, **options)
        self.norm_weight = nn.Parameter(torch.empty(num_heads, head_dim, **options))
        self.gamma_proj = nn.Linear(d_model, num_heads, **options) if own_decay else None
        self.eta_proj = nn.Linear(d_model, num_heads, **options) if eta_mode == "token" else None
        raw = nn.Parameter(torch.empty(num_heads, **options)) if eta_mode == "head" else None
        self.register_parameter("eta_raw", raw)
        self.feedback_weight = self.feedback_gate = None
        if feedback_channels:
            self.feedback_weight = nn.Parameter(torch.empty(feedback_channels, head_dim, head_dim, **options))
            self.feedback_gate = nn.Parameter(torch.empty(feedback_channels, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set projections to N(0, 1/width), the half-lives, η, norms of one, and the feedback's gate to zero."""
        with torch.no_grad():
            for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
            self.out_proj.bias.zero_()
            self.norm_weight.fill_(1.0)
            if self.gamma_proj is not None:
                nn.init.normal_(self.gamma_proj.weight, std=0.1 * self.d_model**-0.5)
                rates = [_softplus_inverse(rate - self.base_decay) for rate in self._initial_rates()]
                self.gamma_proj.bias.copy_(torch.tensor(rates, dtype=torch.float64))
            if self.eta_proj is not None:
                nn.init.normal_(self.eta_proj.weight, std=0.1 * self.d_model**-0.5)
                self.eta_proj.bias.zero_()
            if self.eta_raw is not None:
                self.eta_raw.fill_(_softplus_inverse(self.eta))
            if self.feedback_weight is not None and self.feedback_gate is not None:
                nn.init.normal_(self.feedback_weight, std=1.0 / self.head_dim)
                self.feedback_gate.zero_()

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        state: Float[Tensor, "b h k v"] | None = None,
        segment_ids: Int[Tensor, "*#b n"] | None = None,
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        gamma: Float[Tensor, "b n h"] | None = None,
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b h k v"]]:
        """Return the mixed tokens, and the state after the last one.

        Args:
            x: activations of the dtype of the parameters; any floating dtype under autocast.
            state: what the call on the tokens before returned; ``None``, or zeros in a row, at the start of a document.
            segment_ids: the memory is empty where the number changes; (N,) holds for all rows.
            padding_mask: False where a token is padding: it neither writes nor forgets, whatever stands there.
            gamma: Γ of every token and head, exactly where ``own_decay`` is off.

        Raises:
            ShapeError: x is not (B, N, D) with N > 0, or another argument does not fit it.
            DomainError: x is not real floating-point, or a rate is negative.
            ConfigError: Γ is missing, or given beside the layer's own.
        """
        expect_tensors_or_none("DissipativeHebbianLayer", state=state, segment_ids=segment_ids)
        y, last = self.recur(self.tokens(x, padding_mask, gamma), state, segment_ids)
        return self.output(y), last

    def forward_step(
        self,
        x: Float[Tensor, "b d"],
        state: Float[Tensor, "b h k v"] | None = None,
        *,
        gamma: Float[Tensor, "b h"] | None = None,
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b h k v"]]:
        """Return one mixed token, and the state that it leaves: ``forward`` on one token, without a run.

        Args:
            x: activations of one token.
            state: what the token before left.
            gamma: as for ``forward``.

        Raises:
            ShapeError, DomainError, ConfigError: as ``forward``.
        """
        expect_tensors("DissipativeHebbianLayer", x=x)
        expect_tensors_or_none("DissipativeHebbianLayer", state=state, gamma=gamma)
        y, last = self.recur_step(self.tokens(x[:, None], None, None if gamma is None else gamma[:, None]), state)
        return self.output(y)[:, 0], last

    def potential_feedback(self, state: Float[Tensor, "b h k v"]) -> Float[Tensor, "b c"]:
        """Return δv = g · mean over heads of ⟨P, S⟩, to be added to the potential of the tokens that come after S.

        Causal as long as the caller gives the state that entered a chunk to the tokens of that chunk. The gate g starts
        at zero: P trains once g has left it.

        Args:
            state: what the tokens before left.

        Raises:
            ConfigError: the layer was built without feedback.
            ShapeError: the state has not a matrix of each head.
        """
        if self.feedback_weight is None or self.feedback_gate is None:
            raise ConfigError("DissipativeHebbianLayer: expected feedback_channels of 1 or more for a feedback.")
        matrices = self.num_heads, self.head_dim, self.head_dim
        if state.ndim != 4 or state.shape[1:] != matrices:
            raise ShapeError(
                f"DissipativeHebbianLayer: expected a state (B, {', '.join(map(str, matrices))}), "
                f"got {tuple(state.shape)}."
            )
        with without_autocast(state.device):
            weight, gate = self.feedback_weight.to(state.dtype), self.feedback_gate.to(state.dtype)
            return gate * torch.einsum("bhkv,ckv->bc", state, weight) / self.num_heads

    @torch.no_grad()
    def monitor(
        self,
        x: Float[Tensor, "b n d"],
        state: Float[Tensor, "b h k v"] | None = None,
        segment_ids: Int[Tensor, "*#b n"] | None = None,
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        gamma: Float[Tensor, "b n h"] | None = None,
        slack: float = 1e-3,
    ) -> dict[str, Tensor]:
        """Return the books of the memory per token and head, as tensors on the device.

        Args:
            x: as for ``forward``.
            state: as for ``forward``.
            segment_ids: as for ``forward``.
            padding_mask: as for ``forward``.
            gamma: as for ``forward``.
            slack: share by which rounding may exceed the bound.

        Returns:
            ``gamma``, ``half_life`` in tokens, ``energy``, ``entering`` (that of the token before), ``dissipation``,
            ``supply`` and ``balance_residual`` (B, N, H), for the rule "hebb" ``bound`` of ‖S‖ and ``within_bound``.
        """
        tokens = self.tokens(x, padding_mask, gamma)
        return {
            "gamma": tokens.decay / self.dt,
            "half_life": math.log(2) / tokens.decay,
            **self.books(tokens, state, segment_ids, slack),
        }

    @torch.no_grad()
    def books(
        self, tokens: Tokens, state: Tensor | None, segment_ids: Tensor | None, slack: float = 1e-3
    ) -> dict[str, Tensor]:
        """Return what ``monitor`` does but the rates, of tokens as the recurrence takes them."""
        _, k, v, decay, eta = tokens
        balance = hebbian.energy_balance(k, v, decay, eta, state, segment_ids, **self._options())
        found = {
            "energy": balance.energy,
            "entering": balance.entering,
            "dissipation": balance.dissipation,
            "supply": balance.supply,
            "balance_residual": balance.residual,
        }
        if self.rule == "hebb":
            options = {name: value for name, value in self._options().items() if name != "rule"}
            bound = hebbian.state_bound(k, v, decay, eta, state, segment_ids, **options)
            # rounding may leave the energy of a state that has been erased below zero
            found |= {"bound": bound, "within_bound": (2 * balance.energy).clamp(min=0).sqrt() <= (1 + slack) * bound}
        return found

    def extra_repr(self) -> str:
        """Return sizes and options."""
        return (
            f"num_heads={self.num_heads}, head_dim={self.head_dim}, eta={self.eta:g}, eta_mode={self.eta_mode!r}, "
            f"rule={self.rule!r}, discretization={self.discretization!r}, key_norm={self.key_norm!r}, dt={self.dt:g}"
        )

    def recur(self, tokens: Tokens, state: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what tokens (B, N, H, ·) read, and the state after them."""
        started = self._started(tokens, state)
        return hebbian.hebbian(*tokens, started, segment_ids, **self._options(), backend=self.backend)

    def recur_step(self, tokens: Tokens, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what rows of one token (B, 1, H, ·) read, and the state after it: ``recur`` without a run."""
        started = self._started(tokens, state)
        with without_autocast(started.device):
            y, last = hebbian.step(started, *(part[:, 0] for part in tokens), **self._options())
        return y[:, None], last

    def tokens(
        self, x: Tensor, padding_mask: Tensor | None, gamma: Tensor | None, keyed: Tensor | None = None
    ) -> Tokens:
        """Return what the recurrence takes from tokens (B, N, D), their keys from ``keyed`` where it is given."""
        self._check(x, padding_mask, gamma)
        keyed = x if keyed is None else keyed
        if padding_mask is not None:
            x, keyed = (torch.where(padding_mask[..., None], part, 0.0) for part in (x, keyed))
        q, k, v = (
            projection(part).unflatten(-1, (self.num_heads, self.head_dim))
            for projection, part in ((self.q_proj, x), (self.k_proj, keyed), (self.v_proj, x))
        )
        kind = accumulation_dtype(x.dtype)
        if gamma is None:
            assert self.gamma_proj is not None
            gamma = self.base_decay + softplus(_unrounded(self.gamma_proj, x, kind))
        decay, eta = gamma.to(kind) * self.dt, self._strength(x, kind)
        if self.discretization == "zoh":
            eta = eta * self.dt
        if padding_mask is not None:
            decay, eta = (torch.where(padding_mask[..., None], part, 0.0) for part in (decay, eta))
        return Tokens(q * self.head_dim**-0.5, k, v, decay, eta)

    def _strength(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """Return η (B, N, H)."""
        shape = (*x.shape[:2], self.num_heads)
        if self.eta_proj is not None:
            return self.eta * torch.sigmoid(_unrounded(self.eta_proj, x, kind))
        if self.eta_raw is not None:
            return softplus(self.eta_raw.to(kind)).expand(shape)
        return torch.full(shape, self.eta, dtype=kind, device=x.device)

    def _options(self) -> dict[str, Any]:
        return {"rule": self.rule, "discretization": self.discretization, "key_norm": self.key_norm}

    def _started(self, tokens: Tokens, state: Tensor | None) -> Tensor:
        """Return the state that enters, which is carried in float32 even where tokens are not."""
        if state is not None:
            return state
        shape = (len(tokens.v), self.num_heads, self.head_dim, self.head_dim)
        return tokens.v.new_zeros(shape, dtype=accumulation_dtype(tokens.v.dtype))

    def output(self, y: Tensor) -> Tensor:
        """Return the projection of what the heads read, each divided by its root mean square."""
        kind = accumulation_dtype(y.dtype)
        level = rms_norm(y.to(kind), (self.head_dim,), eps=self.norm_eps) * self.norm_weight.to(kind)
        return self.out_proj(level.flatten(-2).to(y.dtype))

    def _initial_rates(self) -> list[float]:
        """Return ln 2/(half-life · dt) for half-lives even in their logarithm, longest last."""
        low, high = (math.log(life) for life in HALF_LIVES)
        share = [head / max(self.num_heads - 1, 1) for head in range(self.num_heads)]
        return [math.log(2) / (math.exp(low + part * (high - low)) * self.dt) for part in share]

    def _check(self, x: Tensor, padding_mask: Tensor | None, gamma: Tensor | None) -> None:
        """Raise unless the arguments fit."""
        expect_tensors("DissipativeHebbianLayer", x=x)
        expect_tensors_or_none("DissipativeHebbianLayer", padding_mask=padding_mask, gamma=gamma)
        if x.ndim != 3 or 0 in x.shape[1:] or x.shape[-1] != self.d_model:
            raise ShapeError(
                f"DissipativeHebbianLayer: expected activations (B, N, {self.d_model}) with N > 0, "
                f"got {tuple(x.shape)}."
            )
        if not x.is_floating_point():
            raise DomainError(f"DissipativeHebbianLayer: expected real floating activations, got {x.dtype}.")
        if padding_mask is not None and (padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool):
            raise ShapeError(
                f"DissipativeHebbianLayer: expected a boolean padding_mask {tuple(x.shape[:2])}, True where a token "
                f"counts, got {padding_mask.dtype} {tuple(padding_mask.shape)}."
            )
        if (gamma is None) is (self.gamma_proj is None):
            raise ConfigError(
                "DissipativeHebbianLayer: expected gamma exactly where the layer was built with own_decay=False."
            )
        if gamma is not None and gamma.shape != (*x.shape[:2], self.num_heads):
            raise ShapeError(
                f"DissipativeHebbianLayer: expected gamma {(*x.shape[:2], self.num_heads)}, got {tuple(gamma.shape)}."
            )


def _unrounded(projection: nn.Linear, x: Tensor, kind: torch.dtype) -> Tensor:
    """Return a projection in the dtype of its parameters, autocast or not: a rate of 10⁻⁴ is a logit of −9 ± 2⁻⁵."""
    with without_autocast(x.device):
        return projection(x.to(projection.weight.dtype)).to(kind)


def _check_sizes(d_model: int, num_heads: int, head_dim: int, feedback_channels: int, eta_mode: str) -> None:
    """Raise ConfigError unless sizes are at least 1 and the mode is known."""
    if min(d_model, num_heads, head_dim) < 1 or feedback_channels < 0:
        raise ConfigError(
            f"DissipativeHebbianLayer: expected d_model, num_heads and head_dim of 1 or more, and feedback_channels of "
            f"0 or more, got {d_model}, {num_heads}, {head_dim} and {feedback_channels}."
        )
    if eta_mode not in ("constant", "head", "token"):
        raise ConfigError(
            f"DissipativeHebbianLayer: expected eta_mode 'constant', 'head' or 'token', got {eta_mode!r}."
        )


def _check_numbers(**numbers: float) -> None:
    """Raise ConfigError unless all are positive and finite."""
    for name, value in numbers.items():
        if not 0.0 < value < math.inf:
            raise ConfigError(f"DissipativeHebbianLayer: expected {name} > 0, got {value!r}.")


def _softplus_inverse(y: float) -> float:
    """Return x with softplus(x) = y."""
    return y + math.log(-math.expm1(-y))
