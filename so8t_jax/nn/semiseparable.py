"""A mixer of tokens whose rank adapts: a causal band plus a gated, decayed semiseparable matrix (the AR-SSM layer).

    g_t = gate(W₂ relu(W₁ x_t))      u_t = (U x_t) ⊙ g_t      v_t = (V x_t) ⊙ g_t      α_t = exp(−Δ_t λ)
    operator: y_t = Σ_j taps_j ⊙ x_{t−j} + W_o S_tᵀ v_t + b_o,   S_t = diag(α_t) S_{t−1} + (1 − α_t) ⊙ u_t (W_x x_t)ᵀ
    compat:   y_t = Σ_j taps_j ⊙ x_{t−j} + W_o (k_t ⊙ v_t) + b_o,   k_t = α_t ⊙ k_{t−1} + (1 − α_t) ⊙ u_t

Symbols: x activations (T, D) of one example; g gates, u, v what is written and read (T, R); λ (R,) trained rates per
unit of time; Δ_t = 1, or softplus of a projection of x_t. Without decays α = 1 and u is written as it is. Padding has
g = 0 and Δ = 0, and is none of the neighbours x_{t−j}. Complex rates: so8t_jax/nn/semiseparable_rotation.py.
Definitions: so8t_jax/ops/rank_gate.py, so8t_jax/ops/semiseparable.py. Derivation: docs/math/semiseparable.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from so8t_jax.nn.semiseparable_rotation import Rotation
from so8t_jax.ops import rank_gate, semiseparable

__all__ = ["AdaptiveRankSemiseparableLayer", "State"]

MODES: dict[str, Literal["soft", "straight_through", "binary_concrete"]] = {
    "soft": "soft",
    "ste": "straight_through",
    "gumbel": "binary_concrete",
}
"""Names of the layer's gate modes, and the room's."""
HALF_LIVES = (2.0, 4096.0)
"""Shortest and longest half-life of multi-scale decays at the start, in tokens."""
UNIFORM_HALF_LIFE = 64.0
"""Half-life of all channels at the start, in tokens, without multi-scale decays."""


class State(NamedTuple):
    """What the tokens so far leave for the next ones.

    Attributes:
        mixer: S (R, D), or k (R,) of the core ``compat``; real and then imaginary parts of a rotating layer.
        band: the last K − 1 inputs (K − 1, D).
    """

    mixer: Array
    band: Array


class AdaptiveRankSemiseparableLayer(nnx.Module):
    """A causal band plus a semiseparable matrix with gated rank channels.

    Args:
        d_model: D.
        max_rank: R.
        min_rank: channels that are open at every token. Where that is all of them there is no gate.
        gate_hidden_dim: width inside the gate, max(D/4, min_rank) by default.
        l1_regularization: weight of the mean gate in ``gate_l1_loss``.
        core: ``"operator"`` acts on W_x x with a state (R, D); ``"compat"`` has one number per rank channel.
        decays: half-lives even in their logarithm from 2 to 4,096 tokens at the start, all 64, or no decay.
        adaptive_time_step: Δ depends on token and channel; 1 on average at the start.
        rotating: rates are complex: states turn while they decay, and have twice the numbers.
        band_width: K, taps of the band.
        gate_mode: ``"soft"``, ``"ste"`` or ``"gumbel"``.
        gumbel_temperature: of the samples of ``"gumbel"``.
        hard: gates are exactly 0 or 1 in mode ``"gumbel"``; by default in evaluation only.
        active_rank: channels that may be open, all by default.
        param_dtype: of the parameters.
        rngs: source of the initial weights.

    Raises:
        ValueError: an unknown core, decay or gate mode, or adaptive time steps or a rotation without decays.
    """

    def __init__(
        self,
        d_model: int,
        max_rank: int = 32,
        min_rank: int = 4,
        *,
        gate_hidden_dim: int | None = None,
        l1_regularization: float = 1e-3,
        core: Literal["operator", "compat"] = "operator",
        decays: Literal["multi_scale", "uniform", "none"] = "multi_scale",
        adaptive_time_step: bool = False,
        rotating: bool = False,
        band_width: int = 3,
        gate_mode: Literal["soft", "ste", "gumbel"] = "soft",
        gumbel_temperature: float = 1.0,
        hard: bool | None = None,
        active_rank: int | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        _check(core, decays, gate_mode, {"a time step": adaptive_time_step, "a rotation": rotating})
        self.max_rank, self.min_rank, self.active_rank = max_rank, min_rank, active_rank
        self.l1_regularization, self.core = l1_regularization, core
        self.gate_mode: str = gate_mode
        self.gumbel_temperature, self.hard = gumbel_temperature, hard

        def linear(inputs: int, outputs: int, use_bias: bool = True) -> nnx.Linear:
            xavier = nnx.initializers.xavier_uniform()
            return nnx.Linear(
                inputs, outputs, use_bias=use_bias, kernel_init=xavier, param_dtype=param_dtype, rngs=rngs
            )

        hidden = max(d_model // 4, min_rank) if gate_hidden_dim is None else gate_hidden_dim
        gated = min_rank < max_rank
        layers = (linear(d_model, hidden), jax.nn.relu, linear(hidden, max_rank)) if gated else ()
        self.gate = nnx.Sequential(*layers) if gated else nnx.data(None)
        numbers = 2 * max_rank if rotating else max_rank
        self.u_proj, self.v_proj = (linear(d_model, numbers, use_bias=False) for _ in range(2))
        self.taps = nnx.Param(0.02 * jax.random.normal(rngs.params(), (band_width, d_model), param_dtype))
        operates = core == "operator"
        self.value_proj = linear(d_model, d_model, use_bias=False) if operates else nnx.data(None)
        self.output_proj = linear(d_model if operates else max_rank, d_model)
        low, high = HALF_LIVES if decays == "multi_scale" else (UNIFORM_HALF_LIFE, UNIFORM_HALF_LIFE)
        half_lives = jnp.geomspace(low, high, max_rank)
        logs = jnp.log(math.log(2.0) / half_lives).astype(param_dtype)
        self.log_rates = nnx.data(None) if decays == "none" else nnx.Param(logs)
        self.rotation = Rotation(half_lives.astype(param_dtype)) if rotating else nnx.data(None)
        self.time_step = nnx.data(None)
        if adaptive_time_step:
            self.time_step = linear(d_model, max_rank)
            self.time_step.bias[...] = jnp.full(max_rank, math.log(math.expm1(1.0)), param_dtype)

    def __call__(
        self,
        x: Float[Array, "t d"],
        state: State | None = None,
        segment_ids: Int[Array, " t"] | None = None,
        *,
        padding_mask: Bool[Array, " t"] | None = None,
        training: bool = False,
        noise: Float[Array, "t r"] | None = None,
    ) -> tuple[Float[Array, "t d"], dict[str, Any]]:
        """Return y, and what it was made of.

        Args:
            x: activations.
            state: ``diagnostics["state"]`` of the tokens before; none by default.
            segment_ids: equal numbers for the tokens of one sequence of a packed row.
            padding_mask: False where a token is padding, which writes nothing and is not counted.
            training: whether gates of mode ``"gumbel"`` are samples.
            noise: logistic noise of those samples.

        Returns:
            y, and a dict with ``state``, ``gates`` (T, R), ``effective_rank``, ``gate_l1_loss`` (with its weight),
            ``t_component`` (of the band) and ``uv_component`` (of the semiseparable matrix).
        """
        real = jnp.ones(len(x), bool) if padding_mask is None else padding_mask
        x = jnp.where(real[:, None], x, 0.0)
        gates = jnp.where(real[:, None], self._gates(x, training, noise), 0.0)
        mixer, band = (None, None) if state is None else state
        mixed, last = self._mixed(x, gates, self._time_step(x, real), mixer, segment_ids)
        local, inputs = self._banded(x, band, segment_ids, padding_mask)
        weighted, counted = self.output_proj(mixed), len(x) / jnp.maximum(real.sum(), 1).astype(x.dtype)
        return local + weighted, {
            "state": State(last, inputs),
            "gates": gates,
            "effective_rank": jax.lax.stop_gradient(rank_gate.effective_rank(gates)) * counted,
            "gate_l1_loss": self.l1_regularization * rank_gate.l1(gates) * counted,
            "t_component": local,
            "uv_component": weighted,
        }

    def _mixed(
        self, x: Array, gates: Array, step: Array, mixer: Array | None, segment_ids: Array | None
    ) -> tuple[Array, Array]:
        """Return what the semiseparable matrix gives before the output projection, and the last state."""
        decay, share = self._decay(step)
        values = None if self.value_proj is None else self.value_proj(x)
        if self.rotation is not None:
            gates, share = jnp.tile(gates, (1, 2)), jnp.tile(share, (1, 2))
        u, v = self.u_proj(x) * gates * share, self.v_proj(x) * gates
        if self.rotation is not None:
            return self.rotation(values, u, v, decay, step, mixer, segment_ids)
        if values is None:
            return semiseparable.compat(u, v, decay, mixer, segment_ids)
        return semiseparable.operator(values, u, v, decay, mixer, segment_ids)

    def _banded(
        self, x: Array, band: Array | None, segment_ids: Array | None, padding_mask: Array | None
    ) -> tuple[Array, Array]:
        """Return the band of x, and the last inputs."""
        taps = self.taps[...]
        if padding_mask is None:
            return semiseparable.banded(x, taps, band, segment_ids)
        numbers = jnp.zeros(len(x), int) if segment_ids is None else segment_ids
        starts = jnp.concatenate([jnp.zeros(1, bool), numbers[1:] != numbers[:-1]])

        def step(inputs: Array, row: tuple[Array, ...]) -> tuple[Array, Array]:
            x_t, begins, real = row
            inputs = jnp.where(begins, 0.0, inputs)
            seen = jnp.concatenate([inputs, x_t[None]])
            return jnp.where(real, seen[1:], inputs), (taps[::-1] * seen).sum(0)

        entering = jnp.zeros((len(taps) - 1, x.shape[1]), x.dtype) if band is None else band
        last, y = jax.lax.scan(step, entering, (x, starts, padding_mask))
        return y, last

    def get_extra_state(self) -> np.ndarray:
        """Return gate mode, temperature and active rank as the three numbers that production keeps with the weights."""
        rank = self.max_rank if self.active_rank is None else self.active_rank
        return np.array([tuple(MODES).index(self.gate_mode), self.gumbel_temperature, rank], np.float64)

    def set_extra_state(self, state: np.ndarray) -> None:
        """Take over what ``get_extra_state`` returned.

        Args:
            state: the three numbers.

        Raises:
            ValueError: they name no gate mode, no temperature, or no rank of this layer.
        """
        mode, temperature, rank = (float(number) for number in state)
        known = mode in range(len(MODES)) and 0.0 < temperature < math.inf
        if not known or rank not in range(self.min_rank, self.max_rank + 1):
            raise ValueError(
                f"expected a gate mode 0 … {len(MODES) - 1}, a temperature > 0 and a rank from {self.min_rank} to "
                f"{self.max_rank}, got {state.tolist()}; the checkpoint is damaged or of another configuration"
            )
        self.gate_mode, self.gumbel_temperature, self.active_rank = tuple(MODES)[int(mode)], temperature, int(rank)

    def _gates(self, x: Array, training: bool, noise: Array | None) -> Array:
        """Return the gates (T, R)."""
        if self.gate is None:
            return jnp.ones((len(x), self.max_rank), x.dtype)
        sampled = self.gate_mode == "gumbel"
        return rank_gate.rank_gate(
            self.gate(x),
            noise if sampled and training else None,
            mode=MODES[self.gate_mode],
            temperature=self.gumbel_temperature,
            hard=self.hard if sampled else None,
            training=training,
            min_rank=self.min_rank,
            active_rank=self.active_rank,
        )

    def _time_step(self, x: Array, real: Array) -> Array:
        """Return Δ (T, R), 0 where a token is padding."""
        steps = jnp.ones((len(x), self.max_rank), x.dtype)
        if self.time_step is not None:
            steps = jax.nn.softplus(self.time_step(x))
        return jnp.where(real[:, None], steps, 0.0)

    def _decay(self, step: Array) -> tuple[Array, Array]:
        """Return α, and the share 1 − α of what is written that enters the state, (T, R) each."""
        if self.log_rates is None:
            return jnp.ones_like(step), jnp.ones_like(step)
        steps = jnp.exp(self.log_rates[...])[None] * step
        return jnp.exp(-steps), -jnp.expm1(-steps)


def _check(core: str, decays: str, gate_mode: str, options: Mapping[str, bool]) -> None:
    """Raise unless the choices exist and fit together."""
    choices = (("core", core, ("operator", "compat")), ("decays", decays, ("multi_scale", "uniform", "none")))
    for name, value, known in (*choices, ("gate_mode", gate_mode, tuple(MODES))):
        if value not in known:
            raise ValueError(f"expected {name} out of {', '.join(known)}, got {value!r}")
    for what, wanted in options.items():
        if wanted and decays == "none":
            raise ValueError(f"{what} without decays does nothing; choose decays")
