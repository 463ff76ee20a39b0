"""The state of a run as files without code in them: tensors as safetensors, everything else as JSON.

``pack`` takes a tree of plain values and tensors apart, ``unpack`` puts it together again, bit for bit. Tuples, keys
that are not texts and numbers that are not finite, which JSON cannot say, are marked by an object with one key that
begins with ``$``. Tensors in shards are gathered; every process then has to ask for the same ones in the same order.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from so8t_torch.adapter.summary import whole
from so8t_torch.core.errors import CheckpointError
from so8t_torch.core.files import read_text

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
MAX_JSON_BYTES = 1 << 28
"""Of a state: the longest holds the log of every step."""


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return what JSON can say of a tree, and its tensors by name, whole, on the CPU and apart in memory.

    Raises:
        CheckpointError: a value is neither plain nor a tensor; the text says where.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(tree, "state", tensors), tensors


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors)}/{place}"
        tensors[name] = apart(value)
        return {"$tensor": name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{place}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        pairs = [(key, _pack(item, f"{place}/{key}", tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs)
        return dict(pairs) if plain else {"$items": [[key, item] for key, item in pairs]}
    raise CheckpointError(f"{place} is a {type(value).__name__}; a checkpoint holds plain values and tensors only.")


def apart(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU; of a tensor in shards, all of it."""
    return whole(tensor).detach().to("cpu", copy=True).contiguous()


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that ``pack`` took apart.

    Raises:
        CheckpointError: a mark is unknown or a tensor missing.
    """
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1 or not next(iter(tree)).startswith("$"):
        return {key: unpack(item, tensors) for key, item in tree.items()}
    ((mark, value),) = tree.items()
    marks: dict[str, Callable[[], Any]] = {
        "$tensor": lambda: tensors[value],
        "$float": lambda: float(value),
        "$tuple": lambda: tuple(unpack(value, tensors)),
        "$items": lambda: {key: unpack(item, tensors) for key, item in value},
    }
    if mark not in marks or (mark == "$tensor" and value not in tensors):
        raise CheckpointError(f"The state holds {mark} {value!r:.80}, which has no meaning here.")
    return marks[mark]()


def write_state(folder: Path, name: str, tree: Any) -> None:
    """Write ``name.json`` and, where there are tensors, ``name.safetensors``."""
    plain, tensors = pack(tree)
    write_packed(folder, name, plain, tensors)


def write_packed(folder: Path, name: str, plain: Any, tensors: Mapping[str, Tensor]) -> None:
    """Write what ``pack`` returned."""
    (folder / f"{name}.json").write_text(json.dumps(plain, allow_nan=False) + "\n", encoding="utf-8")
    if tensors:
        save_file(dict(tensors), folder / f"{name}.safetensors")


def read_state(folder: Path, name: str) -> Any:
    """Return what ``write_state`` wrote.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        plain = json.loads(read_text(folder / f"{name}.json", CheckpointError, limit=MAX_JSON_BYTES))
        path = folder / f"{name}.safetensors"
        return unpack(plain, load_file(path) if path.is_file() else {})
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {name} cannot be read ({error}).") from error


def generators() -> dict[str, Any]:
    """Return the states of the random number generators of Python, NumPy and torch, on this process's device too."""
    numbers: Any = np.random.get_state(legacy=False)
    numbers["state"]["key"] = torch.from_numpy(numbers["state"]["key"].astype(np.int64))
    found = {"python": random.getstate(), "numpy": numbers, "torch": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_generators(states: Mapping[str, Any]) -> None:
    """Put the random number generators where ``generators`` found them."""
    random.setstate(states["python"])
    numbers = {**states["numpy"], "state": {**states["numpy"]["state"]}}
    numbers["state"]["key"] = numbers["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numbers)
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what of a model a checkpoint holds, sharing its memory: the adapter, or without one everything."""
    if isinstance(model, PeftModel):
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    return model.state_dict()


def weights_file(model: nn.Module) -> str:
    """Return the name of the file with the model's tensors."""
    return ADAPTER_WEIGHTS if isinstance(model, PeftModel) else MODEL_WEIGHTS


def write_model(model: nn.Module, folder: Path, *, writes: bool) -> None:
    """Write the model's tensors and, of an adapter, its configuration, so that the folder loads as an adapter.

    Args:
        model: every process calls with its own, which may be in shards.
        folder: of the checkpoint.
        writes: whether this process writes.
    """
    tensors = {name: apart(value) for name, value in model_tensors(model).items()}
    if not writes:
        return
    if isinstance(model, PeftModel):
        model.peft_config["default"].save_pretrained(str(folder))
    save_file(tensors, folder / weights_file(model), metadata={"format": "pt"})


@torch.no_grad()
def load_model(model: nn.Module, folder: Path) -> None:
    """Put a checkpoint's tensors into the model, in place.

    Raises:
        CheckpointError: names, shapes or dtypes are not the model's.
    """
    path = folder / weights_file(model)
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    live = model_tensors(model)
    if odd := sorted(live.keys() ^ stored.keys()):
        raise CheckpointError(f"{path}: {len(odd)} tensors are only in the file or only in the model, first {odd[:3]}.")
    for name, target in live.items():
        if (target.shape, target.dtype) != (stored[name].shape, stored[name].dtype):
            raise CheckpointError(
                f"{path}: {name} is {tuple(stored[name].shape)} {stored[name].dtype}, but the model has "
                f"{tuple(target.shape)} {target.dtype}."
            )
    for name, target in live.items():
        target.copy_(like(target, stored[name]))


def like(target: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor in the place of ``target``: on its device, and in shards if that is."""
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device)


def load_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put a packed optimiser state back; moments take the place, and the shards, of their parameters."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = {
        index: {
            name: like(parameters[index], value) if _of_shape(value, parameters[index]) else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    optimiser.load_state_dict({**state, "state": moments})


def _of_shape(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape


def read_foreign(path: str | Path) -> dict[str, Any]:
    """Return the dictionary in a ``.pt`` file of somebody else; nothing in it is executed.

    This is the only place that opens such a file. Only tensors and plain values are read: one that needs more is
    refused, never tried again with less care.

    Args:
        path: written by ``torch.save``.

    Raises:
        CheckpointError: it holds anything else, or is damaged.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is none of torch's its reader says whatever it trips over
        raise CheckpointError(
            f"{path} is not a file of tensors and plain values ({_reason(error)}); it stays unread."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}; expected a dictionary of tensors.")
    return found


def _reason(error: Exception) -> str:
    """Return what of a reader's error tells about the file; advice on how to execute it is left out."""
    refused = re.search(r"Unsupported \w+: .*?(?=was not an allowed| that|$)", str(error), re.MULTILINE)
    return f"{type(error).__name__}: {(refused[0] if refused else str(error)).strip():.200}".splitlines()[0]
