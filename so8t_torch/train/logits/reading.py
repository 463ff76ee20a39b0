"""Reads saved logits back: one file, or every file of a folder or run, in order of step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from so8t_torch.core.errors import DataError
from so8t_torch.core.json_text import short
from so8t_torch.train.checkpoint_state import read_foreign
from so8t_torch.train.logits.record import LARGE, PLACED, LogitsRecord, from_parts, from_texts
from so8t_torch.train.logits.store import NAME

_NAMES = {*PLACED, *(name for names in LARGE.values() for name in names)}


def find_records(path: str | Path) -> list[Path]:
    """Return the files of saved logits at ``path``, oldest step first.

    Args:
        path: one file, a folder of them, or a run folder with ``logits/``.

    Raises:
        DataError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    folder = path / "logits" if (path / "logits").is_dir() else path
    if not folder.is_dir():
        raise DataError(f"{path}: no such file or folder; give a file of saved logits, their folder, or a run folder.")
    matches = [match for entry in folder.iterdir() if entry.is_file() and (match := NAME.fullmatch(entry.name))]
    if not matches:
        raise DataError(f"{folder} holds no saved logits; a run saves them with logits.save_logits=true.")
    matches.sort(key=lambda match: (int(match[1]), match[3], int(match[4] or 1)))
    return [folder / match[0] for match in matches]


def read_record(path: str | Path) -> LogitsRecord:
    """Read one file.

    Args:
        path: ``.safetensors`` or ``.pt``.

    Raises:
        DataError: it is absent, damaged, or holds something else.
        CheckpointError: a ``.pt`` file that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    if path.suffix == ".pt":
        held = read_foreign(path)
        if "mode" not in held:
            raise _foreign(path, held)
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        return from_parts(tensors, held, str(path))
    if path.suffix != ".safetensors":
        raise DataError(f"{path}: expected a file of saved logits, logits_step_*.safetensors or .pt.")
    try:
        with safe_open(path, "pt") as file:
            texts, names = file.metadata() or {}, list(file.keys())
            tensors = {name: file.get_tensor(name) for name in _NAMES.intersection(names)}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: not a complete safetensors file ({error}).") from error
    if "mode" not in texts:
        raise _foreign(path, names)
    return from_texts(tensors, texts, str(path))


def _foreign(path: Path, names: Iterable[object]) -> DataError:
    found = sorted(map(str, names))
    more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
    holds = f"the entries {', '.join(map(short, found[:3]))}{more}" if found else "nothing"
    return DataError(
        f"{path}: expected logits that a run saved (logits_step_*, with mode, step and labels), but it holds "
        f"{holds}. Name such a file, their folder, or a run folder."
    )
