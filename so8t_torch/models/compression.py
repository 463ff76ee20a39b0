"""Turns a Hugging Face checkpoint into one whose embedding is a tensor train, and loads the result.

    OUT/  tensor_train.json          what was replaced, how well, and which files belong to it
          tensor_train.safetensors   core1 … coreK, phase_shift, id_permutation
          rest-*.safetensors         every other tensor, unchanged
          config.json, tokenizer, …  copies of the files beside the weights; sub-folders are left out

The rows of a tied head are those of the embedding, so its place is taken by the exact transpose. The weights carry
names of their own: ``from_pretrained`` refuses the folder instead of starting from a random table; ``load_compressed``
reads it. The source is only read; the result appears whole, by a rename, or not at all.
Mathematics and gate: so8t_torch/nn/tensor_train_compression.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from so8t_torch.core.errors import ConfigError, DataError, DomainError
from so8t_torch.core.json_text import read_object, short
from so8t_torch.core.weights import is_plain_name
from so8t_torch.models.checkpoint_folder import (
    Checkpoint,
    free_folder,
    in_one_step,
    model_class,
    open_checkpoint,
    tensors_of,
)
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.tensor_train_compression import (
    Compressed,
    CompressionReport,
    Permutation,
    compress_embedding,
    require_error,
    require_gate,
)
from so8t_torch.nn.tensor_train_head import TensorTrainHead

__all__ = ["CheckpointReport", "compress_checkpoint", "load_compressed", "save_compressed"]

DESCRIPTION = "tensor_train.json"
CORES = "tensor_train.safetensors"
FORMAT = 1
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")


@dataclass(frozen=True)
class CheckpointReport:
    """What was found in a checkpoint, how well its embedding compresses, and where the result is.

    ``output`` is None after a dry run; ``kept`` says whether the error is within the gate.
    """

    source: str
    output: str | None
    tensor: str
    tied: bool
    bytes_before: int
    bytes_after: int
    max_relative_error: float
    kept: bool
    embedding: CompressionReport

    def tables(self) -> list[Table]:
        """Return the report as tables for a terminal."""
        table = Table(title="checkpoint")
        table.add_column("quantity")
        table.add_column("value", justify="right", overflow="fold")
        table.add_row("read from", self.source)
        table.add_row("written to", self.output or "dry run, nothing was written")
        table.add_row("tensor", self.tensor)
        table.add_row("output head", "tied: becomes its transpose" if self.tied else "its own: stays as it is")
        share = self.bytes_after / self.bytes_before
        table.add_row("weights, bytes", f"{self.bytes_before:,} → {self.bytes_after:,} ({share:.1%})")
        return [self.embedding.table(self.max_relative_error), table]


def compress_checkpoint(
    source: str | Path,
    output: str | Path | None = None,
    *,
    rank: int | Sequence[int] = 16,
    num_cores: int = 2,
    sweeps: int = 3,
    max_relative_error: float = 0.1,
    id_permutation: Permutation = "golden",
    dry_run: bool = False,
) -> CheckpointReport:
    """Write a checkpoint whose embedding is a tensor train, or refuse when the train is too far from the table.

    Args:
        source: folder with ``config.json`` and weights in safetensors, whole or in shards; only read.
        output: folder to write; must not exist or be empty, and not lie in ``source``. Not needed for a dry run.
        rank: of every bond, or one for each.
        num_cores: K, 2 or 3.
        sweeps: of masked alternating least squares.
        max_relative_error: the largest ‖E − Ê‖ / ‖E‖ that is written.
        id_permutation: as for ``compress_embedding``.
        dry_run: measure, report and write nothing; an error above the gate is reported, not raised.

    Raises:
        DomainError: the error is above the gate; the text names it and ranks that are enough. Nothing is written.
        ConfigError: the architecture is unknown, its embedding does more than look up rows, or an option is wrong.
        DataError: a weight file is absent, damaged or not safetensors, or lacks the embedding, or the embedding has
            another shape than ``config.json`` says.
    """
    require_gate(max_relative_error)
    folder = Path(source)
    target = None if dry_run else free_folder(output, folder)
    checkpoint = open_checkpoint(folder)
    model = _skeleton(folder)
    name, padding, tied = _embedding_of(model)
    key = _key_of(checkpoint, f"{name}.weight", model.base_model_prefix)
    table = _table_of(checkpoint, key, model)
    copy = _head_copy(checkpoint, model, table) if tied else None
    found = compress_embedding(
        table, rank, num_cores=num_cores, sweeps=sweeps, max_relative_error=None, id_permutation=id_permutation
    )
    kept = found.report.relative_error <= max_relative_error
    if not (kept or dry_run):
        placed = torch.empty_like(table)
        placed[found.permutation] = table
        require_error(found.report, placed, max_relative_error)
    zero_row = padding is not None and not tied and not bool(table[padding].any())
    layer = HolographicTTEmbedding.from_compressed(found, padding_idx=padding if zero_row else None)
    before = sum((folder / file).stat().st_size for file in checkpoint.names())
    dropped = [k for k in (key, copy) if k is not None]
    train = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    report = CheckpointReport(
        source=str(folder),
        output=None if target is None else str(target),
        tensor=key,
        tied=tied,
        bytes_before=before,
        bytes_after=before - len(dropped) * found.report.bytes_before + train,
        max_relative_error=max_relative_error,
        kept=kept,
        embedding=found.report,
    )
    if target is not None:
        _publish(checkpoint, target, dropped, _description(layer, name, key, tied, found), layer)
    return report


def load_compressed(directory: str | Path, **arguments: Any) -> Any:
    """Load the model of a compressed checkpoint, with its embedding and a tied head as tensor trains.

    For a moment the table that the architecture expects exists beside the rest of the model. Save the model with
    ``save_compressed``: what its own ``save_pretrained`` writes has every tensor, but ``from_pretrained`` does not know
    the layer.

    Args:
        directory: written by ``compress_checkpoint`` or ``save_compressed``.
        **arguments: for ``from_pretrained`` (``dtype``, ``attn_implementation``, …).

    Returns:
        The transformers model in evaluation mode.

    Raises:
        DataError: the folder is not a compressed checkpoint, is damaged, or lacks tensors of the model.
    """
    folder = Path(directory)
    record = _read_description(folder)
    state: dict[str, Tensor] = {}
    for file in record["files"]:
        state |= tensors_of(folder / file)
    layer = _stored_layer(folder, record)
    state[record["key"]] = layer.stored_cores()[0].new_zeros(1).expand(layer.vocab_size, layer.d_model)
    model, loading = model_class(folder).from_pretrained(
        None,
        config=AutoConfig.from_pretrained(str(folder), trust_remote_code=False),
        state_dict=state,
        **arguments,
        output_loading_info=True,
    )
    if loading["missing_keys"]:
        lacking = ", ".join(sorted(loading["missing_keys"]))
        raise DataError(
            f"{folder}: expected every tensor of the model, but {lacking} is in no file; complete the source."
        )
    old = model.get_submodule(record["module"]).weight
    layer = layer.to(device=old.device, dtype=old.dtype)
    if record["tied"]:
        head = _name_of(model, model.get_output_embeddings())
        model.set_submodule(head, TensorTrainHead(layer))
        # the two modules are one; told so, transformers neither looks for the old weights nor stores the train twice
        model._tied_weights_keys = {f"{head}.embedding.{n}": f"{record['module']}.{n}" for n in layer.state_dict()}
        model.all_tied_weights_keys = dict(model._tied_weights_keys)
        model.config.tie_word_embeddings = False
    model.set_submodule(record["module"], layer)
    return model.eval()


def save_compressed(model: Any, directory: str | Path) -> None:
    """Write a model of ``load_compressed``, trained further perhaps, so that ``load_compressed`` reads it.

    Args:
        model: with a tensor-train embedding, and a tied head if its head is a ``TensorTrainHead``.
        directory: must not exist or be empty. The tokenizer is not written.

    Raises:
        ConfigError: the model has no tensor-train embedding, or the folder is not free.
    """
    target = free_folder(directory, None)
    layer = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else model
    if not isinstance(model, PreTrainedModel) or not isinstance(layer, HolographicTTEmbedding):
        raise ConfigError(
            f"save_compressed: expected a model with a tensor-train embedding, got {type(layer).__name__}; "
            "give it what load_compressed returned."
        )
    head = model.get_output_embeddings()
    tied = isinstance(head, TensorTrainHead)
    name = _name_of(model, layer)
    skipped = tuple(f"{n}." for n in (name, *([_name_of(model, head)] if tied else [])))
    rest = {k: t.detach().clone() for k, t in model.state_dict().items() if not k.startswith(skipped)}
    record = _description(layer, name, f"{name}.weight", tied, None) | {"files": ["rest-00001-of-00001.safetensors"]}

    def fill(staging: Path) -> None:
        model.config.save_pretrained(staging)
        config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
        config |= {"tie_word_embeddings": tied, "architectures": [type(model).__name__]}
        (staging / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(rest, staging / record["files"][0], {"format": "pt"})
        _write_train(staging, record, layer)

    in_one_step(target, fill)


def _skeleton(folder: Path) -> Any:
    """Return the model without numbers: shapes and names alone."""
    kind = model_class(folder)
    with torch.device("meta"):
        return kind(AutoConfig.from_pretrained(str(folder), trust_remote_code=False))


def _embedding_of(model: Any) -> tuple[str, int | None, bool]:
    """Return name, padding id and whether the head shares the table; refuse what does more than look up rows."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise ConfigError(
            f"{type(model).__name__}: expected a plain nn.Embedding for the ids, got {embedding}; "
            "a train would change what it does, so this model cannot be compressed."
        )
    tied = head is not None and getattr(head, "weight", None) is embedding.weight
    if tied and (type(head) is not nn.Linear or head.bias is not None):
        raise ConfigError(
            f"{type(model).__name__}: expected a tied head without bias, got {head}; untie it first: save the model "
            "with tie_word_embeddings=False and a head of its own."
        )
    return _name_of(model, embedding), embedding.padding_idx, tied


