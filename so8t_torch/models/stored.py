"""A language model in a folder: found, read, and refused where its weights are damaged, missing or not finite.

A folder is a run that trained a whole model, with the model in ``model/``, or the model's own, as ``save_pretrained``
writes it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from so8t_torch.core.errors import CheckpointError, ConfigError, SO8TError
from so8t_torch.core.files import shown
from so8t_torch.core.tensors import listed, not_finite
from so8t_torch.core.weights import check_folder
from so8t_torch.models.checkpoint_folder import library_config

__all__ = [
    "check_finite",
    "holds_tokenizer",
    "make_known",
    "model_folder",
    "read_config",
    "read_model",
    "read_tokenizer",
]

MODEL = "model"
"""Folder of a run in which a model that was trained whole lies."""

_OWN = ("so8t_torch.models.phase1", "so8t_torch.models.phase2")
"""Modules that make the library's Auto classes know the models in them."""


def make_known() -> None:
    """Make the library's Auto classes know the models of this package."""
    for name in _OWN:
        import_module(name)


def model_folder(folder: str | Path) -> Path:
    """Return where the model of a run lies, or of a model's own folder that folder.

    Args:
        folder: of either.

    Raises:
        ConfigError: there is no model.
        CheckpointError: a file of it is damaged.
    """
    path = Path(folder).expanduser()
    path = path / MODEL if (path / MODEL).is_dir() else path
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{shown(folder)}: expected a run that trained a whole model, or a model's folder with config.json; a run "
            "of an adapter is folded by so8t bake first."
        )
    check_folder(path, CheckpointError)
    return path


def read_config(path: Path) -> PreTrainedConfig:
    """Return the configuration of a stored model.

    Args:
        path: of ``model_folder``.

    Raises:
        ConfigError: it is none.
    """
    make_known()
    return library_config(path)


def read_model(
    path: Path, config: PreTrainedConfig | None = None, *, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Return a stored model; every weight of it comes from the folder, and nothing there is left over.

    Args:
        path: of ``model_folder``.
        config: in place of the stored one; it must ask for the same weights.
        dtype: of the weights, the stored one without.

    Raises:
        CheckpointError: files that are cut off, weights that are missing, left over, of another shape or not finite.
        ConfigError: the configuration is none.
    """
    chosen = read_config(path) if config is None else config
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, config=chosen, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, **options
        )
    except SO8TError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{shown(path)}: no model can be read there; copy it again. The library says: {error!s:.400}"
        ) from error
    _check_complete(path, found)
    check_finite(model, path)
    return model


def _check_complete(path: Path, found: dict[str, Any]) -> None:
    """Raise unless file and model have the same tensors."""
    apart = [f"{name} {tuple(stored)} for {tuple(wanted)}" for name, stored, wanted in sorted(found["mismatched_keys"])]
    problems = [
        f"{listed(names)} {what}"
        for names, what in (
            (sorted(found["missing_keys"]), "missing"),
            (sorted(found["unexpected_keys"]), "left over"),
            (apart, "of another shape"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{shown(path)}: the weights are not those of config.json: {'; '.join(problems)}. Copy both again from one "
            "place."
        )


def check_finite(model: nn.Module, source: str | Path) -> None:
    """Raise unless every number of a model is finite.

    Args:
        model: as it was read.
        source: where from, for the error.

    Raises:
        CheckpointError: naming the tensors that are not.
    """
    broken = not_finite(model.state_dict())
    if broken:
        raise CheckpointError(
            f"{shown(source)}: expected finite weights, got NaN or infinity in {listed(broken)}; take a checkpoint "
            "from before they broke."
        )


def holds_tokenizer(path: Path) -> bool:
    """Whether a tokenizer lies beside a stored model.

    Args:
        path: of ``model_folder``.
    """
    return (path / "tokenizer.json").is_file()


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a stored model.

    Args:
        path: of ``model_folder``.

    Raises:
        ConfigError: there is none that can be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as for a configuration
        raise ConfigError(f"{shown(path)}: no tokenizer can be read there. The library says: {error!s:.400}") from error
