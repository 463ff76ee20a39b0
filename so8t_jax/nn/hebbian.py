"""A mixer of tokens by fast weights that forget: every head writes values under keys and reads them with queries.

    q, k, v linear in x_t,  Γ_t = γ + softplus(affine in x_t),  η constant, per head, or per token
    S_t = e^{−Γ_t dt} S_{t−1} + η_t k̂_t v_tᵀ,    y_t = S_tᵀ q_t / √K,    out = W (y_t / rms(y_t)) + b
    feedback: δv = g · mean over heads of ⟨P, S⟩

Symbols: x activations (N, D) of one example; H heads, keys of K = V = head_dim channels, k̂ a key of norm one; Γ ≥ γ
decay rates per unit of time; S (H, K, V) the state, an argument and a result.
Definition: so8t_jax/ops/hebbian.py. Derivation: docs/math/hebbian.md.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from so8t_jax.nn.non_hermitian_potential import half_life_rates, softplus_inverse
from so8t_jax.ops import hebbian

__all__ = ["DissipativeHebbianLayer", "Tokens"]

HALF_LIVES = (4.0, 4096.0)
"""Shortest and longest half-life of the heads at the start, in tokens."""


class Tokens(NamedTuple):
    """What the recurrence takes from tokens: q, k, v (N, H, K), Γ dt and η (N, H)."""

    q: Array
    k: Array
    v: Array
    decay: Array
    eta: Array


class DissipativeHebbianLayer(nnx.Module):
    """Fast weights per head, written and read by projections of the tokens.

    Args:
        d_model: D.
        num_heads: H.
        head_dim: K = V.
        eta: write strength: of all tokens, of all heads at the start, or the most that a token's gate gives.
        eta_mode: ``"constant"``, ``"head"`` (softplus of a parameter), ``"token"`` (eta · σ(affine in x)).
        rule: of ``ops.hebbian``, as are ``discretization`` and ``key_norm``.
        discretization: see there; ``"zoh"`` makes dt a matter of sampling alone.
        key_norm: see there.
        own_decay: whether Γ is made here; without it every call brings it along.
        base_decay: γ, the least rate.
        dt: time from token to token.
        norm_eps: floor in the mean square of what a head reads, under the root.
        feedback_channels: potentials that ``potential_feedback`` gives; 0 for none.
        param_dtype: of the parameters.
        rngs: source of the initial weights.
    """

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
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, head_dim
        self.eta, self.eta_mode, self.base_decay, self.dt, self.norm_eps = eta, eta_mode, base_decay, dt, norm_eps
        self.rule, self.discretization, self.key_norm = rule, discretization, key_norm
        width = num_heads * head_dim

        def linear(inputs: int, outputs: int, *, use_bias: bool, gain: float = 1.0) -> nnx.Linear:
            initial = nnx.initializers.normal(gain * inputs**-0.5)
            return nnx.Linear(
                inputs, outputs, use_bias=use_bias, kernel_init=initial, param_dtype=param_dtype, rngs=rngs
            )

        self.q_proj, self.k_proj, self.v_proj = (linear(d_model, width, use_bias=False) for _ in range(3))
        self.out_proj = linear(width, d_model, use_bias=True)
        self.norm_weight = nnx.Param(jnp.ones((num_heads, head_dim), param_dtype))
        self.gamma_proj = nnx.data(None)
        if own_decay:
            self.gamma_proj = linear(d_model, num_heads, use_bias=True, gain=0.1)
            rates = [softplus_inverse(rate - base_decay) for rate in half_life_rates(num_heads, HALF_LIVES, dt)]
            self.gamma_proj.bias[...] = jnp.asarray(rates, param_dtype)
        token = eta_mode == "token"
        self.eta_proj = linear(d_model, num_heads, use_bias=True, gain=0.1) if token else nnx.data(None)
        raw = jnp.full(num_heads, softplus_inverse(eta), param_dtype)
        self.eta_raw = nnx.Param(raw) if eta_mode == "head" else nnx.data(None)
        self.feedback_weight = self.feedback_gate = nnx.data(None)
        if feedback_channels:
            noise = jax.random.normal(rngs.params(), (feedback_channels, head_dim, head_dim), param_dtype)
            self.feedback_weight = nnx.Param(noise / head_dim)
            self.feedback_gate = nnx.Param(jnp.zeros(feedback_channels, param_dtype))

    def __call__(
        self,
        x: Float[Array, "n d"],
        state: Float[Array, "h k v"] | None = None,
        segment_ids: Int[Array, " n"] | None = None,
        *,
        padding_mask: Bool[Array, " n"] | None = None,
        gamma: Float[Array, "n h"] | None = None,
    ) -> tuple[Float[Array, "n d"], Float[Array, "h k v"]]:
        """Return the mixed tokens, and the state after the last one.

        Args:
            x: activations.
            state: what the call on the tokens before returned; ``None`` or zeros at the start of a document.
            segment_ids: the memory is empty where the number changes.
            padding_mask: False where a token is padding: it neither writes nor forgets.
            gamma: Γ of every token and head, exactly where ``own_decay`` is off.

        Raises:
            ValueError: Γ is missing, or given beside the layer's own.
        """
        tokens = self.tokens(x, padding_mask=padding_mask, gamma=gamma)
        start = jnp.zeros((self.num_heads, self.head_dim, self.head_dim), x.dtype) if state is None else state
        y, last = hebbian.hebbian(*tokens, start, segment_ids, **self.options())
        return self.out(y), last

    def tokens(
        self,
        x: Float[Array, "n d"],
        *,
        padding_mask: Bool[Array, " n"] | None = None,
        gamma: Array | None = None,
        keyed: Float[Array, "n d"] | None = None,
    ) -> Tokens:
        """Return what the recurrence takes from tokens, those of padding without effect.

        Args:
            x: activations.
            padding_mask: as for the call.
            gamma: as for the call.
            keyed: what keys are made of; x without.

        Raises:
            ValueError: as the call.
        """
        if (gamma is None) is (self.gamma_proj is None):
            raise ValueError("expected gamma exactly where the layer was built with own_decay=False")
        if padding_mask is not None:
            x = jnp.where(padding_mask[:, None], x, 0.0)
        maps = ((self.q_proj, x), (self.k_proj, x if keyed is None else keyed), (self.v_proj, x))
        q, k, v = (project(made_of).reshape(len(x), self.num_heads, self.head_dim) for project, made_of in maps)
        if self.gamma_proj is not None:
            gamma = self.base_decay + jax.nn.softplus(self.gamma_proj(x))
        assert gamma is not None
        decay, eta = gamma * self.dt, self._strength(x)
        if self.discretization == "zoh":
            eta = eta * self.dt
        if padding_mask is not None:
            decay, eta = (jnp.where(padding_mask[:, None], part, 0.0) for part in (decay, eta))
        return Tokens(q * self.head_dim**-0.5, k, v, decay, eta)

    def out(self, y: Float[Array, "n h v"]) -> Float[Array, "n d"]:
        """Return the projection of what the heads read, each divided by its root mean square.

        Args:
            y: what the heads read.
        """
        level = y * jax.lax.rsqrt((y**2).mean(-1, keepdims=True) + self.norm_eps) * self.norm_weight[...][None]
        return self.out_proj(level.reshape(len(y), -1))

    def potential_feedback(self, state: Float[Array, "h k v"]) -> Float[Array, " c"]:
        """Return δv = g · mean over heads of ⟨P, S⟩, for the potential of the tokens that come after S.

        Args:
            state: what the tokens before left.

        Raises:
            ValueError: the layer was built without feedback.
        """
        if self.feedback_weight is None or self.feedback_gate is None:
            raise ValueError("expected feedback_channels of 1 or more for a feedback")
        found = jnp.einsum("hkv,ckv->c", state, self.feedback_weight[...].astype(state.dtype))
        return self.feedback_gate[...].astype(state.dtype) * found / self.num_heads

    def options(self) -> dict[str, Any]:
        """Return the options of ``ops.hebbian``."""
        return {"rule": self.rule, "discretization": self.discretization, "key_norm": self.key_norm}

    def _strength(self, x: Array) -> Array:
        """Return η (N, H)."""
        if self.eta_proj is not None:
            return self.eta * jax.nn.sigmoid(self.eta_proj(x))
        if self.eta_raw is not None:
            return jnp.broadcast_to(jax.nn.softplus(self.eta_raw[...]), (len(x), self.num_heads))
        return jnp.full((len(x), self.num_heads), self.eta, x.dtype)
