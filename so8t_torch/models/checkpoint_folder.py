"""Checkpoint folders: which safetensors file holds which tensor, and folders that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from so8t_torch.core.errors import ConfigError, DataError, SO8TError
from so8t_torch.core.files import shown
from so8t_torch.core.json_text import read_object, short
from so8t_torch.core.weights import check_weights, stored_tensors

__all__ = ["Checkpoint", "free_folder", "in_one_step", "model_class", "open_checkpoint", "tensors_of"]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a checkpoint folder: which file holds which tensor."""

    folder: Path
    files: dict[str, str]

    def read(self, key: str) -> Tensor:
        """Return one tensor, reading no other; a DataError if its file does not hold it."""
        path = self.folder / self.files[key]
        with _opened(path) as file:
            if key not in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                raise DataError(f"{path}: expected the tensor {key!r}, which the index places there; copy both again.")
            return file.get_tensor(key)

    def names(self) -> list[str]:
        """Return the weight files in order."""
        return sorted(set(self.files.values()))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return which file holds which tensor, after checking that every file is there.

    Args:
        folder: with safetensors weights, whole or in shards.

    Raises:
        DataError: there are none, the index is unreadable, or a file is missing or damaged.
    """
    return Checkpoint(folder, stored_tensors(folder, DataError))


def library_config(folder: Path) -> PreTrainedConfig:
    """Return the configuration of a model as transformers reads it.

    Args:
        folder: with ``config.json``.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except SO8TError:
        raise
    except Exception as error:  # a library's reader fails in many ways on values it did not expect
        raise ConfigError(
            f"{shown(folder)}: no model configuration can be read there. The library says: {error!s:.400}"
        ) from error


def model_class(folder: Path) -> Any:
    """Return the class of transformers that ``config.json`` names.

    Args:
        folder: with ``config.json``.

    Raises:
        ConfigError: it cannot be read, names no class of transformers, or says that the weights are quantised.
    """
    read_object(folder / "config.json", ConfigError)
    config = library_config(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{folder}: expected plain weights, got a quantised checkpoint; dequantise it first.")
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    kind = None if name is None else getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ConfigError(
            f"{shown(folder)}: expected an architecture that transformers has, got {short(names)} in config.json."
        )
    return kind


def in_one_step(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder beside the target and rename it; a failure leaves nothing behind.

    Args:
        target: absent or empty.
        fill: writes into the folder it is given.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(staging)
        if target.exists():
            target.rmdir()
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def free_folder(path: str | Path | None, source: Path | None) -> Path:
    """Return the path, links followed, at which a folder may be made; its parent exists then and can be written to.

    Args:
        path: the folder asked for.
        source: a folder that must not contain it, or None.

    Raises:
        ConfigError: no path is given, something is there already, it lies in the source, or its parent cannot be made
            or written to.
    """
    if path is None:
        raise ConfigError("expected an output folder; give one, or ask for a dry run.")
    target = Path(path).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"expected {target} not to exist or to be an empty folder; choose another name.")
    if source is not None and target.is_relative_to(source.resolve()):
        raise ConfigError(f"expected an output outside the source {source}, which is only read, got {target}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # tried, because permissions do not tell the whole truth: before the work, not after it
        Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)).rmdir()
    except OSError as error:
        raise ConfigError(f"{target.parent} cannot be made or written to ({error}); choose another place.") from error
    return target


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file.

    Args:
        path: the file.

    Raises:
        DataError: it is missing or damaged.
    """
    with _opened(path):
        return load_file(path)


def _opened(path: Path) -> Any:
    check_weights(path, DataError)
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a complete safetensors file ({error}); copy it again.") from error
