"""Reads adapter folders: the checks on what is stored, and loading in a process that never imported the method."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from so8t_torch.adapter.config import CHARTS, SO8TConfig, read_json
from so8t_torch.adapter.layer import SO8TLayer, chart_mismatch
from so8t_torch.core.errors import AdapterError, ConfigError
from so8t_torch.core.files import shown
from so8t_torch.core.weights import check_folder, check_weights

BAKED = "so8t_baked"
"""Key in ``config.json`` of a baked checkpoint; transformers carries unknown keys through loading and saving."""

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def load_adapter(
    path: str | Path,
    base: nn.Module | str | Path | None = None,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **base_arguments: Any,
) -> PeftModel:
    """Load an SO(8) adapter and its base, registering the method on the way.

    Args:
        path: adapter folder or hub id.
        base: the base model, its folder or hub id; None takes the one named in the adapter.
        adapter_name: the name it gets in the model.
        is_trainable: whether to continue training it.
        **base_arguments: passed to the base's ``from_pretrained`` (``dtype``, ``quantization_config``, ...).

    Returns:
        the base wrapped by PEFT.

    Raises:
        AdapterError: the folder is damaged, belongs to another method, names no base, or is already folded into it.
    """
    config = read_adapter_config(path)
    check_weights_file(path)
    model = base if isinstance(base, nn.Module) else load_base(config, base, **base_arguments)
    if (Path(path) / _WEIGHTS).is_file() and adapter_digest(path) in folded_adapters(model):
        raise AdapterError(f"{path}: this adapter is already folded into the base; loading it would apply it twice.")
    return PeftModel.from_pretrained(model, str(path), adapter_name=adapter_name, is_trainable=is_trainable)


def folded_adapters(model: nn.Module) -> list[str]:
    """Return the SHA-256 of every adapter that was folded into this model, in order; empty for any other model.

    Args:
        model: loaded by transformers.

    Raises:
        AdapterError: the record in its configuration is damaged.
    """
    record = getattr(getattr(model, "config", None), BAKED, None)
    if record is None:
        return []
    digests = record.get("adapters_sha256") if isinstance(record, dict) else None
    if not isinstance(digests, list):
        raise AdapterError(f"the base's config.json has a damaged record {BAKED!r}: {record!r:.80}; bake it again.")
    return list(digests)


def adapter_digest(path: str | Path) -> str:
    """Return the SHA-256 of an adapter's weights file.

    Args:
        path: adapter folder.
    """
    return hashlib.sha256((Path(path) / _WEIGHTS).read_bytes()).hexdigest()


def read_adapter_config(path: str | Path) -> SO8TConfig:
    """Read ``adapter_config.json`` strictly.

    Args:
        path: adapter folder or hub id.

    Raises:
        AdapterError: no adapter there, an unknown key, a number that is not finite, or another method's adapter.
    """
    if _is_local(path) and os.path.lexists(Path(path) / _CONFIG):
        read_json(str(Path(path) / _CONFIG))  # what is no readable file is named before the library looks for it
    try:
        config = SO8TConfig.from_pretrained(str(path))
    except AdapterError:
        raise
    except ConfigError as error:
        raise ConfigError(f"{shown(path)}: {error}") from error
    except KeyError as error:
        raise AdapterError(
            f"{shown(path)}: expected an adapter of the method SO8T, got {error!s:.80}, which is unknown."
        ) from error
    except Exception as error:  # a library's reader fails in many ways on values it did not expect
        raise AdapterError(
            f"{shown(path)}: no adapter_config.json can be read there; give the folder that save_pretrained wrote, of "
            f"a run that is RUN/adapter. The library says: {error!s:.400}"
        ) from error
    if not isinstance(config, SO8TConfig):
        raise AdapterError(f"{shown(path)}: expected an adapter of the method SO8T, got {config.peft_type}.")
    return config


def _is_local(path: str | Path) -> bool:
    """Whether a path is a folder here; anything else must have the form of a hub id.

    Raises:
        AdapterError: it is neither.
    """
    if os.path.isdir(path):
        return True
    if os.path.lexists(path) or not _HUB_ID.fullmatch(str(path)):
        raise AdapterError(
            f"{shown(path)}: no {_CONFIG} can be read there, for it is neither a folder nor a hub id; give the folder "
            "that save_pretrained wrote, of a run that is RUN/adapter."
        )
    return False


def load_base(config: SO8TConfig, base: str | Path | None = None, **arguments: Any) -> nn.Module:
    """Load the model that an adapter belongs to.

    Args:
        config: the adapter's configuration.
        base: folder or hub id; None takes the one that the adapter names.
        **arguments: for ``from_pretrained``.

    Raises:
        AdapterError: no base is named, it cannot be read, or its class cannot be told.
    """
    source = base or config.base_model_name_or_path
    if source is None:
        raise AdapterError("this adapter does not name its base model; pass base=FOLDER or base=MODEL.")
    auto_class = _auto_class(config)
    if os.path.isdir(source):
        check_folder(Path(source), AdapterError)
    # neither code nor a pickle that a folder brings along is ever run
    safe = {"trust_remote_code": False, **arguments, "use_safetensors": True}
    try:
        return auto_class.from_pretrained(str(source), **safe)
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"no base model can be read at {shown(source)}; pass base=FOLDER. The library says: {error!s:.400}"
        ) from error


def check_weights_file(path: str | Path) -> None:
    """Refuse a local adapter folder whose weights are absent, cut off or not bounded, before the base is loaded.

    Args:
        path: adapter folder or hub id; a hub id passes.

    Raises:
        AdapterError: naming the file.
    """
    if not _is_local(path):
        return
    file = Path(path) / _WEIGHTS
    check_weights(file, AdapterError)
    try:
        with safe_open(str(file), framework="pt"):
            pass
    except SafetensorError as error:
        raise AdapterError(
            f"{shown(file)}: not a complete safetensors file ({error!s:.400}); copy it again."
        ) from error


def check_tensors(stored: dict[str, Tensor], config: SO8TConfig) -> None:
    """Refuse stored tensors that are not finite floating-point numbers, and a chart other than the configured one.

    Args:
        stored: by key as in ``adapter_model.safetensors``.
        config: the configuration they come with.

    Raises:
        AdapterError: naming the tensor.
    """
    for key, tensor in stored.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"stored tensor {key!r}: expected finite numbers, found NaN or infinity.")
        if ".so8t_chart" in key and tensor.numel() != 1:
            raise AdapterError(f"stored tensor {key!r}: expected one number, got shape {tuple(tensor.shape)}.")
        if ".so8t_" in key and ".so8t_chart" not in key and not tensor.is_floating_point():
            raise AdapterError(f"stored tensor {key!r}: expected floating-point numbers, got {tensor.dtype}.")
        if ".so8t_chart" in key and int(tensor) != CHARTS.index(config.chart):
            raise AdapterError(chart_mismatch(f"stored tensor {key!r}", config.chart, int(tensor)))


def check_keys(model: nn.Module, adapter_name: str, stored: dict[str, Tensor]) -> None:
    """Refuse a file that lacks tensors of this adapter or holds tensors for modules that have none.

    Args:
        model: with the adapter installed.
        adapter_name: its name.
        stored: by the model's own keys.

    Raises:
        AdapterError: naming the tensors.
    """
    expected = {
        f"{name}.{attribute}.{adapter_name}"
        for name, layer in model.named_modules()
        if isinstance(layer, SO8TLayer)
        for attribute in (*layer.adapter_layer_names, "so8t_chart")
        if adapter_name in getattr(layer, attribute)
    }
    strip = len("base_model.model.")
    normal = {key[strip:] if key.startswith("base_model.model.") else key for key in expected}
    found = {key[strip:] if key.startswith("base_model.model.") else key for key in stored if ".so8t_" in key}
    for what, keys in (("lacks", normal - found), ("has no place for", found - normal)):
        if keys:
            shown = ", ".join(sorted(keys)[:4])
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise AdapterError(
                f"adapter {adapter_name!r}: the stored file {what} {shown}{more}; "
                "its configuration and its weights do not belong together."
            )


def _auto_class(config: SO8TConfig) -> Any:
    mapped = (config.auto_mapping or {}).get("base_model_class")
    name = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)), mapped)
    if name is None or not hasattr(transformers, name):
        raise AdapterError(
            f"cannot tell the class of the base model (task_type={config.task_type}, class {mapped}); pass base=MODEL."
        )
    return getattr(transformers, name)
