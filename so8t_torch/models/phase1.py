"""Phase 1: a language model whose blocks are an AR-SSM mixer and a low-rank feed-forward part.

    x ← x + mixer(norm(x))        x ← x + feed_forward(norm(x))

The embedding is a tensor train by default, and the head its transpose. Everything at token t depends on tokens up to t
alone; what the next tokens need of the past is a state of fixed size.
Mixer: so8t_torch/nn/semiseparable.py. Embedding and head: so8t_torch/nn/holographic_embedding.py, tensor_train_head.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from so8t_torch.models.configuration import Phase1Config
from so8t_torch.models.feed_forward import FeedForward
from so8t_torch.models.language_model import RecurrentForCausalLM, RecurrentModel, register
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer, State

__all__ = ["Phase1Block", "Phase1ForCausalLM", "Phase1Model"]

KEPT_MAPS = ("lm_head", "mixer.gate.0", "mixer.gate.2", "mixer.time_step")
"""What stays as it is beside quantised weights: gates and steps of the recurrence."""


class Phase1Block(GradientCheckpointingLayer):
    """A mixer and a feed-forward part, each behind a layer norm and beside the residual stream.

    Args:
        config: of the model.
    """

    token_diagnostics = ("gates", "t_component", "uv_component", "ffn_output")
    """What of the diagnostics has an axis of tokens."""

    def __init__(self, config: Phase1Config) -> None:
        super().__init__()
        width, self.checkpoint_mixer = config.d_model, config.checkpoint_ar_ssm
        # all parts of all blocks together add what a token's own row has, which would drown otherwise
        self.outward = config.initializer_range * (2 * config.n_layers) ** -0.5
        self.mixer_norm, self.ffn_norm = (nn.LayerNorm(width, eps=config.layer_norm_eps) for _ in range(2))
        self.mixer = AdaptiveRankSemiseparableLayer(
            width,
            config.ar_ssm_max_rank,
            config.ar_ssm_min_rank,
            gate_hidden_dim=config.ar_ssm_gate_hidden_dim,
            l1_regularization=config.ar_ssm_l1_regularization,
            core=config.ar_ssm_core,
            decays=config.ar_ssm_decays,
            adaptive_time_step=config.ar_ssm_adaptive_time_step,
            rotating=config.ar_ssm_complex,
            band_width=config.ar_ssm_band_width,
        )
        self.mixer.set_gate_mode(config.ar_ssm_gate_mode, config.ar_ssm_gumbel_temperature)
        rank = (config.ffn_rank or max(width // 16, 1)) if config.ffn_compression_enabled else None
        self.ffn = FeedForward(
            width,
            config.ffn_dim or 4 * width,
            rank=rank,
            sign_log=config.lns_enabled,
            backend=config.backend,
            outward=self.outward,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what the mixer adds to the stream; its other parts and the feed-forward part draw their own."""
        nn.init.xavier_uniform_(self.mixer.output_proj.weight, gain=self.outward)
        nn.init.normal_(self.mixer.taps, std=self.outward)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the tensors that the block carries from token to token, in order."""
        return State._fields

    def initial_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the state before the first token.

        Args:
            batch: rows.
            device: of the state.
            dtype: of the activations; the state is float64 for float64 and float32 otherwise.
        """
        found = self.mixer.initial_state(torch.empty(batch, 1, self.mixer.d_model, device=device, dtype=dtype))
        return found._asdict()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        state: dict[str, Tensor] | None = None,
        *,
        padding_mask: Bool[Tensor, "b t"] | None = None,
        segment_ids: Int[Tensor, "*#b t"] | None = None,
        positions: Int[Tensor, "*#b t"] | None = None,  # noqa: ARG002 - nothing here depends on them
        diagnostics: str | None = None,
    ) -> tuple[Float[Tensor, "b t d"], dict[str, Tensor], dict[str, Any]]:
        """Return activations, the state after the last token, and what was found on the way.

        Args:
            x: the residual stream.
            state: what the call on the tokens before returned; none at the start.
            padding_mask: False where a token is padding.
            segment_ids: equal numbers for the tokens of one sequence of a packed row.
            positions: not used.
            diagnostics: ``"summary"`` adds scalars, ``"full"`` tensors as well, detached.

        Returns:
            The last holds ``aux_loss`` in any case: what the gates add to the loss.
        """
        entering = None if state is None else State(**state)
        mix = partial(self.mixer, padding_mask=padding_mask)
        # in a block that is computed again as a whole, the mixer would be a third time
        if self.checkpoint_mixer and self.training and torch.is_grad_enabled() and not self.gradient_checkpointing:
            mix = partial(checkpoint, mix, use_reentrant=False)
        mixed, parts = mix(self.mixer_norm(x), entering, segment_ids)
        x = x + self.dropout(mixed)
        changed = self.ffn(self.ffn_norm(x))
        found: dict[str, Any] = {"aux_loss": parts["gate_l1_loss"]}
        if diagnostics is not None:
            found |= _found(parts, changed, diagnostics == "full")
        return x + self.dropout(changed), parts["state"]._asdict(), found


@torch.no_grad()
def _found(parts: dict[str, Any], changed: Tensor, full: bool) -> dict[str, Tensor]:
    """Return scalars of a block, and the tensors behind them."""
    gates = parts["gates"].detach()
    found = {
        "effective_rank": parts["effective_rank"].detach(),
        "gate_sparsity": (gates < 0.5).to(torch.float32).mean(),
        "state_energy": parts["state"].mixer.detach().square().mean(),
    }
    if full:
        found |= {name: parts[name].detach() for name in ("gates", "t_component", "uv_component")}
        found["ffn_output"] = changed.detach()
    return found


class Phase1Model(RecurrentModel):
    """Embedding, blocks and last norm."""

    config_class = Phase1Config
    block_class = Phase1Block
    _no_split_modules = ("Phase1Block",)
    kept_maps = KEPT_MAPS


class Phase1ForCausalLM(RecurrentForCausalLM):
    """The language model."""

    config_class = Phase1Config
    body_class = Phase1Model
    _no_split_modules = ("Phase1Block",)
    kept_maps = KEPT_MAPS


register(Phase1Config, Phase1Model, Phase1ForCausalLM)
