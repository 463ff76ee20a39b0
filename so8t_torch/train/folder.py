"""The run folder: where each file of a run lies, how a run begins in it, and how one goes on.

    RUN/config.yaml environment.json metrics.jsonl metrics.csv events.jsonl curves.png
    RUN/tensorboard/ checkpoints/checkpoint-N/ logits/ eval/ and, after a roll-back, recovery.json
    RUN/adapter/ or, of a model that is trained whole, model/, at the end

Both JSONL files are only ever appended to; a line that a dying process left half written is cut off on resume. The
steps behind the checkpoint are written again then; ``read_metrics`` keeps the last entry of each step and kind, so
nothing is lost and nothing is counted twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from so8t_torch.core.config import dump_config, load_config
from so8t_torch.core.errors import CheckpointError, ConfigError
from so8t_torch.train import checkpoints
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.journal import Journal, on_terminal, read_rows
from so8t_torch.train.manifest import write_bytes
from so8t_torch.train.rollback import FILE, Recovery, read_recovery

FREE_ON_RESUME = ("output_dir", "threads", "card", "recording", "logits", "checkpoint", "evaluation")
"""Settings that a resumed run may change; every other one would make it a different run."""

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint or, with ``None``, at step 0; what was passed over, with reasons."""

    checkpoint: Path | None
    recovery: Recovery
    passed_over: list[tuple[str, str]]


class RunFolder:
    """Paths and records of one run.

    Args:
        path: the folder, created when a run begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = False
        self.config = path / "config.yaml"
        self.environment = path / "environment.json"
        self.metrics = path / "metrics.jsonl"
        self.table = path / "metrics.csv"
        self.events = path / "events.jsonl"
        self.curves = path / "curves.png"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.logits = path / "logits"
        self.evaluation = path / "eval"
        self.log = Journal(self.metrics)
        self._journal = Journal(self.events)
        self._unwritten: Recovery | None = None

    def begin(self, config: TrainConfig) -> None:
        """Create the folder for a new run, its configuration first, so that a run cut off here can go on.

        Raises:
            ConfigError: the folder holds something already.
        """
        self.check_free()
        self.make()
        self.state(config)
        self.complete()

    def make(self) -> None:
        """Make the folder itself.

        Raises:
            ConfigError: nothing can be made there.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output_dir {self.path}: no folder can be made there ({error}); choose another."
            ) from error

    def state(self, config: TrainConfig) -> None:
        """Write ``config.yaml`` where there is none."""
        if not self.config.is_file():
            write_bytes(self.config, dump_config(config).encode())

    def complete(self) -> None:
        """Make the folders of a run, and cut off and remove what a process left that died while it wrote."""
        for folder in (self.tensorboard, self.checkpoints, self.logits, self.evaluation):
            folder.mkdir(parents=True, exist_ok=True)
        for record in (self.metrics, self.events):
            cut_off_half_a_line(record)
        checkpoints.sweep(self.checkpoints)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder inside the block; the lock ends with the process, whatever ends it.

        Where there is no folder yet, or its file system knows no locks, nothing is kept out.

        Raises:
            ConfigError: another process trains in it.
        """
        if self._held or not self.path.is_dir():
            yield
            return
        handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _taken(handle):
                raise ConfigError(
                    f"{self.path}: another process trains in this folder; wait for it, or choose another output_dir."
                )
            self._held = True
            yield
        finally:
            self._held = False
            os.close(handle)

    def check_free(self) -> None:
        """Refuse a folder that holds something.

        Raises:
            ConfigError: saying how to go on, which depends on whether there is a checkpoint.
        """
        if self._empty():
            return
        if not self.path.is_dir():
            raise ConfigError(f"{self.path}: expected a folder or nothing at output_dir, got a file.")
        with self.held():
            pass
        found, _ = checkpoints.newest(self.checkpoints)
        way = "go on with --resume auto" if found else "it holds no checkpoint to go on from: remove it"
        raise ConfigError(
            f"{self.path} is not empty, and a run never writes over another; {way}, or choose another output_dir."
        )

    def _empty(self) -> bool:
        return not self.path.exists() or (
            self.path.is_dir() and all(path.suffix == ".part" for path in self.path.iterdir())
        )

    def start(self, resume: str, config: TrainConfig) -> Start:
        """Return where a resumed run begins.

        ``"auto"`` takes the youngest checkpoint that verifies and belongs to the run. A run that was cut off before
        it wrote its first, or after a roll-back to the start, begins at step 0; one whose checkpoints are damaged does
        not.

        Args:
            resume: ``"auto"`` or the path of a checkpoint.
            config: settings of the resumed run.

        Raises:
            ConfigError: there is nothing to go on from, or the settings differ from those the run began with.
            CheckpointError: every checkpoint, or the one that was named, is damaged or of another run; the reasons are
                listed.
        """
        with self.held():
            pass
        if self.config.is_file():
            self._same_run(config)
        recovery = read_recovery(self.path)
        expected = checkpoints.Expected(config_hash(config), recovery)
        if resume != "auto":
            return Start(self._named(resume, expected), recovery, [])
        found, passed_over = checkpoints.newest(self.checkpoints, expected)
        begun = self.config.is_file() or (self.path.exists() and self._empty())
        back_at_start = recovery.to_start and all(reason == checkpoints.LEFT_OUT for _, reason in passed_over)
        if found is None and passed_over and not back_at_start:
            listed = "".join(f"\n  {name}: {reason}" for name, reason in passed_over)
            raise CheckpointError(f"--resume auto: no complete checkpoint at {self.checkpoints}; passed over:{listed}")
        if found is None and not begun:
            raise ConfigError(
                f"--resume auto: no complete checkpoint at {self.checkpoints}; start anew without --resume."
            )
        return Start(found, recovery, passed_over)

    def _named(self, resume: str, expected: checkpoints.Expected) -> Path:
        folder = Path(resume)
        if not folder.is_dir():
            raise ConfigError(f"--resume {resume}: no complete checkpoint at {folder}; start anew without --resume.")
        objection = expected.objection(checkpoints.verify(folder))
        if objection is not None:
            raise ConfigError(
                f"--resume {resume}: {objection}; a resumed run keeps its settings (only {', '.join(FREE_ON_RESUME)} "
                "may change) and its roll-backs. Take --resume auto, the config.yaml of the run that wrote it, or "
                "begin a new run."
            )
        return folder

    def write_recovery(self, recovery: Recovery) -> bool:
        """Write ``recovery.json`` before anything follows; it waits in memory while the disk refuses it.

        Returns:
            whether it is on the disk.
        """
        self._unwritten = recovery
        error = self.settle()
        if error is not None:
            on_terminal(
                f"training goes on, {self.path / FILE} waits in memory ({error}); a process that dies before it is "
                "written forgets this roll-back, and a resumed run reads the same samples again"
            )
        return error is None

    def settle(self) -> OSError | None:
        """Write ``recovery.json`` if it waits; return why that failed."""
        if self._unwritten is None:
            return None
        text = json.dumps(self._unwritten.as_json(), ensure_ascii=False, indent=1, allow_nan=False)
        try:
            write_bytes(self.path / FILE, text.encode())
        except OSError as error:
            return error
        self._unwritten = None
        return None

    def close(self) -> None:
        """Write what waits in memory, for the last time; where the disk still refuses it, say what is lost."""
        error = self.settle()
        if error is not None:
            on_terminal(
                f"{self.path / FILE} is lost ({error}); checkpoints since the last roll-back will be passed over"
            )
            self._unwritten = None
        self.log.close()
        self._journal.close()

    def _same_run(self, config: TrainConfig) -> None:
        before = load_config(TrainConfig, self.config).model_dump(mode="json", exclude=set(FREE_ON_RESUME))
        now = config.model_dump(mode="json", exclude=set(FREE_ON_RESUME))
        changed = "".join(f"\n  {line}" for line in _changes(before, now))
        if changed:
            raise ConfigError(
                f"--resume: these settings are not those of {self.config}:{changed}\nA resumed run keeps its settings "
                f"(only {', '.join(FREE_ON_RESUME)} may change). Take the settings of that file, or start a new "
                "output_dir for a different run."
            )

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event with the time in seconds since 1970; it waits in memory while the disk refuses it."""
        self._journal.add({"event": kind, "time": round(time.time(), 3), **fields})


