"""Going back to an earlier checkpoint without reading the same samples again, also when the process dies meanwhile.

Whoever finds that training went wrong raises ``RollbackRequested`` out of the loop. The run writes the span to leave
out and the state of its extras to ``RUN/recovery.json``, then trains again from the checkpoint, or from the start where
there is none. A process that dies after that finds the file: checkpoints that learned from samples left out since are
passed over, and extras of a checkpoint from before the roll-back, or of none, take their state from the file, so that a
recovery that failed is not forgotten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from so8t_torch.core.errors import CheckpointError
from so8t_torch.core.files import read_text
from so8t_torch.train.data_order import Span, merged

FILE = "recovery.json"
VERSION = 2
MAX_BYTES = 1 << 24

Json = Any
"""What JSON can say: ``None``, booleans, finite numbers, texts, lists, and objects of these."""


class RollbackRequested(Exception):  # noqa: N818 - a request that the run grants, not an error
    """Asks the run to go on from an earlier checkpoint.

    Args:
        checkpoint: a verified checkpoint folder of this run; ``None`` is the start.
        skipped: span of the stream of samples that is left out from now on.
        reason: a sentence for the record.
        steps: how many will be done again, the one under way included.
    """

    def __init__(self, checkpoint: Path | None, skipped: Span, reason: str, steps: int = 0) -> None:
        where = "the start" if checkpoint is None else checkpoint.name
        super().__init__(f"{reason} Going back to {where}, leaving out samples {skipped[0]}..{skipped[1]}.")
        self.checkpoint, self.skipped, self.reason, self.steps = checkpoint, skipped, reason, steps


@runtime_checkable
class TrainingExtra(Protocol):
    """Something beside the model that a run carries and that must survive a restart.

    ``name`` is its key in ``so8t_state.json``; ``open_incident`` says that it is recovering from a fault, so that
    nobody rolls back to a checkpoint of this moment.
    """

    name: str
    open_incident: bool

    def state(self) -> dict[str, Json]:
        """Return everything it needs to go on."""

    def load(self, state: dict[str, Json]) -> None:
        """Take up a state that ``state`` returned."""


@dataclass(frozen=True)
class Recovery:
    """What roll-backs left: how many, the spans of the stream left out, the extras' states after the last one."""

    rollbacks: int = 0
    skipped: tuple[Span, ...] = ()
    extras: dict[str, dict[str, Json]] = field(default_factory=dict)

    @property
    def to_start(self) -> bool:
        """Whether a roll-back went to the start."""
        return bool(self.skipped) and self.skipped[0][0] == 0

    def after(self, request: RollbackRequested, extras: Sequence[TrainingExtra]) -> Recovery:
        """Return the record once a request is granted."""
        spans = merged([*self.skipped, request.skipped])
        return Recovery(self.rollbacks + 1, spans, {extra.name: extra.state() for extra in extras})

    def as_json(self) -> dict[str, Json]:
        """Return the content of ``recovery.json``."""
        spans = [list(span) for span in self.skipped]
        tree = {"version": VERSION, "rollbacks": self.rollbacks, "skipped": spans, "extras": self.extras}
        return {**tree, "sha256": _digest(tree)}


def read_recovery(run: Path) -> Recovery:
    """Return what earlier roll-backs of a run left, nothing where there was none.

    Args:
        run: run folder.

    Raises:
        CheckpointError: the file is not what ``Recovery.as_json`` gives.
    """
    path = run / FILE
    if not path.is_file():
        return Recovery()
    try:
        tree = json.loads(read_text(path, CheckpointError, limit=MAX_BYTES))
        if tree["version"] != VERSION:
            raise ValueError(f"version {tree['version']}")
        if tree.pop("sha256") != _digest(tree):
            raise ValueError("its sha256 is another")
        spans = merged((first, last) for first, last in tree["skipped"])
        return Recovery(
            int(tree["rollbacks"]), spans, {str(name): dict(state) for name, state in tree["extras"].items()}
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); without it samples that were left out would be read again. Restore the "
            "file, or begin anew in another output_dir."
        ) from error


def _digest(tree: dict[str, Json]) -> str:
    """Return the SHA-256 of a record, whatever the order of its names."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, allow_nan=False).encode()).hexdigest()
