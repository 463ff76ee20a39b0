"""Checkpoints that are whole or absent: how one is published, verified, chosen, and when one may go.

    write into checkpoint-N.tmp-XXXX · fsync each file · MANIFEST.json · fsync · rename to checkpoint-N · fsync parent

A process killed at any point leaves the checkpoints before untouched and at most a ``.tmp-`` folder, which the next
start removes. ``newest`` takes the youngest that verifies and says why it passed over others; ``rotate`` counts only
those that verify, so that damaged ones never push out the last good one.
"""

from __future__ import annotations

import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from so8t_torch.core.errors import CheckpointError
from so8t_torch.train.data_order import before, merged
from so8t_torch.train.manifest import NAME, FileEntry, Manifest, entry_of, listed, read_manifest, sync, write_bytes
from so8t_torch.train.rollback import FILE as RECOVERY
from so8t_torch.train.rollback import Recovery

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d{0,17})")
_TEMPORARY = ".tmp-"

LEFT_OUT = "it learned from samples that a roll-back has since left out"


@dataclass(frozen=True)
class Expected:
    """What a checkpoint must agree with to belong to this run as it is now.

    Args:
        config_hash: of the run's settings; ``None`` takes any.
        recovery: what roll-backs left; ``None`` takes any.
    """

    config_hash: str | None = None
    recovery: Recovery | None = None

    def objection(self, manifest: Manifest) -> str | None:
        """Return why a checkpoint is not of this run, or ``None``."""
        if self.config_hash is not None and manifest.config_hash != self.config_hash:
            return "it was written under other settings"
        if self.recovery is None:
            return None
        ours, its = (before(spans, manifest.position) for spans in (self.recovery.skipped, manifest.skipped))
        if ours == its:
            return None
        if merged([*ours, *its]) == ours:
            return LEFT_OUT
        return f"it left out samples that the run's {RECOVERY} does not name"


def step_of(folder: Path) -> int | None:
    """Return N of a folder named ``checkpoint-N``, or ``None``."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def present(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return everything that bears a checkpoint's name, youngest first, whatever it holds."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted(((step, path) for path in found if (step := step_of(path)) is not None), reverse=True)


def verify(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint that is exactly what was written.

    Args:
        folder: ``checkpoint-N``.

    Raises:
        CheckpointError: naming the first thing that is missing, too much, changed, or not finite.
    """
    try:
        return _verified(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}.") from None
    except OSError as error:
        raise CheckpointError(f"{folder}: it cannot be read ({error}).") from error


def _verified(folder: Path) -> Manifest:
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError("not a checkpoint folder")
    manifest = read_manifest(folder)
    if step_of(folder) not in (None, manifest.step):
        raise CheckpointError(f"the folder is named otherwise than the step {manifest.step} inside")
    there = dict(listed(folder))
    for name in sorted(manifest.files.keys() ^ there.keys()):
        raise CheckpointError(f"{name} is missing" if name in manifest.files else f"{name} is not in {NAME}")
    for name, entry in manifest.files.items():
        if (size := there[name].stat().st_size) != entry.bytes:
            raise CheckpointError(f"{name} has {size:,} bytes instead of {entry.bytes:,}")
    for name, entry in manifest.files.items():
        if entry_of(there[name]) != entry:
            raise CheckpointError(f"{name} is damaged: its SHA-256 is not the one written down")
    if not manifest.health.finite:
        raise CheckpointError("its parameters or optimiser moments are not finite")
    return manifest


def newest(
    checkpoints: Path, expected: Expected | None = None, *, at_most: int | None = None, calm: bool = False
) -> tuple[Path | None, list[tuple[str, str]]]:
    """Return the youngest checkpoint that verifies and belongs to the run, and what was passed over.

    Args:
        checkpoints: folder of the run's checkpoints.
        expected: what it must agree with; ``None`` asks nothing.
        at_most: largest step.
        calm: leave out those written while the run was recovering from a fault.

    Returns:
        the folder, or ``None``, and for each younger one its name and the reason, youngest first.
    """
    expected = expected or Expected()
    skipped: list[tuple[str, str]] = []
    for step, folder in present(checkpoints):
        if at_most is not None and step > at_most:
            continue
        reason = _objection(folder, expected, calm)
        if reason is None:
            return folder, skipped
        skipped.append((folder.name, reason))
    return None, skipped


