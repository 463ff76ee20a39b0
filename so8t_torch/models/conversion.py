"""Phase 1 to Phase 2: one tensor for one, by an explicit table, into a model that has been initialised before.

    Phase 1                          Phase 2
    embed_tokens, its cores, phase   embed_tokens; a train that becomes a table is written out
    embed_positions.weight           embed_positions.weight, where both train it
    layers.i.ffn_norm                layers.i.ffn_norm
    layers.i.ffn.up, .down           layers.i.ffn.0, .3; a product of low rank is multiplied out
    norm                             norm
    lm_head                          lm_head; a tied head that becomes one of its own is written out
    layers.i.mixer, mixer_norm       nothing: the AR-SSM has no counterpart

What is copied is equal bit for bit; what is computed on the way equals that computation. Nothing is frozen but what
came from Phase 1, in the model that is returned alone: a folder does not say what was frozen, so what is read from one
trains. The model of Phase 1 is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.core.files import shown
from so8t_torch.core.tensors import not_finite
from so8t_torch.models.checkpoint_folder import free_folder, in_one_step
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.factory import create_phase2_model
from so8t_torch.models.phase1 import Phase1ForCausalLM
from so8t_torch.models.phase2 import Phase2ForCausalLM
from so8t_torch.models.stored import holds_tokenizer, model_folder, read_model, read_tokenizer
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding

__all__ = ["ConversionReport", "convert_folder", "convert_phase1_to_phase2", "phase2_config_of"]

HEAD_DIM = 64
"""Width of a head where the width of the model is a multiple of it."""
_SHARED = (
    *("vocab_size", "d_model", "n_layers", "n_seq", "ffn_dim", "dropout", "layer_norm_eps", "position_embedding"),
    *("position_scale", "zeta_embedding_trainable", "htt_rank", "htt_num_cores", "htt_phase_encoding"),
    *("tie_word_embeddings", "backend", "initializer_range", "use_cache", "embedding"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""What the configuration of a converted model takes over."""


class _Entry(NamedTuple):
    """A tensor of Phase 2, the tensors of Phase 1 that it comes from, and how where it is no copy."""

    target: str
    sources: tuple[str, ...]
    compute: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What became of every tensor.

    Attributes:
        copied: what each tensor of Phase 2 that has values of Phase 1 came from.
        computed: those among them that are no copies, but products or rows written out.
        initialised: tensors of Phase 2 that start afresh.
        unmatched: tensors of Phase 1 that went nowhere.
        frozen: tensors of Phase 2 that are not trained.
    """

    copied: dict[str, tuple[str, ...]]
    computed: tuple[str, ...]
    initialised: tuple[str, ...]
    unmatched: tuple[str, ...]
    frozen: tuple[str, ...]

    def table(self) -> Table:
        """Return the report as a table for a terminal."""
        table = Table(title="Phase 1 → Phase 2")
        for column in ("tensor of Phase 2", "from Phase 1"):
            table.add_column(column, overflow="fold")
        for target, sources in self.copied.items():
            how = " (computed)" if target in self.computed else ""
            table.add_row(target, " · ".join(sources) + how + (", frozen" if target in self.frozen else ""))
        for name in self.initialised:
            table.add_row(name, "initialised")
        for name in self.unmatched:
            table.add_row("–", f"{name}, without counterpart")
        return table


def phase2_config_of(config: Phase1Config) -> Phase2Config:
    """Return a configuration of Phase 2 with the sizes, embedding and head of one of Phase 1.

    Args:
        config: of Phase 1.
    """
    heads = max(config.d_model // HEAD_DIM, 1)
    shared = {name: getattr(config, name) for name in _SHARED}
    return Phase2Config(**shared, num_heads=heads, head_dim=config.d_model // heads)


def convert_phase1_to_phase2(
    phase1_model: Phase1ForCausalLM,
    phase2_config: Phase2Config | None = None,
    *,
    copy_compatible_weights: bool = True,
    freeze_phase1_weights: bool = False,
    seed: int = 0,
) -> tuple[Phase2ForCausalLM, ConversionReport]:
    """Return a language model of Phase 2 with what it can take from one of Phase 1, and a report.

    Args:
        phase1_model: only read.
        phase2_config: of the result; ``phase2_config_of`` that of Phase 1 without.
        copy_compatible_weights: whether anything is copied at all.
        freeze_phase1_weights: whether what was copied is not trained.
        seed: of what is initialised; PyTorch's global generators do not move.

    Returns:
        The model on the device and in the dtype of phase1_model, and what became of every tensor.

    Raises:
        ConfigError: phase1_model or phase2_config is none, the result is to be an encoder, or a tensor and its
            counterpart differ in shape; all are listed.
        DomainError: a tensor that would be copied is not finite.
    """
    if not isinstance(phase1_model, Phase1ForCausalLM):
        raise ConfigError(
            f"convert_phase1_to_phase2: expected a Phase1ForCausalLM, got {type(phase1_model).__name__}; load one with "
            "Phase1ForCausalLM.from_pretrained."
        )
    config = phase2_config_of(phase1_model.config) if phase2_config is None else phase2_config
    if not isinstance(config, Phase2Config):
        raise ConfigError(
            f"convert_phase1_to_phase2: expected a Phase2Config, got a {type(config).__name__}; get_phase2_preset "
            "returns that of a preset."
        )
    if config.is_encoder:
        raise ConfigError("convert_phase1_to_phase2: expected is_encoder false, since Phase 1 is a language model.")
    first = next(phase1_model.parameters())
    model = create_phase2_model(config, device="cpu", dtype=first.dtype, seed=seed)
    source, target = _tensors(phase1_model), _tensors(model)
    entries = [e for e in _entries(phase1_model, model) if e.target in target and source.keys() >= set(e.sources)]
    entries = entries if copy_compatible_weights else []
    with torch.no_grad():
        values = {e.target: source[e.sources[0]] if e.compute is None else e.compute() for e in entries}
        _check(values, target)
        for name, value in values.items():
            target[name].copy_(value)
    trained = dict(model.named_parameters())
    frozen = [name for name in values if name in trained] if freeze_phase1_weights else []
    for name in frozen:
        trained[name].requires_grad_(False)
    used = {name for entry in entries for name in entry.sources}
    report = ConversionReport(
        copied={entry.target: entry.sources for entry in entries},
        computed=tuple(entry.target for entry in entries if entry.compute is not None),
        initialised=tuple(name for name in target if name not in values),
        unmatched=tuple(name for name in source if name not in used),
        frozen=tuple(frozen),
    )
    return model.to(first.device), report


def convert_folder(source: str | Path, target: str | Path, *, seed: int = 0) -> ConversionReport:
    """Write the folder of a Phase 2 model with what it can take from one of Phase 1, and the tokenizer beside it.

    Args:
        source: a run that trained a model of Phase 1, or the folder of one; only read.
        target: folder to write; absent or empty.
        seed: of what is initialised.

    Raises:
        ConfigError: source holds no model of Phase 1, or there is something at target.
        CheckpointError: weights that are damaged, incomplete or not finite.
    """
    path = model_folder(source)
    out = free_folder(target, Path(source))
    phase1 = read_model(path)
    if not isinstance(phase1, Phase1ForCausalLM):
        raise ConfigError(f"{shown(source)}: expected a model of Phase 1 to convert, got a {type(phase1).__name__}.")
    model, report = convert_phase1_to_phase2(phase1, seed=seed)
    tokenizer = read_tokenizer(path) if holds_tokenizer(path) else None

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    in_one_step(out, fill)
    return report


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, shared ones once, and the buffers that are saved."""
    saved = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


