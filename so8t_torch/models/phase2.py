"""The Phase 2 language model: blocks of a dissipative resolvent, a fast-weight memory that forgets, and a perceptron.

    x ← x + W₂ g(x̂),  x̂ = LN₁(x);   g the causal diagonal of the resolvent of a lossy chain, Γ its rates, and Γ^mem
    x ← x + memory(LN₂(x), Γ^mem)          keys of LN₂(x) filtered over a few tokens; judged where a chunk begins
    x ← x + W₄ gelu(W₃ LN₃(x))

Every part is causal and costs the same for every token; what a token leaves for the next is a state of fixed size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.models.body import RecurrentModel
from so8t_torch.models.configuration import Phase2Config
from so8t_torch.models.language_model import RecurrentForCausalLM, register
from so8t_torch.models.phase2_report import (
    TOKEN_DIAGNOSTICS,
    block_report,
    memory_findings,
    resolvent_findings,
)
from so8t_torch.models.rows import Rows
from so8t_torch.models.states import check_shapes
from so8t_torch.nn.dissipative_bk import DissipativeBKLayer
from so8t_torch.nn.hebbian import DissipativeHebbianLayer
from so8t_torch.nn.memory_resonance import MemoryResonanceLayer
from so8t_torch.nn.memory_selection import SNRMemoryFilter
from so8t_torch.nn.modulated_memory import Marks, MemoryState, ModulatedMemory, mark, may_be_set
from so8t_torch.nn.short_convolution import ShortConvolution
from so8t_torch.nn.zeta_initialization import ZetaInitializer

__all__ = ["Phase2Block", "Phase2ForCausalLM", "Phase2IntegratedModel", "Phase2Model"]

SLOWEST_DECAY = 1e-4
"""Least decay rate of the memory per token."""
KEPT_MAPS = (
    *("lm_head", "bk.potential.projection", "bk_out", "memory.time_step"),
    *("hebbian.gamma_proj", "hebbian.eta_proj"),
)
"""What stays as it is beside quantised weights: potentials, rates and steps, and the map of a few channels."""
State = dict[str, Tensor]


class Phase2Block(GradientCheckpointingLayer):
    """One block; ``block(x, state, ...) -> (x, state, found)``.

    Args:
        config: of the model.
    """

    token_diagnostics = TOKEN_DIAGNOSTICS
    memory: ModulatedMemory | None
    conv: ShortConvolution | None

    def __init__(self, config: Phase2Config) -> None:
        super().__init__()
        width, channels = config.d_model, config.bk_channels or config.num_heads
        self.config, self.channels = config, channels
        self.bk_norm, self.ffn_norm = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.memory_norm = nn.LayerNorm(width, eps=config.layer_norm_eps) if config.hebbian_enabled else None
        self.bk = DissipativeBKLayer(
            width,
            channels=channels,
            mode=config.bk_mode,
            hermitian=config.bk_hermitian,
            adaptive_hopping=config.bk_adaptive_hopping,
            memory_heads=config.num_heads if config.hebbian_enabled else 0,
            base_decay=config.base_decay,
            memory_base_decay=SLOWEST_DECAY / max(1.0, config.hebbian_dt),
            adaptive_decay=config.adaptive_decay,
            dt=config.hebbian_dt,
            backend=config.backend,
        )
        self.bk_out = nn.Linear(2 * channels, width)
        filtered = config.hebbian_enabled and config.short_conv > 1
        self.conv = ShortConvolution(width, config.short_conv) if filtered else None
        self.memory = _memory(config, channels) if config.hebbian_enabled else None
        inner = config.ffn_dim or 4 * width
        self.ffn = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(inner, width)
        )
        self.dropout = nn.Dropout(config.dropout)
        self._states = _state_sizes(config, channels)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the tensors that the block carries from token to token, in order."""
        return tuple(self._states)

    def initial_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> State:
        """Return the state before the first token: zeros.

        Args:
            batch: rows.
            device: of the states.
            dtype: of the activations; recurrences are carried in float32, or float64 for float64.
        """
        wide = accumulation_dtype(dtype)
        return {
            name: torch.zeros(batch, *size, device=device, dtype=dtype if name == "conv" else wide)
            for name, size in self._states.items()
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the linear maps around the mixers, and let queries begin as keys where keys are those of earlier tokens.

        Maps of the memory, and rates and gates, are those that their layers draw.
        """
        rng = np.random.default_rng(int(torch.randint(2**62, (), device="cpu")))
        for linear, gain in self._linear_maps():
            if self.config.use_zeta_init:
                ZetaInitializer.initialize_linear_zeta(linear, gain, rng=rng)
            else:
                nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)
        if self.memory is not None:
            layer = self.memory.hebbian
            layer.out_proj.weight.mul_(self._outward)
            if self.conv is not None:
                layer.q_proj.weight.copy_(layer.k_proj.weight)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        state: State | None = None,
        *,
        padding_mask: Bool[Tensor, "b n"] | None = None,
        segment_ids: Int[Tensor, "b n"] | None = None,
        positions: Int[Tensor, "b n"],
        marks: Marks | None = None,
        diagnostics: str | None = None,
    ) -> tuple[Float[Tensor, "b n d"], State, dict[str, Any]]:
        """Return the tokens, the state after them, and what was found.

        Args:
            x: activations.
            state: what the block returned for the tokens before; none at the beginning of all rows.
            padding_mask: False where a token is padding, behind the others of its row.
            segment_ids: number of the document of each token, that of the token before for padding.
            positions: of each token in its document.
            marks: where documents and chunks begin, as all blocks have them; made of the arguments before without.
            diagnostics: ``"summary"`` or ``"full"`` for the second half of what is returned.
        """
        if marks is None:
            marks = _marks(self.config, positions, padding_mask, segment_ids, fresh=state is None)
        if state is None:
            state = self.initial_state(len(x), x.device, self.bk_out.weight.dtype)
        else:
            check_shapes(state, self._states)
        mix = self._mix_with_feedback if self.memory is not None and self.config.feedback_enabled else self._mix
        x, state, found = mix(x, state, marks, diagnostics is not None)
        change = self.ffn(self.ffn_norm(x))
        if diagnostics is not None:
            found = block_report(self.memory, found | {"ffn_output": change.detach()}, state, padding_mask, diagnostics)
        return x + self.dropout(change), state, found

    def _mix(
        self,
        x: Tensor,
        state: State,
        marks: Marks,
        watched: bool,
        shift: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """Return tokens after both mixers, the state after them, and what a watched call found of each token.

        ``kept`` is what dropout leaves of ones, where tokens are gone through more than once.
        """
        after = dict(state)
        chain = torch.complex(*state["chain"].unbind(-1)) if "chain" in state else None
        mixed = self.bk(self.bk_norm(x), chain, marks.documents, padding_mask=marks.real, shift=shift)
        if mixed.state is not None:
            after["chain"] = torch.stack([mixed.state.real, mixed.state.imag], -1)
        change = self.bk_out(mixed.features)
        x = x + (self.dropout(change) if kept is None else change * kept.to(change.dtype))
        found = resolvent_findings(mixed, shift) if watched else {}
        if self.memory is None or self.memory_norm is None:
            return x, after, found
        z, keyed = self.memory_norm(x), None
        if self.conv is not None:
            keyed, after["conv"] = self.conv(z, state["conv"], marks.documents, padding_mask=marks.real)
        weights = state["memory"]
        excess = state["excess"] if "excess" in state else weights.new_zeros(*weights.shape[:2], 2)
        rates = mixed.potential.memory_gamma
        entering = MemoryState(weights, excess)
        read, memory, worked = self.memory(z, rates, entering, marks, keyed=keyed, monitored=watched)
        after["memory"] = memory.weights
        if "excess" in state:
            after["excess"] = memory.excess
        if watched:
            found |= memory_findings(rates, read, worked, self.config.hebbian_dt)
        return x + self.dropout(read), after, found

    def _mix_with_feedback(
        self, x: Tensor, state: State, marks: Marks, watched: bool
    ) -> tuple[Tensor, State, dict[str, Tensor]]:
        """Return the same, chunk by chunk: the memory shifts the potentials of later tokens."""
        mixed, findings = [], []
        for places in marks.runs(self.config.memory_chunk):
            piece = marks.piece(places)
            if piece.lead is None:
                # within a piece the mixers see documents begin, but not at its first token
                state = {name: _emptied(part, piece.starts[:, 0]) for name, part in state.items()}
            twice = piece.lead is None and self.dropout.training
            kept = self.dropout(torch.ones_like(x[:, places])) if twice else None
            shift, last = self._shift(x[:, places], state, piece, kept)
            y, state, found = self._mix(x[:, places], state, piece, watched, shift, kept)
            state["shift"] = last
            mixed.append(y)
            findings.append(found)
        whole = {name: torch.cat([found[name] for found in findings], 1) for name in findings[0]}
        return torch.cat(mixed, 1), state, whole

    def _shift(self, x: Tensor, state: State, marks: Marks, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what is added to the potentials of up to a chunk of tokens (B, 1 or N, C), and to that of the next."""
        assert self.memory is not None
        if marks.lead is not None:
            shift = state["shift"]
            if marks.turning:
                entered = self.memory.judge(state["memory"]).weights
                shift = torch.where(marks.turns[:, :1], self.memory.hebbian.potential_feedback(entered), shift)
            return shift[:, None], shift
        turned, begun = (part.long().cumsum(1)[..., None] > 0 for part in (marks.turns, marks.starts))
        before = torch.where(begun, 0.0, state["shift"][:, None])
        if not may_be_set(turned):
            return before, before[:, -1]
        _, middle, _ = self._mix(x, state, marks.before_turns(), False, before, kept)
        judged = self.memory.judge(middle["memory"]).weights
        after = self.memory.hebbian.potential_feedback(judged)[:, None]
        shift = torch.where(begun, 0.0, torch.where(turned, after, before))
        return shift, shift[:, -1]

    def _linear_maps(self) -> Iterator[tuple[nn.Linear, float]]:
        """Return the linear maps with the size of what they give, beside that of what they take."""
        first, last = self.ffn[0], self.ffn[-1]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        yield from ((self.bk_out, self._outward), (first, 1.0), (last, self._outward))

    @property
    def _outward(self) -> float:
        """The size of what a part adds to the stream at the start: all parts together what a token's own row has.

        Rows that drown in it could not be told apart by the keys of the memory.
        """
        return self.config.initializer_range * (2 * self.config.n_layers) ** -0.5


def _state_sizes(config: Phase2Config, channels: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what a block carries, without the axis of rows."""
    sizes: dict[str, tuple[int, ...]] = {}
    if config.bk_mode == "causal":
        sizes["chain"] = channels, 2
    if not config.hebbian_enabled:
        return sizes
    if config.short_conv > 1:
        sizes["conv"] = config.short_conv - 1, config.d_model
    sizes["memory"] = config.num_heads, config.head_dim, config.head_dim
    if config.snr_enabled:
        sizes["excess"] = config.num_heads, 2
    if config.feedback_enabled:
        sizes["shift"] = (channels,)
    return sizes


def _emptied(state: Tensor, rows: Tensor) -> Tensor:
    """Return a state with zeros in some rows."""
    return torch.where(rows.reshape(-1, *(1,) * (state.ndim - 1)), 0.0, state)


def _marks(
    config: Phase2Config, positions: Tensor, real: Tensor | None, documents: Tensor | None, *, fresh: bool
) -> Marks:
    """Return where documents and chunks begin; where nothing is done at chunks, nobody waits to know."""
    judging = config.snr_enabled or config.resonance_enabled or config.feedback_enabled
    looking = config.hebbian_enabled and judging
    return mark(positions, config.memory_chunk, real=real, documents=documents, fresh=fresh, looking=looking)


def _memory(config: Phase2Config, channels: int) -> ModulatedMemory:
    """Return the memory of a block."""
    hebbian = DissipativeHebbianLayer(
        config.d_model,
        config.num_heads,
        config.head_dim,
        eta=config.hebbian_eta,
        eta_mode=config.hebbian_eta_mode,
        rule=config.hebbian_rule,
        own_decay=False,
        dt=config.hebbian_dt,
        feedback_channels=channels if config.feedback_enabled else 0,
        backend=config.backend,
    )
    snr = SNRMemoryFilter(config.snr_threshold, config.snr_gamma_boost, config.snr_eta_boost)
    resonance = MemoryResonanceLayer(config.head_dim, config.num_heads, config.resonance_energy_threshold)
    return ModulatedMemory(
        hebbian,
        snr if config.snr_enabled else None,
        resonance if config.resonance_enabled else None,
        chunk=config.memory_chunk,
        adaptive_time_step=config.adaptive_time_step,
    )


class Phase2Model(RecurrentModel):
    """Embedding, blocks and a last norm."""

    config_class = Phase2Config
    block_class = Phase2Block
    report_lists: ClassVar[dict[str, str]] = {
        "gamma_values": "gamma",
        "snr_stats": "snr_stats",
        "resonance_info": "resonance_info",
        "stability_metrics": "stability",
    }
    _no_split_modules = ("Phase2Block",)
    kept_maps = KEPT_MAPS

    def _shared(self, rows: Rows, *, fresh: bool) -> dict[str, Any]:
        """Return the marks of the call, which are read once."""
        return {"marks": _marks(self.config, rows.positions, rows.real, rows.documents, fresh=fresh)}


class Phase2ForCausalLM(RecurrentForCausalLM):
    """The language model."""

    config_class = Phase2Config
    body_class = Phase2Model
    _no_split_modules = ("Phase2Block",)
    kept_maps = KEPT_MAPS


Phase2IntegratedModel = Phase2ForCausalLM
"""The name that the original gave it."""

register(Phase2Config, Phase2Model, Phase2ForCausalLM)