def _objection(folder: Path, expected: Expected, calm: bool) -> str | None:
    try:
        manifest = verify(folder)
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder}: ").removesuffix(".")
    if calm and not manifest.health.calm:
        return "the run was recovering from a fault"
    return expected.objection(manifest)


def rotate(
    checkpoints: Path, keep: int, expected: Expected | None = None, *, best: bool = True, horizon: int = 0
) -> list[str]:
    """Remove checkpoints that are no longer needed and return their names, youngest first.

    What stays: the ``keep`` youngest that verify, the youngest calm one, the youngest calm one at least ``horizon``
    steps behind the youngest, the one that will take its place, and the best. Nothing is removed while none verifies.
    One that does not verify stays as long as it is not older than every one of the ``keep``; one that a roll-back left
    behind goes.

    Args:
        checkpoints: folder of the run's checkpoints.
        keep: at least 1.
        expected: what tells the run's own from those left behind.
        best: whether to keep the one with the lowest held-out loss too.
        horizon: in optimiser steps.
    """
    expected = expected or Expected()
    good: list[tuple[int, Path, Manifest]] = []
    going: list[tuple[int, Path]] = []
    for step, folder in present(checkpoints):
        try:
            manifest = verify(folder)
        except CheckpointError:
            if len(good) >= keep:
                going.append((step, folder))
            continue
        if expected.objection(manifest) is None:
            good.append((step, folder, manifest))
        else:
            going.append((step, folder))
    if not good:
        return []
    staying = _staying(good, keep, best, horizon)
    going += [(step, folder) for step, folder, _ in good if step not in staying]
    for _, folder in sorted(going, reverse=True):
        remove(folder)
    return [folder.name for _, folder in sorted(going, reverse=True)]


def _staying(good: list[tuple[int, Path, Manifest]], keep: int, best: bool, horizon: int) -> set[int]:
    """Return the steps of the checkpoints to keep; ``good`` is sorted, youngest first."""
    staying = {step for step, _, _ in good[: max(1, keep)]}
    calm = [step for step, _, manifest in good if manifest.health.calm]
    behind = [step for step in calm if step <= good[0][0] - horizon]
    # the oldest before the horizon grows into the next one behind it; without it there would never be any
    staying |= {*calm[:1], *behind[:1], *calm[: len(calm) - len(behind)][-1:]}
    measured = [(m.health.held_out, step) for step, _, m in good if m.health.held_out is not None and m.health.calm]
    return staying | ({min(measured)[1]} if best and measured else set())


def remove(folder: Path) -> None:
    """Remove a checkpoint; its name goes first, so that a half-removed one is never taken for one."""
    shutil.rmtree(_leaving(folder))


def _leaving(folder: Path) -> Path:
    """Take a checkpoint's name away and return the folder's new one."""
    return folder.rename(folder.with_name(f"{folder.name}{_TEMPORARY}{secrets.token_hex(4)}"))


def sweep(checkpoints: Path) -> list[str]:
    """Remove what a process that died while writing or removing left, and return the names."""
    left = sorted(checkpoints.glob(f"checkpoint-*{_TEMPORARY}*")) if checkpoints.is_dir() else []
    for folder in left:
        shutil.rmtree(folder)
    return [folder.name for folder in left]


def waiting_folder(checkpoints: Path, step: int, token: int) -> Path:
    """Return the folder in which a checkpoint is written before it has its name.

    Args:
        checkpoints: folder of the run's checkpoints.
        step: N.
        token: random number, the same in every process.
    """
    return checkpoints / f"checkpoint-{step}{_TEMPORARY}{token:08x}"


def publish(waiting: Path, manifest: Manifest) -> Path:
    """Give a completely written folder its manifest and its name; return the checkpoint.

    An older folder of the same name, from steps that are being done again, is replaced.

    Args:
        waiting: as ``waiting_folder`` says.
        manifest: without files.
    """
    files: dict[str, FileEntry] = {}
    for name, path in listed(waiting):
        sync(path)
        files[name] = entry_of(path)
    for folder in sorted((path for path in waiting.rglob("*") if path.is_dir()), reverse=True):
        sync(folder)
    write_bytes(waiting / NAME, manifest.model_copy(update={"files": files}).spelled())
    final_name = waiting.with_name(waiting.name.partition(_TEMPORARY)[0])
    older = _leaving(final_name) if final_name.exists() or final_name.is_symlink() else None
    waiting.rename(final_name)
    sync(final_name.parent)
    if older is not None:
        shutil.rmtree(older)
    return final_name