def _name_of(model: Any, wanted: Any) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _key_of(checkpoint: Checkpoint, key: str, prefix: str) -> str:
    """Return the name that a tensor has in the files: with or without the prefix of the inner model."""
    for candidate in (key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}"):
        if candidate in checkpoint.files:
            return candidate
    raise DataError(
        f"{checkpoint.folder}: expected the embedding {key!r} among its {len(checkpoint.files)} tensors; "
        "complete the checkpoint."
    )


def _table_of(checkpoint: Checkpoint, key: str, model: Any) -> Tensor:
    """Return the embedding; refuse one whose shape is not that of the model."""
    table, expected = checkpoint.read(key), tuple(model.get_input_embeddings().weight.shape)
    if table.shape != expected:
        raise DataError(
            f"{checkpoint.folder}: config.json makes {key!r} {expected}, the file holds {tuple(table.shape)}; "
            "correct the configuration."
        )
    return table


def _head_copy(checkpoint: Checkpoint, model: Any, table: Tensor) -> str | None:
    """Return the name of a stored copy of a tied head, which is left out; refuse one that is no copy."""
    key = f"{_name_of(model, model.get_output_embeddings())}.weight"
    if key not in checkpoint.files:
        return None
    if not torch.equal(checkpoint.read(key), table):
        raise DataError(
            f"{checkpoint.folder}: config.json ties {key!r} to the embedding, but the two differ; untie them there."
        )
    return key


