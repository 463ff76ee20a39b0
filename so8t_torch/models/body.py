"""The body of a recurrent language model: embedding, blocks with states of fixed size, last norm.

A block is called as ``block(x, state, padding_mask=, segment_ids=, positions=, diagnostics=) -> (x, state, found)``;
``block.initial_state`` gives the state before the first token, zeros, ``block.state_names`` the order of its tensors,
and ``block.token_diagnostics`` which entries of ``found`` have an axis of tokens with ``"full"``. What else all blocks
of a model take, made once for a call, is named by ``_shared``.
``found["aux_loss"]`` is a scalar with gradient that is added to the loss; everything else in it is detached.
No module keeps a state: it goes in and out through ``past_key_values``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.models.quantization import with_kept_maps
from so8t_torch.models.rows import Rows, lay_out
from so8t_torch.models.states import RecurrentCache, read_positions, read_states, write_positions, write_states
from so8t_torch.models.stored import check_finite
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.zeta_embedding import ZetaEmbedding

__all__ = ["HiddenOutput", "RecurrentModel", "RecurrentPreTrainedModel"]

DIAGNOSTICS = (None, "summary", "full")
_OF_PACKED_ROWS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What collators of packed rows give beside the position_ids, which say the same."""


@dataclass
class HiddenOutput(ModelOutput):
    """What the body gives; ``aux_loss`` is the sum over blocks, with gradient."""

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    diagnostics: dict[str, Any] | None = None
    aux_loss: Tensor | None = None


