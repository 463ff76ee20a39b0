"""Checkpoint folders of the language models in production's layout and in that of Flax, read, written and converted.

    torch: config.json, model.safetensors (or shards with an index), names and orientation of production
    flax:  config.json, flax_model.safetensors, attributes joined by dots, kernels (inputs, outputs)

Numbers cross unchanged, in the dtype that they are stored in, with the settings that Phase 1's mixers keep beside them.
What is converted is checked first: every tensor that the configuration asks for is there, with its shape, and all are
finite.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from so8t_jax.nn.language_model import RecurrentForCausalLM, RecurrentModel
from so8t_jax.nn.phase1 import Phase1ForCausalLM, Phase1Model
from so8t_jax.nn.phase1_config import Phase1Config
from so8t_jax.nn.phase2 import Phase2ForCausalLM, Phase2Model
from so8t_jax.nn.phase2_config import Phase2Config
from so8t_jax.nn.semiseparable import AdaptiveRankSemiseparableLayer
from so8t_jax.nn.weights import Place, load, mismatches, places

__all__ = ["Layout", "convert", "load_model"]

Layout = Literal["torch", "flax"]
FILES = {"torch": "model.safetensors", "flax": "flax_model.safetensors"}
INDEX = "model.safetensors.index.json"
FORMATS = {"torch": "pt", "flax": "flax"}
"""What the library of safetensors files calls the two."""
MODELS: dict[str, tuple[Any, type[RecurrentModel], type[RecurrentForCausalLM]]] = {
    "so8t_phase1": (Phase1Config, Phase1Model, Phase1ForCausalLM),
    "so8t_phase2": (Phase2Config, Phase2Model, Phase2ForCausalLM),
}
Model = RecurrentForCausalLM | RecurrentModel
DESCRIPTIONS = {".jinja", ".json", ".model", ".txt"}
"""Ends of the names of files that describe a model, its tokenizer, or how it writes."""
SETTINGS = "_extra_state"
"""What a tensor is called that holds settings of a layer, and no weights."""


def load_model(folder: str | Path) -> Model:
    """Return the model of a checkpoint folder of either layout; the body alone for an encoder.

    Args:
        folder: with ``config.json`` and weights.

    Raises:
        ValueError: it is no such folder, or tensors are missing, unknown, of another shape, or not finite.
    """
    tree, layout = _described(Path(folder))
    found = _read(Path(folder), layout, _blank(tree)[1])
    settings = {name: found.pop(name) for name in [*found] if name.endswith(SETTINGS)}
    floating = next(value.dtype for value in found.values() if not np.issubdtype(value.dtype, np.integer))
    model = load(_blank(tree, floating)[0], found)
    for name, layer in _set_layers(model).items():
        layer.set_extra_state(settings[name])
    return model


def convert(source: str | Path, output: str | Path, to: Layout) -> int:
    """Write a checkpoint folder with its weights in the other layout, and return how many tensors there are.

    What describes the model, its tokenizer and how it writes is copied.

    Args:
        source: folder of the layout that is not asked for; only read.
        output: folder to write, absent or empty; it appears whole or not at all.
        to: layout to write.

    Raises:
        ValueError: as ``load_model``, the source has the layout that is asked for, or the output is not free.
    """
    if to not in FILES:
        raise ValueError(f"expected the layout {' or '.join(FILES)}, got {to!r}")
    folder, target = Path(source), Path(output).resolve()
    tree, layout = _described(folder)
    if layout == to:
        raise ValueError(f"{folder} has the layout {to!r} already")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"expected {target} not to exist or to be an empty folder; choose another name")
    _, wanted = _blank(tree)
    found = _read(folder, layout, wanted)
    stored = {
        (_flax_name(place) if to == "flax" else name): np.ascontiguousarray(
            found[name].T if to == "flax" and place.transposed else found[name]
        )
        for name, place in wanted.items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        save_file(stored, staging / FILES[to], metadata={"format": FORMATS[to]})
        for path in _beside(folder):
            shutil.copyfile(path, staging / path.name)
        if target.exists():
            target.rmdir()
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return len(stored)


def _beside(folder: Path) -> list[Path]:
    """Return the files that go with weights of either layout: configuration, tokenizer, settings of generation."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in DESCRIPTIONS and not path.name.endswith(".safetensors.index.json")
    ]


