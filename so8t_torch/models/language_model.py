"""Recurrent language models of transformers: a body with a head, its loss, and generation with a state of fixed size.

    loss = mean over labels t of log Σ_i exp(logits_i) − logits_t,  plus what the blocks add

The head is a linear layer of its own, the transpose of the table, or the transpose of a tensor train. The loss alone
stores a chunk of logits at a time, or none of a tensor train; it stores them all where the head is compiled, works in
float16, or is more than a linear map without bias: quantised, adapted, hooked, in shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.core.readable import readable
from so8t_torch.models.body import RecurrentModel, RecurrentPreTrainedModel
from so8t_torch.models.head_loss import head_loss, is_plain
from so8t_torch.models.states import RecurrentCache
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.tensor_train_head import TensorTrainHead

__all__ = ["CausalOutput", "RecurrentForCausalLM", "RecurrentModel", "register"]

IGNORED = -100
"""The label that counts for nothing."""


@dataclass
class CausalOutput(ModelOutput):
    """What the language model gives; the loss contains ``aux_loss``."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    diagnostics: dict[str, Any] | None = None
    aux_loss: Tensor | None = None


class RecurrentForCausalLM(RecurrentPreTrainedModel, GenerationMixin):
    """The body with a head.

    A subclass names the class of its body in ``body_class``.

    Args:
        config: of the model.

    Raises:
        ConfigError: an encoder, which has no next token to tell.
    """

    body_class: ClassVar[type[RecurrentModel]]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        if getattr(config, "is_encoder", False):
            raise ConfigError(f"{type(self).__name__}: expected is_encoder false; an encoder is the body alone.")
        self.model = self.body_class(config)
        self.lm_head: nn.Linear | None = None
        if not (config.tie_word_embeddings and isinstance(self.model.embed_tokens, HolographicTTEmbedding)):
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings and self.lm_head is not None:
            self._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self._head()

    def set_output_embeddings(self, value: Any) -> None:
        """Put another head in its place."""
        self.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        labels: Int[Tensor, "b n"] | None = None,
        use_cache: bool | None = None,
        position_ids: Int[Tensor, "#b n"] | None = None,
        segment_ids: Int[Tensor, "*#b n"] | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        diagnostics: str | None = None,
        skip_logits: bool = False,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalOutput:
        """Return loss, logits, and what else was asked for.

        Args:
            input_ids: as for the body, like all that is not named here.
            attention_mask: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            labels: the ids themselves (they are shifted here), −100 where a token counts for nothing.
            use_cache: see there; not with labels, unless asked for.
            position_ids: see there.
            segment_ids: see there.
            output_hidden_states: see there.
            logits_to_keep: how many of the last columns get logits, 0 for all, or which columns.
            diagnostics: see there.
            skip_logits: leave logits out: the loss of a plain head (``head_loss.is_plain``) then never stores them all.
            num_items_in_batch: labels that count in all parts of a batch; by default those of this call.
            **kwargs: see there.

        Raises:
            ConfigError, ShapeError, DomainError: as the body, or labels that do not fit.
            TrainingError: from the backward pass of a plain head with ``skip_logits``, if it is a second one or builds
                a graph of its own (``create_graph``).
        """
        if labels is not None and use_cache is None:
            use_cache = False
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            position_ids=position_ids,
            segment_ids=segment_ids,
            output_hidden_states=output_hidden_states,
            diagnostics=diagnostics,
            **kwargs,
        )
        hidden = found.last_hidden_state
        logits = None if skip_logits else self._head()(slice_logits_to_keep(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self._loss(
                hidden,
                logits if isinstance(logits_to_keep, int) and not logits_to_keep else None,
                labels,
                found.aux_loss,
                num_items_in_batch,
            )
        if diagnostics == "full" and logits is not None:
            found.diagnostics["logits"] = logits.detach()
        return CausalOutput(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            diagnostics=found.diagnostics,
            aux_loss=found.aux_loss,
        )

    def _head(self) -> nn.Module:
        """Return the head; that of a tensor train has no parameters of its own and is made anew."""
        return self._train_head() if self.lm_head is None else self.lm_head

    def _train_head(self) -> TensorTrainHead:
        embedding = self.model.embed_tokens
        assert isinstance(embedding, HolographicTTEmbedding)
        return TensorTrainHead(embedding)

    def _loss(
        self, hidden: Tensor, logits: Tensor | None, labels: Tensor, aux: Tensor | None, items: int | Tensor | None
    ) -> Tensor:
        """Return the mean cross-entropy of the next tokens, plus what the blocks add."""
        if labels.shape != hidden.shape[:2]:
            raise ShapeError(f"expected labels {tuple(hidden.shape[:2])}, one per token, got {tuple(labels.shape)}.")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise DomainError(f"expected labels of an integer dtype, got {labels.dtype}; convert them.")
        wanted = nn.functional.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)
        _check_labels(wanted, self.config.vocab_size)
        counted = (wanted != IGNORED).sum()
        if self.lm_head is None:
            total = self._train_head().loss(hidden, wanted, reduction="sum")
        elif logits is None and is_plain(self.lm_head, hidden):
            total = head_loss(hidden, self.lm_head.weight, wanted, IGNORED)
        else:
            scores = self._head()(hidden) if logits is None else logits
            scores = scores.to(accumulation_dtype(scores.dtype))
            total = nn.functional.cross_entropy(
                scores.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        loss = total / (counted if items is None else items)
        if aux is None:
            return loss
        return loss + aux * (1.0 if items is None else counted / items)

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse prompts without a row or a token, where ``generate`` prepares them."""
        found: Any = super()._prepare_model_inputs(*args, **kwargs)
        prompts = found[0]
        if prompts.ndim < 2 or not prompts.shape[0] or not prompts.shape[1]:
            raise ShapeError(
                f"generate: expected prompts (B, N) with at least one row and one token, got {tuple(prompts.shape)}."
            )
        return found

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Give ``generate`` a cache that counts columns; another one was chosen by the caller."""
        if generation_config.cache_implementation is not None:
            raise ConfigError(
                f"{type(self).__name__}: expected no cache_implementation, got "
                f"{generation_config.cache_implementation!r}; the state has a fixed size."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RecurrentCache(self.config)


def _check_labels(wanted: Tensor, size: int) -> None:
    """Raise unless labels that count are ids; where the host would have to wait for values, nothing does."""
    if not readable(wanted):
        return
    wrong = (wanted != IGNORED) & ((wanted < 0) | (wanted >= size))
    if bool(wrong.any()):
        raise DomainError(
            f"expected labels in [0, {size}), or {IGNORED} where a token counts for nothing, got {wanted[wrong][0]}; "
            "take the tokenizer of the model."
        )


def register(config: type[PreTrainedConfig], body: type[RecurrentModel], model: type[RecurrentForCausalLM]) -> None:
    """Make the Auto classes of transformers know a model.

    Args:
        config: its configuration.
        body: the model without head.
        model: the language model.
    """
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, body, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
