"""A saved language model to train on: what of its configuration may change, its tokenizer, its weights.

Weights and configuration are those of the folder. A field may be changed as long as every tensor keeps its name and
shape. All weights train, also those that were frozen when the model was saved, since a folder does not say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from so8t_torch.core.errors import ConfigError
from so8t_torch.core.files import shown
from so8t_torch.models.stored import holds_tokenizer, model_folder, read_config, read_model, read_tokenizer
from so8t_torch.train.config import ModelSection

KINDS = {"phase1": "so8t_phase1", "phase2": "so8t_phase2", "llama": "llama", "mamba": "mamba"}
"""How the configuration of a kind names itself."""


def folder_of(section: ModelSection) -> Path:
    """Return where the model of ``init_from`` lies.

    Raises:
        ConfigError: there is none.
        CheckpointError: a file of it is damaged.
    """
    assert section.init_from is not None, "asked of a section that begins from a folder"
    return model_folder(section.init_from)


def configuration(section: ModelSection) -> PreTrainedConfig:
    """Return the configuration of the folder, with the section's fields.

    Raises:
        ConfigError: it is of another kind, its weights are quantised, or a field would change a tensor's shape.
    """
    path = folder_of(section)
    found = read_config(path)
    if found.model_type != KINDS[section.kind]:
        convert = f" Convert it first: so8t convert {section.init_from} OUT." if section.kind == "phase2" else ""
        raise ConfigError(
            f"model.init_from {shown(path)}: expected a model of model.kind {section.kind!r}, got one of type "
            f"{found.model_type!r}.{convert}"
        )
    if getattr(found, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.init_from {shown(path)}: expected plain weights, got quantised ones; dequantise them."
        )
    wanted = _with(found, section.fields)
    if _tensors(wanted) != _tensors(found):
        lines = "".join(
            f"\n  model.fields.{name}: {section.fields[name]!r}, and {getattr(found, name)!r} in the folder"
            for name in _culprits(found, section.fields)
        )
        raise ConfigError(
            f"model.init_from {shown(path)}: its weights do not fit a model with other fields; leave these as they "
            f"were:{lines}"
        )
    return wanted


def _with(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    return type(config).from_dict(config.to_dict() | dict(fields)) if fields else config


def _tensors(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors, shared ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    saved = model.state_dict(keep_vars=True)
    once = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    return {name: tensor.shape for name, tensor in saved.items() if name in once}


def _culprits(config: PreTrainedConfig, fields: Mapping[str, Any]) -> list[str]:
    """Return the fields that alone change a shape, or make no configuration; all of them where none does."""
    found, shapes = [], _tensors(config)
    for name, value in fields.items():
        try:
            changed = _tensors(_with(config, {name: value})) != shapes
        except ConfigError:
            changed = True
        if changed:
            found.append(name)
    return found or list(fields)


def tokenizer_of(section: ModelSection, size: int) -> PreTrainedTokenizerFast | None:
    """Return the tokenizer of the folder, or ``None`` where it holds none.

    Args:
        section: with ``init_from``.
        size: ids that the model knows.

    Raises:
        ConfigError: it has more ids than the model, no end of a text, or is not one of bytes.
    """
    path = folder_of(section)
    if not holds_tokenizer(path):
        return None
    tokenizer = read_tokenizer(path)
    if len(tokenizer) > size:
        raise ConfigError(
            f"model.init_from {shown(path)}: its tokenizer has {len(tokenizer):,} tokens, its model knows {size:,}: "
            "they are not of one run. Copy the tokenizer that the model was trained with."
        )
    decoder = tokenizer.backend_tokenizer.decoder
    if tokenizer.eos_token_id is None or not isinstance(decoder, decoders.ByteLevel):
        raise ConfigError(
            f"model.init_from {shown(path)}: running text needs a byte-level tokenizer with a token for the end of a "
            f"document, got {type(decoder).__name__} and eos_token {tokenizer.eos_token!r}. Remove it from the folder "
            "to take that of data.text."
        )
    return tokenizer


def check_vocabulary(section: ModelSection, size: int, tokens: int) -> None:
    """Refuse the tokenizer of the text for a model of another vocabulary.

    Args:
        section: with ``init_from``.
        size: ids that the model knows.
        tokens: those of the tokenizer.

    Raises:
        ConfigError: they differ.
    """
    if size != tokens:
        raise ConfigError(
            f"model.init_from {section.init_from}: its model knows {size:,} tokens, the tokenizer of data.text has "
            f"{tokens:,}, and the folder holds none: a mismatched checkpoint. Copy tokenizer.json and "
            "tokenizer_config.json of the model into it, or set data.text.tokenizer and vocabulary as it was trained."
        )


def weights(section: ModelSection, settings: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of the folder in float32.

    Args:
        section: with ``init_from``.
        settings: of ``configuration``.

    Raises:
        CheckpointError: weights that are damaged, incomplete or not finite.
    """
    return read_model(folder_of(section), settings, dtype=torch.float32).train().requires_grad_(True)