class RecurrentPreTrainedModel(PreTrainedModel):
    """What body and language model share with transformers."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    kept_maps: ClassVar[tuple[str, ...]] = ("lm_head",)
    """Ends of the names of linear maps that keep their weights where bitsandbytes quantises the others."""

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """Return the model of a folder as transformers does, ``kept_maps`` with the weights that the file gives them.

        Maps of 4 bits on a CPU are computed as in training, because bitsandbytes repacks them otherwise at the first
        call: it can do so with few widths, and what is saved or trained afterwards is wrong.

        Args:
            *args: as for ``PreTrainedModel``.
            quantization_config: see there.
            **kwargs: see there.

        Raises:
            CheckpointError: weights that are not finite, named.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = with_kept_maps(quantization_config, cls.kept_maps)
        found: Any = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        check_finite(model, args[0] if args else kwargs.get("pretrained_model_name_or_path", cls.__name__))
        if getattr(model, "is_loaded_in_4bit", False):
            # the package of adapters brings PEFT, which plain weights do not need
            from so8t_torch.adapter.quantized import keep_training_on_cpu

            keep_training_on_cpu(model)
        return found

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Return the embedding with another number of rows, which a tensor train cannot have.

        Args:
            new_num_tokens: rows; those there are without.
            *args: as for ``PreTrainedModel``.
            **kwargs: see there.

        Raises:
            ConfigError: the embedding is a tensor train.
        """
        train = self.get_input_embeddings()
        if not isinstance(train, HolographicTTEmbedding):
            return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        multiple = args[0] if args else kwargs.get("pad_to_multiple_of")
        if new_num_tokens in (None, train.vocab_size) and train.vocab_size % (multiple or 1) == 0:
            return train
        table = "embedding='dense'" if "embedding" in self.config.settings() else "htt_enabled=False, htt_complex=False"
        raise ConfigError(
            f"resize_token_embeddings: the embedding is a tensor train, whose factors {train.vocab_factors} belong to "
            f"its {train.vocab_size:,} ids; it has no rows to add or to take away. Create a model with the vocab_size "
            f"wanted, or one with a table, which can be resized: its configuration is config.replace({table}), "
            "load_state_dict(strict=False) takes over the other weights, and get_input_embeddings().dense_table() has "
            "its rows (of complex cores: real parts, then imaginary parts)."
        )

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002
        """Initialise a module like those of the library, which asks for more than the weights a module has itself."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module that has weights which no file gave; what a file gave stays."""
        if isinstance(module, ZetaEmbedding):
            module.frequencies = module._frequencies()
        if not (hasattr(module, "reset_parameters") and type(module).__module__.startswith("so8t_torch.")):
            super()._init_weights(module)
            return
        tensors = [*module.parameters(), *module.buffers()]
        given = [tensor for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
        if tensors and len(given) == len(tensors):
            return
        kept = [tensor.clone() for tensor in given]
        reset: Any = module.reset_parameters
        reset()
        for tensor, value in zip(given, kept, strict=True):
            tensor.copy_(value)


class RecurrentModel(RecurrentPreTrainedModel):
    """Embedding, blocks and last norm.

    A subclass names its configuration in ``config_class`` and the class of its blocks in ``block_class``.

    Args:
        config: of the model.
    """

    block_class: ClassVar[type[nn.Module]]
    report_lists: ClassVar[dict[str, str]] = {}
    """Diagnostics of the model that are lists over blocks, and the entry of each block that they gather."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = _token_embedding(config)
        self.embed_positions = None
        if config.position_embedding == "zeta":
            scale = config.position_scale * math.sqrt(2.0) * config.initializer_range
            self.embed_positions = ZetaEmbedding(
                config.n_seq, config.d_model, config.zeta_embedding_trainable, scale=scale
            )
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(self.block_class(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that gives the rows of ids."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another module in its place."""
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "b n"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "b n d"] | None = None,
        use_cache: bool | None = None,
        position_ids: Int[Tensor, "#b n"] | None = None,
        segment_ids: Int[Tensor, "*#b n"] | None = None,
        output_hidden_states: bool | None = None,
        diagnostics: str | None = None,
        **kwargs: Any,
    ) -> HiddenOutput:
        """Return hidden states, and what else was asked for.

        Args:
            input_ids: ids of the tokens, or
            inputs_embeds: their vectors.
            attention_mask: 0 where a token is padding, on either side or between; it may be longer, by what was
                seen before.
            past_key_values: what the call on the tokens before returned.
            use_cache: whether to return it; by default as the configuration says, but not in training.
            position_ids: a 0 begins a document there; positions are counted.
            segment_ids: equal numbers for the tokens of one document, instead; a call begins none with its first token,
                because the number before it is not known.
            output_hidden_states: whether to return the residual stream before every block and, normed, after the last.
            diagnostics: ``None``, ``"summary"`` (numbers) or ``"full"`` (with a tensor per token); detached.
            **kwargs: what the library hands around.

        Raises:
            ConfigError: an unknown argument or word, or a cache of another model.
            ShapeError: no token, or shapes that do not fit.
            DomainError: ids that are no ids.
        """
        _check_options(self.config, kwargs, diagnostics, use_cache, past_key_values)
        sizes, device = _sizes(input_ids, inputs_embeds, self.config)
        use_cache = bool((self.config.use_cache and not self.training) if use_cache is None else use_cache)
        use_cache = use_cache and not _reads_ahead(self.config)
        cache = RecurrentCache(self.config) if use_cache and past_key_values is None else past_key_values
        entering = None if cache is None else read_positions(cache, sizes[0])
        rows = lay_out(
            sizes,
            device,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            position_ids=position_ids,
            entering=entering,
        )
        shared = self._shared(rows, fresh=entering is None)
        x = self._embedded(input_ids, inputs_embeds, rows)
        stream, findings = [], []
        blocks: list[Any] = list(self.layers)
        for number, block in enumerate(blocks):
            stream.append(x)
            state = None if cache is None else read_states(cache, number, block.state_names, sizes[0])
            x, state, found = block(
                x,
                rows.entering(state),
                padding_mask=rows.real,
                segment_ids=rows.documents,
                positions=rows.positions,
                diagnostics=diagnostics,
                **shared,
            )
            findings.append(found)
            if use_cache and cache is not None:
                write_states(cache, number, state)
        if use_cache and cache is not None:
            write_positions(cache, rows.counts, sizes[1])
        stream.append(x)
        x = rows.restore(self.norm(x))
        aux = [found.pop("aux_loss") for found in findings if "aux_loss" in found]
        report = None
        if diagnostics is not None:
            heavy = [*stream, x] if diagnostics == "full" else None
            report = self._report(findings, heavy, rows)
        return HiddenOutput(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*map(rows.restore, stream[:-1]), x) if self._wants_stream(output_hidden_states) else None,
            diagnostics=report,
            aux_loss=torch.stack(aux).sum() if aux else None,
        )

    def _shared(self, rows: Rows, *, fresh: bool) -> dict[str, Any]:  # noqa: ARG002 - for models that do
        """Return what else all blocks take; ``fresh`` where no row has tokens of an earlier call."""
        return {}

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, rows: Rows) -> Tensor:
        """Return the vectors of tokens in their places, zeros for padding."""
        if inputs_embeds is None:
            assert input_ids is not None
            ids = rows.lay(input_ids)
            ids = ids if rows.real is None else torch.where(rows.real, ids, 0)
            _check_ids(ids, self.config.vocab_size)
            x = self.embed_tokens(ids)
        else:
            x = rows.lay(inputs_embeds)
        if self.embed_positions is not None:
            x = x + self.embed_positions(rows.positions).to(x.dtype)
        if rows.real is not None:
            x = torch.where(rows.real[..., None], x, 0.0)
        return self.dropout(x)

    def _wants_stream(self, asked: bool | None) -> bool:
        return bool(self.config.output_hidden_states if asked is None else asked)

    def _report(self, findings: list[dict[str, Any]], heavy: list[Tensor] | None, rows: Rows) -> dict[str, Any]:
        """Return the diagnostics of all blocks; entries that have tokens in the columns of the call."""
        report: dict[str, Any] = {"blocks": findings}
        for name, entry in self.report_lists.items():
            report[name] = [found.get(entry) for found in findings]
        if heavy is not None:
            for block, found in zip(self.layers, findings, strict=True):
                _restore(found, getattr(block, "token_diagnostics", ()), rows)
            first, *between, last = (tensor.detach() for tensor in heavy)
            report["input_embeddings"] = rows.restore(first)
            report["layer_outputs"] = [rows.restore(tensor) for tensor in between]
            report["final_hidden_states"] = last
        return report


