"""Trains in several processes; a number is broken in process 1 alone. Started by torchrun: CONFIG PLACE VALUE STEP.

Each process leaves ``RUN/weights-K.txt``, a digest of what it trained.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from so8t_torch.core.config import load_config
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.detection import trainable
from so8t_torch.train.run import run_training
from tests.faults.injection import injected


def main(path: str, place: str, value: str, step: str) -> None:
    """Train, and write the digest."""
    config, rank = load_config(TrainConfig, Path(path)), int(os.environ["RANK"])
    with injected(place, value, {int(step)} if rank == 1 else set()) as injection:
        result = run_training(config, callbacks=[injection])
    assert bool(injection.fired) == (rank == 1)
    found = hashlib.sha256()
    for parameter in trainable(result.model).values():
        found.update(parameter.detach().numpy().tobytes())
    (result.directory / f"weights-{rank}.txt").write_text(found.hexdigest())


if __name__ == "__main__":
    main(*sys.argv[1:])
