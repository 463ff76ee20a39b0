"""A mixer of tokens whose rank adapts: a causal band plus a gated, decayed semiseparable matrix (the AR-SSM layer).

    g_t = gate(W₂ relu(W₁ x_t))      u_t = (U x_t) ⊙ g_t      v_t = (V x_t) ⊙ g_t      α_t = exp(−Δ_t λ)
    operator: y_t = Σ_j taps_j ⊙ x_{t−j} + W_o S_tᵀ v_t + b_o,   S_t = diag(α_t) S_{t−1} + (1 − α_t) ⊙ u_t (W_x x_t)ᵀ
    compat:   y_t = Σ_j taps_j ⊙ x_{t−j} + W_o (k_t ⊙ v_t) + b_o,   k_t = α_t ⊙ k_{t−1} + (1 − α_t) ⊙ u_t

Symbols: x activations (B, T, D); g gates, u, v what is written and read (B, T, R); λ (R,) trained rates per unit of
time; Δ_t = 1, or softplus of a projection of x_t with ``adaptive_time_step``. (1 − α) u is the input of the state under
dS/dt = λ (u xᵀ − S) held constant over a step (zero-order hold): a state is a weighted mean of what was written, and
does not grow with the length. Without decays α = 1 and u is written as it is: the running sum.
Nothing at token t depends on later tokens; states are arguments and results. The recurrence is carried in float32
(float64 for float64), also under autocast.
Operations: so8t_torch/ops/rank_gate.py, so8t_torch/ops/semiseparable. Derivation: docs/math/semiseparable.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from so8t_torch.core.errors import ConfigError
from so8t_torch.core.precision import accumulation_dtype, autocast_dtype
from so8t_torch.nn.semiseparable_arguments import check_choices, check_input, check_sizes
from so8t_torch.nn.semiseparable_rotation import Rotation, folded
from so8t_torch.ops import rank_gate, semiseparable

__all__ = ["AdaptiveRankSemiseparableLayer", "State"]

MODES: dict[str, rank_gate.Mode] = {"soft": "soft", "ste": "straight_through", "gumbel": "binary_concrete"}
"""Names of the layer's gate modes, and the room's."""
HALF_LIVES = (2.0, 4096.0)
"""Shortest and longest half-life of multi-scale decays at the start, in tokens."""
UNIFORM_HALF_LIFE = 64.0
"""Half-life of all channels at the start, in tokens, without multi-scale decays."""
Core = Literal["operator", "compat"]
Decays = Literal["multi_scale", "uniform", "none"]


class State(NamedTuple):
    """What the tokens so far leave for the next ones.

    Attributes:
        mixer: S (B, R, D), or k (B, R) of the core ``compat``; real and then imaginary parts of a rotating layer.
        band: the last K − 1 inputs (B, K − 1, D).
    """

    mixer: Tensor
    band: Float[Tensor, "b k-1 d"]


class AdaptiveRankSemiseparableLayer(nn.Module):
    """A causal band plus a semiseparable matrix with gated rank channels.

    ``state_dict`` holds the gate mode, its temperature and the number of channels that may be open beside the weights.

    Args:
        d_model: D.
        max_rank: R.
        min_rank: channels that are open at every token, at least 1. Where that is all of them there is no gate.
        gate_hidden_dim: width inside the gate, max(D/4, min_rank) by default.
        l1_regularization: weight of the mean gate in ``aux_loss``.
        core: ``"operator"`` acts on W_x x with a state (R, D); ``"compat"`` has one number per rank channel.
        decays: half-lives that spread evenly in their logarithm from 2 to 4,096 tokens at the start, or are all 64, or
            no decay.
        adaptive_time_step: Δ depends on token and channel; 1 on average at the start.
        rotating: rates are complex, λ − iω: states turn by ωΔ in a step while they decay, and have twice the numbers.
        band_width: K, taps of the band.
        hard: gates are exactly 0 or 1 in mode ``"gumbel"``; by default in evaluation only, ``False`` for never.
        chunk: tokens that are taken together, a power of two.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: an option is out of range, or adaptive time steps are asked for without decays.
    """

    gate: nn.Sequential | None
    value_proj: nn.Linear | None
    time_step: nn.Linear | None
    rotation: Rotation | None
    log_rates: nn.Parameter | None

    def __init__(
        self,
        d_model: int,
        max_rank: int = 32,
        min_rank: int = 4,
        *,
        gate_hidden_dim: int | None = None,
        l1_regularization: float = 1e-3,
        core: Core = "operator",
        decays: Decays = "multi_scale",
        adaptive_time_step: bool = False,
        rotating: bool = False,
        band_width: int = 3,
        hard: bool | None = None,
        chunk: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = max(d_model // 4, min_rank) if gate_hidden_dim is None else gate_hidden_dim
        check_sizes(d_model, max_rank, min_rank, hidden, band_width, l1_regularization, chunk)
        check_choices(
            {"core": (core, get_args(Core)), "decays": (decays, get_args(Decays))},
            {"adaptive_time_step": adaptive_time_step, "rotating": rotating},
        )
        self.d_model, self.max_rank, self.min_rank, self.active_rank = d_model, max_rank, min_rank, max_rank
        self.l1_regularization, self.core, self.decays, self.chunk, self.hard = (
            l1_regularization,
            core,
            decays,
            chunk,
            hard,
        )
        self.gate_mode, self.gumbel_temperature = "soft", 1.0
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.gate = None
        if min_rank < max_rank:
            layers = nn.Linear(d_model, hidden, **kind), nn.ReLU(), nn.Linear(hidden, max_rank, **kind)
            self.gate = nn.Sequential(*layers)
        numbers = 2 * max_rank if rotating else max_rank
        self.u_proj, self.v_proj = (nn.Linear(d_model, numbers, bias=False, **kind) for _ in range(2))
        self.taps = nn.Parameter(torch.empty(band_width, d_model, **kind))
        operates = core == "operator"
        self.value_proj = nn.Linear(d_model, d_model, bias=False, **kind) if operates else None
        self.output_proj = nn.Linear(d_model if operates else max_rank, d_model, **kind)
        rates = None if decays == "none" else nn.Parameter(torch.empty(max_rank, **kind))
        self.register_parameter("log_rates", rates)
        self.time_step = nn.Linear(d_model, max_rank, **kind) if adaptive_time_step else None
        self.rotation = Rotation(max_rank, **kind) if rotating else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw projections by Xavier's rule and taps of 0.02, put biases to zero and half-lives where they begin."""
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.normal_(self.taps, std=0.02)
        with torch.no_grad():
            if self.time_step is not None:
                # softplus of it is 1
                self.time_step.bias.fill_(math.log(math.expm1(1.0)))
            if self.log_rates is not None:
                ends = HALF_LIVES if self.decays == "multi_scale" else (UNIFORM_HALF_LIFE, UNIFORM_HALF_LIFE)
                logs = torch.linspace(math.log(ends[0]), math.log(ends[1]), self.max_rank, dtype=torch.float64)
                self.log_rates.copy_(math.log(math.log(2.0)) - logs)
                if self.rotation is not None:
                    # a quarter of a turn in a half-life
                    self.rotation.frequencies.copy_(0.5 * math.pi * torch.exp(-logs))

    def set_gate_mode(self, mode: str, gumbel_temperature: float = 1.0) -> None:
        """Choose the gate.

        Args:
            mode: ``"soft"``, ``"ste"`` (0 or 1 with the slope of the soft gate), or ``"gumbel"`` (a binary concrete
                sample in training, 0 or 1 in evaluation).
            gumbel_temperature: of the sample, positive.

        Raises:
            ConfigError: there is no such mode, or the temperature is not positive.
        """
        if mode not in MODES:
            raise ConfigError(f"set_gate_mode: expected a mode out of {', '.join(MODES)}, got {mode!r}.")
        if not 0.0 < gumbel_temperature < math.inf:
            raise ConfigError(f"set_gate_mode: expected a gumbel_temperature > 0, got {gumbel_temperature!r}.")
        self.gate_mode, self.gumbel_temperature = mode, gumbel_temperature

    def update_rank_schedule(self, step: int, warmup_steps: int = 1000) -> int:
        """Set, and return, the number of channels that may be open: ``min_rank`` at step 0, all after the warm-up.

        Args:
            step: optimiser steps so far.
            warmup_steps: at least 1.

        Raises:
            ConfigError: step is negative or there is no warm-up.
        """
        if step < 0 or warmup_steps < 1:
            raise ConfigError(
                f"update_rank_schedule: expected step ≥ 0 and warmup_steps ≥ 1, got {step} and {warmup_steps}."
            )
        share = min(1.0, step / warmup_steps)
        self.active_rank = int(self.min_rank + share * (self.max_rank - self.min_rank))
        return self.active_rank

    def get_extra_state(self) -> Float[Tensor, " 3"]:
        """Return gate mode, temperature and active rank as numbers, which every format of checkpoints can keep."""
        numbers = tuple(MODES).index(self.gate_mode), self.gumbel_temperature, self.active_rank
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Float[Tensor, " 3"]) -> None:
        """Take over what ``get_extra_state`` returned.

        Args:
            state: the three numbers.

        Raises:
            ConfigError: they are not three such numbers, or this layer has no such rank.
        """
        modes = tuple(MODES)
        if state.shape != (3,) or float(state[0]) not in range(len(modes)):
            raise ConfigError(
                "AdaptiveRankSemiseparableLayer: expected gate mode, temperature and active rank as three numbers, the "
                f"mode one of 0 … {len(modes) - 1}, got {state.tolist()} from the checkpoint; it is damaged."
            )
        mode, temperature, rank = state.tolist()
        if rank not in range(self.min_rank, self.max_rank + 1):
            raise ConfigError(
                f"AdaptiveRankSemiseparableLayer: expected an active_rank from {self.min_rank} to {self.max_rank}, got "
                f"{rank:g} from the checkpoint; build the layer with its ranks."
            )
        self.set_gate_mode(modes[int(mode)], temperature)
        self.active_rank = int(rank)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: State | None = None,
        segment_ids: Int[Tensor, "*#b t"] | None = None,
        *,
        padding_mask: Bool[Tensor, "b t"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "b t d"], dict[str, Any]]:
        """Return y, and what it was made of.

        Args:
            x: activations.
            state: ``diagnostics["state"]`` of the tokens before; none by default. It belongs to the sequence of the
                first token: where another one begins there, give none, or zeros in that row.
            segment_ids: equal numbers for the tokens of one sequence of a packed row; nothing crosses between two. (T,)
                holds for all rows.
            padding_mask: False where a token is padding: whatever stands there, it neither writes nor forgets, is
                none of the neighbours in the band, and does not count among the gates.
            generator: of the noise of mode ``"gumbel"`` in training; the default generator of the device without.

        Returns:
            y in the dtype of the output projection, and a dict with ``state`` (to be handed back with the next tokens),
            ``gates`` (B, T, R), ``effective_rank`` (mean number of open channels, detached), ``gate_l1_loss`` (with its
            weight), ``t_component`` (of the band) and ``uv_component`` (of the semiseparable matrix).

        Raises:
            ShapeError: x is not (B, T, D) with a token, or another argument does not fit it.
            DomainError: x is not real.
            ConfigError: the state is none of this layer's.
        """
        check_input(x, segment_ids, padding_mask, self.d_model)
        if state is not None and not isinstance(state, State):
            raise ConfigError(
                f"AdaptiveRankSemiseparableLayer: expected a State of mixer and band, got {type(state).__name__}; give "
                "back diagnostics['state'] of the call before."
            )
        entering = self.initial_state(x) if state is None else state
        if padding_mask is not None:
            x = torch.where(padding_mask[..., None], x, 0.0)
        gates = self._gates(x, generator)
        step = self._time_step(x, padding_mask)
        decay, share = self._decay(step)
        if padding_mask is not None:
            gates = torch.where(padding_mask[..., None], gates, 0.0)
        u, v, turned = self.u_proj(x), self.v_proj(x), None
        if self.rotation is not None:
            u, v, turned = self.rotation(u, v, step)
            gates, decay, share = (torch.cat([part, part], -1) for part in (gates, decay, share))
        u, v = u * gates * share, v * gates
        if self.value_proj is None:
            mixed, mixer = semiseparable.compat(u, v, decay, entering.mixer, segment_ids)
            mixed = mixed if turned is None else folded(mixed)
        else:
            values = self.value_proj(x)
            u, v = u.to(values.dtype), v.to(values.dtype)
            mixed, mixer = semiseparable.operator(values, u, v, decay, entering.mixer, segment_ids, chunk=self.chunk)
        mixer = mixer if turned is None else turned(mixer)
        local, band = self._banded(x, entering.band, segment_ids, padding_mask)
        weighted = self.output_proj(mixed.to(self.output_proj.bias.dtype))
        diagnostics = {
            "state": State(mixer, band),
            "gates": gates[..., : self.max_rank],
            "effective_rank": _mean(rank_gate.effective_rank(gates[..., : self.max_rank].detach()), padding_mask),
            "gate_l1_loss": self.l1_regularization * _mean(rank_gate.l1(gates[..., : self.max_rank]), padding_mask),
            "t_component": local,
            "uv_component": weighted,
        }
        return local.to(weighted.dtype) + weighted, diagnostics

    def initial_state(self, x: Float[Tensor, "b t d"]) -> State:
        """Return the state before the first token: zeros in the dtype that states are carried in."""
        kind = accumulation_dtype(x.dtype)
        numbers = self.u_proj.out_features
        shape = (len(x), numbers) if self.value_proj is None else (len(x), numbers, self.d_model)
        return State(x.new_zeros(shape, dtype=kind), x.new_zeros(len(x), len(self.taps) - 1, self.d_model, dtype=kind))

    def aux_loss(self, diagnostics: dict[str, Any]) -> Float[Tensor, ""]:
        """Return what the gates of a forward pass add to a loss: ``l1_regularization`` times their mean."""
        return diagnostics["gate_l1_loss"]

    def _gates(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the gates (B, T, R)."""
        if self.gate is None:
            return x.new_ones(*x.shape[:2], self.max_rank, dtype=autocast_dtype(x))
        logits, mode = self.gate(x), MODES[self.gate_mode]
        noise = None
        if mode == "binary_concrete" and self.training:
            kind = accumulation_dtype(logits.dtype)
            noise = rank_gate.logistic(torch.rand(logits.shape, generator=generator, device=x.device, dtype=kind))
        return rank_gate.rank_gate(
            logits,
            noise,
            mode=mode,
            temperature=self.gumbel_temperature,
            hard=self.hard if mode == "binary_concrete" else None,
            training=self.training,
            min_rank=self.min_rank,
            active_rank=self.active_rank,
        )

    def _time_step(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Return Δ, 0 where a token is padding; it broadcasts to (B, T, R)."""
        kind = accumulation_dtype(x.dtype)
        step = x.new_ones(1, 1, 1, dtype=kind)
        if self.time_step is not None:
            step = softplus(self.time_step(x).to(kind))
        return step if padding_mask is None else torch.where(padding_mask[..., None], step, 0.0)

    def _decay(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return α, and the share 1 − α of what is written that enters the state, both broadcasting to (B, T, R)."""
        if self.log_rates is None:
            return (step.new_ones(self.max_rank),) * 2
        steps = self.log_rates.to(step.dtype).exp() * step
        return torch.exp(-steps), -torch.expm1(-steps)

    def _banded(
        self, x: Tensor, entering: Tensor, segment_ids: Tensor | None, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the band of x, and the last inputs; padding is moved to the front of its row, and its band back."""
        if padding_mask is None:
            return semiseparable.banded(x, self.taps, entering, segment_ids)
        kind, (rows, length, width), before = accumulation_dtype(x.dtype), x.shape, entering.shape[1]
        runs = x.new_zeros(rows, length, dtype=torch.int64)
        if segment_ids is not None:
            runs = runs + pad(segment_ids[..., 1:] != segment_ids[..., :-1], (1, 0)).cumsum(-1)
        inputs = torch.cat([entering.to(kind).expand(rows, -1, -1), x.to(kind)], 1)
        order = pad(padding_mask.long(), (before, 0), value=1).argsort(dim=1, stable=True)
        numbers = pad(runs, (before, 0)).gather(1, order)
        y, last = semiseparable.banded(
            inputs.gather(1, order[..., None].expand(-1, -1, width)), self.taps, None, numbers
        )
        y = y.gather(1, order.argsort(1)[:, before:, None].expand(-1, -1, width))
        last = torch.where((numbers[:, length:] == runs[:, -1:])[..., None], last, 0.0)
        return y.to(x.dtype), last.to(entering.dtype)

    def extra_repr(self) -> str:
        """Return the options."""
        return (
            f"d_model={self.d_model}, max_rank={self.max_rank}, min_rank={self.min_rank}, core={self.core!r}, "
            f"decays={self.decays!r}, gate_mode={self.gate_mode!r}"
        )


def _mean(rows: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Return the mean over all tokens that count of means (B,) over all tokens of a row; 0 where there is none."""
    if padding_mask is None:
        return rows.sum() / max(len(rows), 1)
    count = padding_mask.sum(dtype=accumulation_dtype(rows.dtype)).clamp(min=1)
    return (rows.sum() * padding_mask.shape[1] / count).to(rows.dtype)