def _token_embedding(config: PreTrainedConfig) -> nn.Module:
    """Return the embedding that the configuration names."""
    if config.embedding == "dense":
        return nn.Embedding(config.vocab_size, config.d_model)
    whole = config.embedding == "complex_tt"
    return HolographicTTEmbedding(
        config.vocab_size,
        config.d_model // 2 if whole else config.d_model,
        config.htt_rank,
        config.htt_num_cores,
        config.htt_phase_encoding,
        init_scale=config.initializer_range,
        complex_cores=whole,
        emit="pair" if whole else "real",
        backend=config.backend,
    )


def _sizes(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, config: PreTrainedConfig
) -> tuple[tuple[int, int], torch.device]:
    """Return B and N, and the device, of ids or vectors of tokens."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ConfigError("expected input_ids or inputs_embeds, got " + ("neither." if input_ids is None else "both."))
    given = inputs_embeds if input_ids is None else input_ids
    assert given is not None
    shape = ("B", "N") if input_ids is not None else ("B", "N", config.d_model)
    if given.ndim != len(shape) or given.shape[2:] != shape[2:] or 0 in given.shape[:2]:
        raise ShapeError(
            f"expected tokens ({', '.join(map(str, shape))}) with at least one row and one token, got "
            f"{tuple(given.shape)}."
        )
    if input_ids is not None and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise DomainError(f"expected ids of an integer dtype, got {given.dtype}; convert them.")
    return (given.shape[0], given.shape[1]), given.device


def _check_ids(ids: Tensor, size: int) -> None:
    """Raise unless ids have a row; off the CPU and in compiled graphs, which do not wait for values, nothing does."""
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= size:
        raise DomainError(
            f"expected ids in [0, {size}), got {least if least < 0 else most}; take the tokenizer of the model, and "
            "mark padding in the attention_mask."
        )


def _restore(found: dict[str, Any], names: Collection[str], rows: Rows) -> None:
    """Put entries that have an axis of tokens back into the columns of the call, in nested parts as well."""
    for name, value in found.items():
        if isinstance(value, dict):
            _restore(value, names, rows)
        elif name in names and isinstance(value, Tensor):
            found[name] = rows.restore(value)


def _reads_ahead(config: PreTrainedConfig) -> bool:
    """Return whether later tokens enter, so that the past cannot be summed up."""
    return getattr(config, "bk_mode", "causal") == "full"


def _check_options(
    config: PreTrainedConfig,
    others: Mapping[str, Any],
    diagnostics: str | None,
    use_cache: bool | None,
    cache: Cache | None,
) -> None:
    """Raise unless words are known and no argument asks for what there is not."""
    if diagnostics not in DIAGNOSTICS:
        raise ConfigError(f"expected diagnostics None, 'summary' or 'full', got {diagnostics!r}.")
    idle = {name for name, value in others.items() if value is None or value is False}
    unknown = sorted(others.keys() - _OF_PACKED_ROWS - idle)
    if unknown:
        raise ConfigError(f"unknown arguments of the model: {', '.join(unknown)}.")
    if _reads_ahead(config) and (use_cache or cache is not None):
        raise ConfigError("expected no cache with bk_mode 'full', which reads the whole row; leave use_cache out.")
