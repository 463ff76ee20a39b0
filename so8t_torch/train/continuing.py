"""A saved language model to train on: what of its configuration may change, its tokenizer, its weights.

Weights and configuration are those of the folder. A field may be changed as long as every tensor keeps its name and
shape, and the field says more than how weights are drawn. All weights train, also those that were frozen when the model
was saved, since a folder does not say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from so8t_torch.core.errors import ConfigError, SO8TError
from so8t_torch.core.files import shown
from so8t_torch.models.stored import holds_tokenizer, model_folder, read_config, read_model, read_tokenizer
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer
from so8t_torch.train.config import ModelSection

KINDS = {"phase1": "so8t_phase1", "phase2": "so8t_phase2", "llama": "llama", "mamba": "mamba"}
"""How the configuration of a kind names itself."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What the configuration says of generation, which a folder has in a file of its own as well."""
_OF_THE_START = {
    "phase1": ("initializer_range", "ar_ssm_decays"),
    "phase2": ("initializer_range", "use_zeta_init"),
    "llama": ("initializer_range",),
    "mamba": (
        *("initializer_range", "rescale_prenorm_residual", "time_step_scale", "time_step_min", "time_step_max"),
        *("time_step_floor", "time_step_init_scheme"),
    ),
}
"""Fields of a kind that say how its weights are drawn, and nothing about drawn ones."""
_FOLLOWS = {"expand": "intermediate_size"}
"""What a configuration stores beside the field that it follows from."""


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
        ConfigError: it is of another kind, its weights are quantised, or a field would change a tensor, makes no model,
            or says only how weights are drawn.
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
    with converted(f"model.init_from {shown(path)}: no model can be built from its config.json"):
        shapes = _tensors(found)
    with converted(f"model.init_from {shown(path)}: no model of kind {section.kind} has {_told(section.fields)}"):
        wanted = _with(found, section.fields)
        fits = _tensors(wanted) == shapes
    if not fits:
        raise ConfigError(
            f"model.init_from {shown(path)}: its weights do not fit a model with other fields; leave these as they "
            f"were:{_beside(_culprits(found, section.fields), section.fields, found)}"
        )
    _check_effect(section, found)
    return wanted


@contextmanager
def converted(told: str) -> Iterator[None]:
    """Turn what a library raises on values that it did not expect into a ``ConfigError``.

    Args:
        told: what was asked for.

    Raises:
        ConfigError: in place of the library's error.
    """
    try:
        yield
    except SO8TError:
        raise
    except Exception as error:  # configurations and models of a library fail in many ways
        raise ConfigError(f"{told} ({type(error).__name__}: {error!s:.400}).") from error


def check_buildable(section: ModelSection, config: PreTrainedConfig) -> None:
    """Refuse fields with which the library builds no model.

    Args:
        section: whose fields they are.
        config: with them.

    Raises:
        ConfigError: naming the fields.
    """
    with converted(f"model.fields: no model of kind {section.kind} has {_told(section.fields)}"):
        _tensors(config)


def _told(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r:.80}" for name, value in fields.items()) or "the fields of its kind"


def _with(config: PreTrainedConfig, fields: Mapping[str, Any]) -> PreTrainedConfig:
    if not fields:
        return config
    stale = {_FOLLOWS[name] for name in fields if name in _FOLLOWS}
    tree = {name: value for name, value in config.to_dict().items() if name not in stale}
    return type(config).from_dict(tree | dict(fields))


def _tensors(config: PreTrainedConfig) -> dict[str, tuple[torch.Size, bool]]:
    """Return the shapes of a model's tensors, shared ones once, and which of them are parameters."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    saved = model.state_dict(keep_vars=True)
    trained = dict(model.named_parameters())
    once = {*trained, *dict(model.named_buffers())}
    return {name: (tensor.shape, name in trained) for name, tensor in saved.items() if name in once}


def _check_effect(section: ModelSection, found: PreTrainedConfig) -> None:
    """Refuse other values of fields that act only where weights are drawn."""
    started = {*_OF_THE_START[section.kind]}
    if getattr(found, "zeta_embedding_trainable", False):
        started.add("position_scale")
    if getattr(found, "hebbian_eta_mode", None) == "head":
        started.add("hebbian_eta")
    idle = [name for name, value in section.fields.items() if name in started and value != getattr(found, name)]
    if idle:
        raise ConfigError(
            f"model.init_from {section.init_from}: these fields say how weights are drawn and change none that are "
            f"there; leave them out:{_beside(idle, section.fields, found)}"
        )


def _beside(names: list[str], fields: Mapping[str, Any], found: PreTrainedConfig) -> str:
    """Return a line for each field with its value, and that of the folder."""
    return "".join(
        f"\n  model.fields.{name}: {fields[name]!r}, and {getattr(found, name)!r} in the folder" for name in names
    )


def _culprits(config: PreTrainedConfig, fields: Mapping[str, Any]) -> list[str]:
    """Return the fields that alone change a shape, or make no configuration; all of them where none does."""
    found, shapes = [], _tensors(config)
    for name, value in fields.items():
        try:
            with converted(name):
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
    model = read_model(folder_of(section), settings, dtype=torch.float32).train().requires_grad_(True)
    _put_back(model, section.fields)
    return model


def _put_back(model: PreTrainedModel, fields: Mapping[str, Any]) -> None:
    """Give a model what its configuration says and other files of the folder have too: ids, and gates with fields."""
    for name in IDS:
        if name in fields or getattr(model.generation_config, name) is None:
            setattr(model.generation_config, name, getattr(model.config, name))
    for mixer in model.modules():
        if isinstance(mixer, AdaptiveRankSemiseparableLayer):
            mixer.set_gate_mode(
                fields.get("ar_ssm_gate_mode", mixer.gate_mode),
                fields.get("ar_ssm_gumbel_temperature", mixer.gumbel_temperature),
            )