def _entries(phase1: Phase1ForCausalLM, phase2: Phase2ForCausalLM) -> Iterator[_Entry]:
    """Return what comes from where, in the order of the model."""
    yield from _of_the_embedding(phase1, phase2)
    yield _Entry("model.embed_positions.weight", ("model.embed_positions.weight",))
    for i in range(min(len(phase1.model.layers), len(phase2.model.layers))):
        block = f"model.layers.{i}."
        for part in ("weight", "bias"):
            yield _Entry(f"{block}ffn_norm.{part}", (f"{block}ffn_norm.{part}",))
        for name, place in (("up", "0"), ("down", "3")):
            yield from _of_a_map(getattr(phase1.model.layers[i].ffn, name), f"{block}ffn.{name}", f"{block}ffn.{place}")
    for part in ("weight", "bias"):
        yield _Entry(f"model.norm.{part}", (f"model.norm.{part}",))
    if phase1.lm_head is not None:
        yield _Entry("lm_head.weight", (_first_name(phase1, phase1.lm_head.weight),))
    elif phase2.lm_head is not None:
        yield _written_out("lm_head.weight", phase1)


def _of_the_embedding(phase1: Phase1ForCausalLM, phase2: Phase2ForCausalLM) -> Iterator[_Entry]:
    """Return the entries of the token embedding: the same kind, or a train that becomes a table."""
    one, two = phase1.model.embed_tokens, phase2.model.embed_tokens
    if isinstance(one, HolographicTTEmbedding) and isinstance(two, nn.Embedding) and not one.complex_cores:
        yield _written_out("model.embed_tokens.weight", phase1)
    elif type(one) is type(two):
        names = [*dict(one.named_parameters()), *dict(one.named_buffers())]
        yield from (_Entry(f"model.embed_tokens.{name}", (f"model.embed_tokens.{name}",)) for name in names)


def _of_a_map(layer: nn.Module, source: str, target: str) -> Iterator[_Entry]:
    """Return the entries of a linear map, or of a product of two."""
    if isinstance(layer, nn.Sequential):
        inner, outer = (part.weight for part in layer if isinstance(part, nn.Linear))
        names = f"{source}.0.weight", f"{source}.1.weight"
        yield _Entry(f"{target}.weight", names, lambda: outer @ inner)
        yield _Entry(f"{target}.bias", (f"{source}.1.bias",))
    else:
        yield from (_Entry(f"{target}.{part}", (f"{source}.{part}",)) for part in ("weight", "bias"))


def _written_out(target: str, phase1: Phase1ForCausalLM) -> _Entry:
    """Return the entry of the rows of a train."""
    train: HolographicTTEmbedding = phase1.get_input_embeddings()
    names = [*dict(train.named_parameters()), *dict(train.named_buffers())]
    return _Entry(target, tuple(f"model.embed_tokens.{name}" for name in names), train.dense_table)


def _first_name(model: nn.Module, parameter: Tensor) -> str:
    """Return the name under which a parameter that may be shared is known."""
    return next(name for name, other in model.named_parameters() if other is parameter)


def _check(values: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Raise unless all values fit their places and are finite."""
    apart = [
        f"{name}: {tuple(value.shape)} of Phase 1, {tuple(target[name].shape)} of Phase 2"
        for name, value in values.items()
        if value.shape != target[name].shape
    ]
    if apart:
        raise ConfigError(
            "convert_phase1_to_phase2: expected tensors of the same shape; give a configuration of these sizes, or "
            "copy_compatible_weights=False:\n  " + "\n  ".join(apart)
        )
    broken = not_finite(values)
    if broken:
        raise DomainError(
            f"convert_phase1_to_phase2: expected finite weights, got NaN or infinity for {', '.join(broken)}; take a "
            "checkpoint from before they broke."
        )
