"""What is kept of the logits of one micro-batch, and its two forms on disk.

Position n of a record is one supervised token: ``labels[n]`` stands at (``rows[n]``, ``positions[n]``) of the batch,
and z_n are the logits it was judged by. Two modes:

    full   logits (N, V)
    topk   values, ids (N, k), the k largest in falling order: p_i = exp(values_i − logsumexp) is still exact

Both carry ``logsumexp[n]`` = log Σ_v exp(z_nv) and ``label_logits[n]`` = z_n,label in float32. A record is a
safetensors file with these tensors and its other facts as text, or a ``.pt`` file of one dictionary of tensors and
plain values.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from so8t_torch.core.errors import DataError

Form = Literal["safetensors", "pt"]
Mode = Literal["topk", "full"]

PLACED = ("labels", "rows", "positions", "logsumexp", "label_logits")
"""Tensors of one number per position, in every record."""

LARGE = {"full": ("logits",), "topk": ("values", "ids")}
"""Tensors of one row per position, by mode."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_KINDS = {torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of dtypes in a safetensors file, in the order in which the library writes them."""

_FACTS: dict[str, Callable[[Any], Any]] = {
    "mode": str,
    "step": int,
    "epoch": int,
    "timestamp": str,
    "batch_shape": list,
    "logits_shape": list,
    "logits_dtype": str,
    "labels_shape": list,
    "labels_dtype": str,
}


@dataclass(frozen=True)
class LogitsRecord:
    """The logits of one micro-batch at its supervised positions.

    ``step`` is the optimiser step that used them, counted from 1, ``epoch`` from 0, ``timestamp`` the local time as
    ``YYYYmmdd_HHMMSS``; ``batch_shape`` is (B, T), ``logits_shape`` (N, V), ``logits_dtype`` what the model computed.
    """

    tensors: dict[str, Tensor]
    mode: Mode
    step: int
    epoch: int
    timestamp: str
    batch_shape: list[int]
    logits_shape: list[int]
    logits_dtype: str

    @property
    def vocabulary(self) -> int:
        """Return V."""
        return self.logits_shape[1]

    def file_size(self) -> int:
        """Return the bytes of the tensors, beside which the rest of a file is small."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def _of(self, kind: torch.dtype) -> list[str]:
        return sorted(name for name, tensor in self.tensors.items() if tensor.dtype == kind)

    def facts(self) -> dict[str, Any]:
        """Return everything that is not a tensor, as plain values."""
        labels = self.tensors["labels"]
        found = {name: getattr(self, name) for name in _FACTS if not name.startswith("labels_")}
        return found | {"labels_shape": list(labels.shape), "labels_dtype": str(labels.dtype)}

    def encode(self, form: Form) -> list[memoryview]:
        """Return the bytes of a file in pieces; ``pt`` loads with ``torch.load(path, weights_only=True)``.

        Numerics: the pieces of ``safetensors`` are the tensors' own memory; the library would copy all of it.
        """
        if form == "safetensors":
            held = {name: self.tensors[name] for kind in _KINDS for name in self._of(kind)}
            header = _header(held, {name: str(value) for name, value in self.facts().items()})
            return [memoryview(header), *map(_memory, held.values())]
        buffer = io.BytesIO()
        torch.save({**self.tensors, **self.facts()}, buffer)
        return [buffer.getbuffer()]


def _header(tensors: dict[str, Tensor], texts: dict[str, str]) -> bytes:
    """Return what a safetensors file has before its numbers: the length of a JSON object, and the object."""
    entries: dict[str, Any] = {"__metadata__": texts}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    # the numbers begin at a multiple of eight bytes
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).reshape(-1).numpy())


def from_texts(tensors: dict[str, Tensor], texts: dict[str, str] | None, source: str) -> LogitsRecord:
    """Return the record of a safetensors file.

    Args:
        tensors: what the file holds.
        texts: its metadata.
        source: the file, for errors.

    Raises:
        DataError: a fact is missing or is not what it should be.
    """
    facts: dict[str, Any] = {}
    for name, kind in _FACTS.items():
        text = (texts or {}).get(name)
        if text is None:
            raise DataError(f"{source}: no {name!r} in the metadata; this is not a file of saved logits.")
        facts[name] = text if kind is str else _plain(text, f"{source}: {name}")
    return from_parts(tensors, facts, source)


def _plain(text: str, where: str) -> Any:
    try:
        return json.loads(text[:200])
    except ValueError as error:
        raise DataError(f"{where} must be a number or a list of numbers, got {text!r:.80}.") from error


def from_parts(tensors: dict[str, Tensor], facts: dict[str, Any], source: str) -> LogitsRecord:
    """Return the record of these tensors and facts after checking that they fit together.

    Raises:
        DataError: naming what does not fit.
    """
    for name, kind in _FACTS.items():
        value = facts.get(name)
        whole = isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 40 for size in value)
        if type(value) is not kind or (kind is list and not whole):
            raise DataError(f"{source}: {name} must be {kind.__name__}, got {value!r:.80}.")
    if facts["mode"] not in LARGE:
        raise DataError(f"{source}: mode must be one of {', '.join(LARGE)}, got {facts['mode']!r:.80}.")
    if len(facts["logits_shape"]) != 2 or len(facts["batch_shape"]) != 2:
        raise DataError(f"{source}: logits_shape and batch_shape must have two sizes.")
    _check_tensors(tensors, facts, source)
    kept = {name: tensors[name] for name in (*PLACED, *LARGE[facts["mode"]])}
    return LogitsRecord(
        kept,
        cast(Mode, facts["mode"]),
        facts["step"],
        facts["epoch"],
        facts["timestamp"],
        facts["batch_shape"],
        facts["logits_shape"],
        facts["logits_dtype"],
    )


def _check_tensors(tensors: dict[str, Tensor], facts: dict[str, Any], source: str) -> None:
    count, vocabulary = facts["logits_shape"]
    missing = [name for name in (*PLACED, *LARGE[facts["mode"]]) if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise DataError(f"{source}: the tensors {', '.join(missing)} are missing.")
    kept = vocabulary
    if facts["mode"] == "topk":
        kept = min(vocabulary, tensors["ids"].shape[-1] if tensors["ids"].ndim else 0)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(PLACED, (count,))
    shapes |= dict.fromkeys(LARGE[facts["mode"]], (count, kept))
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise DataError(f"{source}: {name} must have shape {list(shape)}, got {list(tensors[name].shape)}.")
        whole = name in ("labels", "rows", "positions", "ids")
        if tensors[name].dtype not in ((torch.int64, torch.int32) if whole else FLOATS):
            raise DataError(f"{source}: {name} has the wrong dtype {tensors[name].dtype}.")
    for name in {"labels", "ids"} & tensors.keys():
        low, high = tensors[name].aminmax() if tensors[name].numel() else (0, 0)
        if low < 0 or high >= vocabulary:
            raise DataError(f"{source}: {name} holds tokens outside the vocabulary of {vocabulary}.")
