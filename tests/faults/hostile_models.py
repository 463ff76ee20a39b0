"""Named hostile adapters, safetensors files and model folders."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.hostile import MIB, Case

Make = Callable[[Path], Path]
ADAPTER = {"peft_type": "SO8T", "task_type": "CAUSAL_LM", "target_modules": ["o_proj"], "r": 0}
MODEL = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 8,
    "vocab_size": 8,
    "pad_token_id": 0,
}
SHARD = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def entry(begin: int = 0, end: int = 4, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [begin, end]}


def stored(header: object, numbers: bytes = b"\0" * 4, length: int | None = None) -> bytes:
    """Return the bytes of a safetensors file with the header given, as an object or as it stands."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def tensors(count: int) -> bytes:
    return stored({f"t{i}": entry(4 * i, 4 * i + 4) for i in range(count)}, b"\0" * 4 * count)


class Payload:
    """What a pickle runs when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


MANY = tensors(100_000)
SOUND = stored({"a": entry()})


def _bytes(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _pickled(name: str) -> Make:
    return lambda folder: _bytes(name, pickle.dumps(Payload(folder / "executed")))(folder)


def _in_place(name: str, what: str) -> Make:
    def make(folder: Path) -> Path:
        path = folder / name
        path.unlink(missing_ok=True)
        if what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        else:
            path.symlink_to(path if what == "circle" else what)
        return path

    return make


def _adapter(*changes: Make, **values: Any) -> Make:
    def make(folder: Path) -> Path:
        (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **values}))
        (folder / "adapter_model.safetensors").write_bytes(SOUND)
        for change in changes:
            change(folder)
        return folder

    return make


def _config(text: bytes) -> Make:
    return _adapter(_bytes("adapter_config.json", text))


def _stored(content: bytes) -> Make:
    return _bytes("model.safetensors", content)


def _folder(*changes: Make, files: dict[str, Any] | None = None, **values: Any) -> Make:
    def make(folder: Path) -> Path:
        (folder / "config.json").write_text(json.dumps({**MODEL, **values}))
        (folder / ("model.safetensors" if files is None else SHARD)).write_bytes(SOUND)
        if files is not None:
            (folder / INDEX).write_text(json.dumps({"weight_map": files}))
        for change in changes:
            change(folder)
        return folder

    return make


def _without(name: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).unlink()
        return folder

    return make


def _announced(size: int) -> Make:
    def make(folder: Path) -> Path:
        with (folder / "model.safetensors").open("wb") as handle:
            handle.write(struct.pack("<Q", size) + b"{")
            handle.truncate(size + 8)
        return folder / "model.safetensors"

    return make


CODE = b"import os\nos.mkdir(os.path.join(os.path.dirname(__file__), 'executed'))\n"
REMOTE = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
LONG = "x" * 600

WEIGHTS = [
    Case("weights that are sound", "weights", _stored(SOUND), None),
    Case("weights of 100,000 tensors", "weights", _stored(MANY), r"expected a header of at most 4,194,304 bytes"),
    Case("weights of 21,000 tensors", "weights", _stored(tensors(21_000)), r"at most 20,000 tensors, got 21,000"),
    Case("header of 2^63 bytes", "weights", _stored(stored({}, length=2**63)), r"a header of 9,2"),
    Case(
        "header behind the end", "weights", _stored(stored({}, b"", 99)), r"not a complete safetensors file \(a header"
    ),
    Case("header of 90 MB", "weights", _announced(90 * MIB), r"expected a header of at most 4,194,304 bytes"),
    Case(
        "header of lists", "weights", _stored(stored(b'{"a":[' + b"[]," * MIB + b"[]]}")), r"more than 20,000 tensors"
    ),
    Case("header of 100,000 levels", "weights", _stored(stored(b'{"a":' + b"[" * 100_000)), r"nested deeper than 32"),
    Case("header no JSON", "weights", _stored(stored(b"{'a': 1}")), r"its header: not a complete JSON object"),
    Case("header no UTF-8", "weights", _stored(stored(b'{"\xff": 1}')), r"not a complete safetensors file \(header"),
    Case("header a list", "weights", _stored(stored([])), r"its header: expected a JSON object, got a list"),
    Case(
        "tensor twice", "weights", _stored(stored(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2))), "twice"
    ),
    Case("tensor named ..", "weights", _stored(stored({"../../a": entry()})), r"expected names of tensors.*'../../a'"),
    Case("tensor with control characters", "weights", _stored(stored({"a\n\x1b[2J": entry()})), r"expected names of"),
    Case(
        "tensor of 600 letters", "weights", _stored(stored({LONG: entry()})), r"at most 512 characters, got 'x+\.\.\."
    ),
    Case("tensor without a name", "weights", _stored(stored({"": entry()})), r"expected names of tensors"),
    Case(
        "tensors that overlap", "weights", _stored(stored({"a": entry(), "b": entry()})), r"not a complete safetensors"
    ),
    Case("tensor behind the end", "weights", _stored(stored({"a": entry(0, 400)})), r"not a complete safetensors"),
    Case(
        "tensor of negative size", "weights", _stored(stored({"a": entry(shape=[-1])})), r"not a complete safetensors"
    ),
    Case(
        "tensor of 2^124 numbers", "weights", _stored(stored({"a": entry(shape=[2**62] * 2)})), r"not a complete safet"
    ),
    Case(
        "tensor of an unknown dtype", "weights", _stored(stored({"a": entry(dtype="X9")})), r"not a complete safetens"
    ),
    Case(
        "number behind the tensors",
        "weights",
        _stored(stored({"a": entry()}, b"\0" * 9)),
        r"not a complete safetensors",
    ),
    Case("weights that are a pickle", "weights", _pickled("model.safetensors"), r"not a complete safetensors file"),
    Case("weights that are empty", "weights", _stored(b""), r"not a complete safetensors file"),
    Case("weights that are a pipe", "weights", _in_place("model.safetensors", "pipe"), r"got a named pipe"),
    Case("weights that are a folder", "weights", _in_place("model.safetensors", "folder"), r"got a folder"),
    Case("weights without end", "weights", _in_place("model.safetensors", "/dev/zero"), r"got a device"),
]
ADAPTERS = [
    Case("adapter that is sound", "adapter", _adapter(), None),
    Case(
        "adapter of 2 MB", "adapter", _config(b" " * 2 * MIB), r"adapter_config\.json: expected at most 262,144 bytes"
    ),
    Case(
        "adapter with NaN", "adapter", _adapter(r=2, lora_alpha=float("nan")), r"NaN is not a JSON number \(in 'lora_al"
    ),
    Case("adapter key twice", "adapter", _config(b'{"r": 1, "r": 2}'), r"adapter_config\.json: key 'r' is given twice"),
    Case("adapter of 5,000 levels", "adapter", _config(b'{"r": ' + b"[" * 5000), r"nested deeper than 32"),
    Case(
        "adapter of 80,000 lists",
        "adapter",
        _config(b'{"r": [' + b"[]," * 80_000 + b"[]]}"),
        r"expected r to be a wh",
    ),
    Case("adapter no UTF-8", "adapter", _config(b'{"r": "\xff"}'), r"adapter_config\.json: not valid UTF-8 at byte 7"),
    Case("adapter that is a list", "adapter", _config(b"[]"), r"adapter_config\.json: expected a JSON object"),
    Case("adapter of another method", "adapter", _adapter(peft_type="LORA"), r"expected an adapter of the method SO8T"),
    Case("adapter of no method", "adapter", _adapter(peft_type={"a": 1}), r"adapter"),
    Case(
        "adapter with an unknown key",
        "adapter",
        _adapter(run="rm -rf"),
        r"expected the fields of SO8TConfig, got 'run'",
    ),
    Case("adapter with a broken pattern", "adapter", _adapter(target_modules="("), r"not a regular expression"),
    Case("adapter with a pattern for ever", "adapter", _adapter(target_modules="(a+)+$"), r"which may take forever"),
    Case("adapter with a huge rank", "adapter", _adapter(r=10**400), r""),
    Case("adapter with wrong kinds", "adapter", _adapter(target_modules=7), r"expected target_modules to be a list"),
    Case("adapter pipe", "adapter", _adapter(_in_place("adapter_config.json", "pipe")), r"json: .*got a named pipe"),
    Case(
        "adapter folder in a folder", "adapter", _adapter(_in_place("adapter_config.json", "folder")), r"got a folder"
    ),
    Case("adapter circle", "adapter", _adapter(_in_place("adapter_config.json", "circle")), r"lead in a circle"),
    Case(
        "adapter without weights", "adapter", _adapter(_without("adapter_model.safetensors")), r"model\.safetensors: no"
    ),
    Case(
        "adapter with a pickle alone",
        "adapter",
        _adapter(_without("adapter_model.safetensors"), _pickled("adapter_model.bin")),
        r"adapter_model\.safetensors: no such file",
    ),
    Case(
        "adapter weights in a circle", "adapter", _adapter(_in_place("adapter_model.safetensors", "circle")), r"circle"
    ),
    Case("adapter weights pipe", "adapter", _adapter(_in_place("adapter_model.safetensors", "pipe")), r"named pipe"),
    Case(
        "adapter of 100,000 tensors",
        "adapter",
        _adapter(_bytes("adapter_model.safetensors", MANY)),
        r"a header of at most",
    ),
    Case("adapter that is a file", "adapter", _stored(SOUND), r"neither a folder nor a hub id"),
    Case("adapter of 5,000 letters", "adapter", lambda folder: folder / ("a" * 5000), r"neither a folder nor a hub id"),
    Case("adapter path with NUL", "adapter", lambda folder: f"{folder}/a\0b", r"neither a folder nor a hub id"),
    Case("adapter path of Windows", "adapter", lambda _: r"D:\adapter", r"neither a folder nor a hub id"),
]
FOLDERS = [
    Case("model that is sound", "folder", _folder(), None),
    Case("model in shards", "folder", _folder(files={"a": SHARD}), None),
    Case(
        "shard in a parent folder", "folder", _folder(files={"a": "../../etc/passwd"}), r"names '../../etc/passwd', wh"
    ),
    Case(
        "shard at an absolute path", "folder", _folder(files={"a": "/etc/passwd"}), r"names '/etc/passwd', which is no"
    ),
    Case("shard of Windows", "folder", _folder(files={"a": "..\\model"}), r"the index names '..\\\\model'"),
    Case(
        "shard that is the folder", "folder", _folder(files={"a": ".."}), r"the index names '..', which is not a file"
    ),
    Case(
        "shard that is absent", "folder", _folder(files={"a": "b.safetensors"}), r"names 'b\.safetensors', which is not"
    ),
    Case("shard that differs in case", "folder", _folder(files={"a": SHARD.upper()}), r"names 'MODEL-.*which is not"),
    Case("shard that is a number", "folder", _folder(files={"a": 7}), r"the index names '7', which is not a file"),
    Case(
        "shard that lacks its tensor", "folder", _folder(files={"b": SHARD}), r"expected the tensor 'b', which the in"
    ),
    Case(
        "index of lists",
        "folder",
        _folder(_bytes(INDEX, b'{"weight_map": ["a"]}'), files={}),
        r"index with a weight_map",
    ),
    Case("index of a tensor named ..", "folder", _folder(files={"../a": SHARD}), r"expected names of tensors.*'../a'"),
    Case("index of nothing", "folder", _folder(files={}), r"expected a JSON index with a weight_map"),
    Case(
        "index of 5,000 levels", "folder", _folder(_bytes(INDEX, b'{"a":' * 5000), files={}), r"nested deeper than 32"
    ),
    Case("index pipe", "folder", _folder(_in_place(INDEX, "pipe"), files={}), r"index\.json: .*named pipe"),
    Case(
        "model with a pickle alone",
        "folder",
        _folder(_without("model.safetensors"), _pickled("pytorch_model.bin")),
        "other formats",
    ),
    Case("model without configuration", "folder", _folder(_without("config.json")), r"config\.json: no such file"),
    Case("model with a list", "folder", _folder(_bytes("config.json", b"[]")), r"config\.json: expected a JSON object"),
    Case("model with a pipe", "folder", _folder(_in_place("config.json", "pipe")), r"config\.json: .*named pipe"),
    Case("tokenizer pipe", "folder", _folder(_in_place("tokenizer.json", "pipe")), r"tokenizer\.json: .*named pipe"),
    Case("tokenizer circle", "folder", _folder(_in_place("tokenizer.json", "circle")), r"tokenizer\.json: .*circle"),
    Case("template folder", "folder", _folder(_in_place("chat_template.jinja", "folder")), r"jinja: .*got a folder"),
    Case(
        "model with its own code", "folder", _folder(_bytes("own.py", CODE), **REMOTE), r"no model configuration can be"
    ),
    Case("model of an unknown class", "folder", _folder(architectures=["os.system"]), r"expected an architecture that"),
    Case("model of classes of another kind", "folder", _folder(architectures=[{"a": 1}]), r""),
    Case(
        "model with sizes of another kind",
        "folder",
        _folder(hidden_size="eight"),
        r"no model configuration can be read",
    ),
    Case(
        "model that is quantised",
        "folder",
        _folder(quantization_config={"quant_method": "gptq"}),
        r"quantised checkpoint",
    ),
    Case("model that is a file", "folder", _stored(SOUND), r"the folder cannot be read"),
    Case("model of 5,000 letters", "folder", lambda folder: folder / ("a" * 5000), r"the folder cannot be read"),
]
CASES = [*WEIGHTS, *ADAPTERS, *FOLDERS]