def _description(
    layer: HolographicTTEmbedding, name: str, key: str, tied: bool, found: Compressed | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "module": name,
        "key": key,
        "tied": tied,
        "vocab_size": layer.vocab_size,
        "d_model": layer.d_model,
        "ranks": layer.ranks,
        "vocab_factors": layer.vocab_factors,
        "feature_factors": layer.feature_factors,
        "phase_encoding": layer.phase_encoding,
        "padding_idx": layer.padding_idx,
        "report": None if found is None else found.report.to_dict(),
    }


def _publish(
    checkpoint: Checkpoint, target: Path, dropped: list[str], record: dict[str, Any], layer: HolographicTTEmbedding
) -> None:
    names = checkpoint.names()
    record["files"] = [f"rest-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    affected = {checkpoint.files[key] for key in dropped}

    def fill(staging: Path) -> None:
        for file, rest in zip(names, record["files"], strict=True):
            if file in affected:
                kept = {k: t for k, t in tensors_of(checkpoint.folder / file).items() if k not in dropped}
                save_file(kept, staging / rest, {"format": "pt"})
            else:
                shutil.copyfile(checkpoint.folder / file, staging / rest)
        for path in checkpoint.folder.iterdir():
            if path.is_file() and not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, staging / path.name)
        _write_train(staging, record, layer)

    in_one_step(target, fill)


def _write_train(staging: Path, record: dict[str, Any], layer: HolographicTTEmbedding) -> None:
    save_file({k: t.detach().cpu().contiguous() for k, t in layer.state_dict().items()}, staging / CORES)
    (staging / DESCRIPTION).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.exists():
        raise DataError(f"{path}: no such file; expected a folder written by so8t compress-embedding.")
    record = read_object(path, DataError)
    needed = {"files", "module", "key", "tied"}
    if record.get("format") != FORMAT or not needed <= set(record):
        raise DataError(f"{path}: expected a description of format {FORMAT}, got {short(record)}.")
    if not isinstance(record["files"], list) or not all(map(is_plain_name, record["files"])):
        raise DataError(f"{path}: expected names of files beside it, got {short(record['files'])}.")
    for name in ("module", "key"):
        if not isinstance(record[name], str):
            raise DataError(f"{path}: expected {name} to be a name, got {short(record[name])}.")
    return record


def _stored_layer(folder: Path, record: dict[str, Any]) -> HolographicTTEmbedding:
    state = tensors_of(folder / CORES)
    try:
        _check_sizes(record, state)
        layer = HolographicTTEmbedding(
            record["vocab_size"],
            record["d_model"],
            tuple(record["ranks"]),
            len(record["vocab_factors"]),
            record["phase_encoding"],
            vocab_factors=record["vocab_factors"],
            feature_factors=record["feature_factors"],
            padding_idx=record["padding_idx"],
            id_permutation=state["id_permutation"],
            dtype=state["core1"].dtype,
        )
        layer.load_state_dict(state)
    except (KeyError, TypeError, ConfigError, DomainError, RuntimeError) as error:
        raise DataError(f"{folder}: {DESCRIPTION} and {CORES} do not belong together: {error}") from error
    return layer


def _check_sizes(record: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuse a description of other cores than the stored ones, before memory is asked for as it says."""
    ranks = (1, *record["ranks"], 1)
    described = list(zip(record["vocab_factors"], ranks, ranks[1:], record["feature_factors"], strict=False))
    stored = [tuple(state[f"core{k + 1}"].shape) for k in range(len(described))]
    if described != stored:
        raise DomainError(f"expected cores of shapes {short(described)}, got {short(stored)}.")