def _changes(before: dict[str, Any], now: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield each key that two trees of settings hold differently, with the value before and now."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{path}{name}.")
        elif old != new:
            spelled = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
            yield f"{path}{name}: {spelled[0]} then, {spelled[1]} now"


def _taken(handle: int) -> bool:
    """Lock a folder; return whether another has it locked."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # this file system knows no locks
    return False


def config_hash(config: TrainConfig) -> str:
    """Return a SHA-256 over the settings that a resumed run must keep."""
    tree = config.model_dump(mode="json", exclude=set(FREE_ON_RESUME))
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def cut_off_half_a_line(path: Path) -> None:
    """Cut a text file behind its last whole line."""
    if not path.is_file():
        return
    with path.open("r+b") as handle:
        kept = size = handle.seek(0, os.SEEK_END)
        while kept:
            start = max(0, kept - _BLOCK)
            handle.seek(start)
            end = handle.read(kept - start).rfind(b"\n") + 1
            kept = start + end
            if end:
                break
        if kept != size:
            handle.truncate(kept)
            os.fsync(handle.fileno())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole: to a temporary name, then renamed."""
    waiting = path.with_name(path.name + ".part")
    waiting.write_text(json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    waiting.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the log entries in order of step, the last one of each step and kind.

    Args:
        path: ``metrics.jsonl`` of a run.

    Raises:
        DataError: as for ``read_rows``.
    """
    latest = {(row["step"], row["kind"]): row for row in read_rows(path)}
    return sorted(latest.values(), key=lambda row: row["step"])