def _described(folder: Path) -> tuple[dict[str, Any], Layout]:
    """Return the content of ``config.json``, and the layout of the weights beside it."""
    tree = _json(folder / "config.json")
    if (folder / FILES["flax"]).is_file():
        return tree, "flax"
    if (folder / FILES["torch"]).is_file() or (folder / INDEX).is_file():
        return tree, "torch"
    raise ValueError(f"{folder}: expected {' or '.join(FILES.values())} beside config.json, got neither")


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _blank(tree: Mapping[str, Any], dtype: jnp.dtype = jnp.float32) -> tuple[Model, dict[str, Place]]:
    """Return a model without numbers, and where its tensors belong."""
    kind = tree.get("model_type", "so8t_phase2")
    if kind not in MODELS:
        raise ValueError(f"expected the configuration of a model {' or '.join(map(repr, MODELS))}, got {kind!r}")
    config_class, body, whole = MODELS[kind]
    config = config_class.from_dict(tree)
    chosen: Any = body if getattr(config, "is_encoder", False) else whole
    model = nnx.eval_shape(lambda: chosen(config, param_dtype=dtype, rngs=nnx.Rngs(0)))
    numbers = {
        name: Place(tuple(name.split(".")), False, (3,), np.dtype(np.float64), False) for name in _set_layers(model)
    }
    return model, places(model) | numbers


def _set_layers(model: Model) -> dict[str, AdaptiveRankSemiseparableLayer]:
    """Return the layers that keep settings beside their weights, by the name of those."""
    return {
        ".".join(map(str, (*path, SETTINGS))): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, AdaptiveRankSemiseparableLayer)
    }


def _read(folder: Path, layout: Layout, wanted: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """Return the tensors by production's names and in its orientation."""
    found: dict[str, np.ndarray] = {}
    for path in _files(folder, layout):
        try:
            with safe_open(str(path), framework="numpy") as file:
                found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error}); copy it again") from error
    if layout == "flax":
        ours = {_flax_name(place): name for name, place in wanted.items()}
        turned = {name for name, place in wanted.items() if place.transposed}
        named = {ours.get(key, key): value for key, value in found.items()}
        found = {name: value.T if name in turned else value for name, value in named.items()}
    problems = mismatches(wanted, {name: tuple(value.shape) for name, value in found.items()})
    problems += [f"  {name}: {fault}" for name, value in found.items() if (fault := _fault(wanted.get(name), value))]
    if problems:
        raise ValueError(f"{folder}: the weights are not those of its config.json:\n" + "\n".join(problems))
    return found


def _files(folder: Path, layout: Layout) -> list[Path]:
    if layout == "flax" or (folder / FILES["torch"]).is_file():
        return [folder / FILES[layout]]
    names = _json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or any(Path(str(name)).name != name for name in names.values()):
        raise ValueError(f"{folder / INDEX}: expected a weight_map from tensors to files of this folder")
    return [folder / name for name in sorted(set(names.values()))]


def _fault(place: Place | None, value: np.ndarray) -> str | None:
    """Return what is wrong with the numbers of a tensor."""
    if place is None:
        return None
    whole = np.issubdtype(place.dtype, np.integer)
    if whole != np.issubdtype(value.dtype, np.integer):
        return f"expected {'whole' if whole else 'floating-point'} numbers, got {value.dtype}"
    # half dtypes of other packages are floating-point numbers that numpy does not know as such
    bad = 0 if whole else int(np.count_nonzero(~np.isfinite(value.astype(np.float64))))
    return f"expected finite numbers, got {bad} that are NaN or infinite" if bad else None


def _flax_name(place: Place) -> str:
    return ".".join(map(str, place.path))
