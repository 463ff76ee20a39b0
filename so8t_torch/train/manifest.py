"""``MANIFEST.json``, written last into a checkpoint: what belongs to it, what it holds, and how healthy it was.

    {version, step, config_hash, versions, processes, sharded, position, skipped, rollbacks,
     files: {name: {bytes, sha256}}, health: {...}, sha256}

The last entry is the SHA-256 of the rest, and the file has exactly one spelling: a change of any bit of it is seen. A
folder without a valid manifest is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from so8t_torch.core.errors import CheckpointError

NAME = "MANIFEST.json"
MAX_BYTES = 16 << 20
"""A manifest lists a handful of files; a larger one is damage or an attack."""

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Health(_Entry):
    """How the run was when the checkpoint was written.

    ``loss`` (nats per supervised token, with the penalty) and ``grad_norm`` are those of the last step,
    ``held_out`` the held-out loss measured at this very step, ``orthogonality_error`` the largest entry of RᵀR − I over
    the gates; ``None`` where there is none. ``open_incident``: the run was recovering from a fault.
    """

    finite_parameters: bool
    finite_moments: bool
    loss: float | None = None
    grad_norm: float | None = None
    held_out: float | None = None
    orthogonality_error: float | None = None
    open_incident: bool = False

    @property
    def finite(self) -> bool:
        """Whether parameters and moments are all finite numbers."""
        return self.finite_parameters and self.finite_moments

    @property
    def calm(self) -> bool:
        """Whether it is finite and no recovery was under way."""
        return self.finite and not self.open_incident


class FileEntry(_Entry):
    """One file of the checkpoint."""

    bytes: Count
    sha256: Digest


class Manifest(_Entry):
    """The content of a checkpoint.

    ``position`` is the place in the stream of samples behind the last one read, ``skipped`` the spans left out by then,
    ``rollbacks`` how often the run had gone back.
    """

    version: Literal[1] = 1
    step: Count
    config_hash: str
    versions: dict[str, str | None]
    processes: Annotated[int, Field(ge=1)] = 1
    sharded: bool = False
    position: Count = 0
    skipped: list[tuple[Count, Count]] = Field(default_factory=list)
    rollbacks: Count = 0
    files: dict[str, FileEntry] = Field(default_factory=dict)
    health: Health

    def spelled(self) -> bytes:
        """Return the file's bytes."""
        tree = self.model_dump(mode="json")
        return _spelled(tree | {"sha256": hashlib.sha256(_spelled(tree)).hexdigest()})


def _spelled(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode("ascii")


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint; the files are not looked at.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    path = folder / NAME
    try:
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"no {NAME}, so it was not written to its end")
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{NAME} has {path.stat().st_size:,} bytes, more than the {MAX_BYTES:,} allowed")
        written = path.read_bytes()
        tree = json.loads(written)
        if not isinstance(tree, dict):
            raise CheckpointError(f"{NAME} holds a {type(tree).__name__} instead of an object")
        tree.pop("sha256", None)
        # validated as JSON, where a pair is a list
        manifest = Manifest.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise CheckpointError(f"{NAME} is damaged or of another version ({error.errors()[0]['msg']})") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{NAME} cannot be read ({error})") from error
    if manifest.spelled() != written:
        raise CheckpointError(f"{NAME} is damaged: it is not what was written")
    return manifest


def listed(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file below a checkpoint folder but the manifest, with its name inside, in order.

    Raises:
        CheckpointError: something there is neither a file nor a folder.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{name} is not a plain file")
        if path.is_file() and name != NAME:
            yield name, path


def entry_of(path: Path) -> FileEntry:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as handle:
        return FileEntry(bytes=path.stat().st_size, sha256=hashlib.file_digest(handle, "sha256").hexdigest())


def sync(path: Path) -> None:
    """Have the system write a file or a folder to the disk before anything else happens.

    Numerics: systems that cannot open a folder (Windows) order the rename themselves.
    """
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole and durably: to a temporary name, to the disk, renamed, and the folder to the disk."""
    waiting = path.with_name(f"{path.name}.part")
    waiting.write_bytes(content)
    sync(waiting)
    waiting.replace(path)
    sync(path.parent)
