"""A process that saves logits and is killed; started by ``kill_at`` and nobody else.

One process imports the libraries and forks a child for each point; each child kills itself there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tests.faults.disk import Fault, broken_disk
from tests.faults.logits_at_fault import save

STEPS = range(10, 14)


def kill_at(folders: Sequence[Path], form: str, faults: Sequence[Fault]) -> list[int]:
    """Save logits in each folder, each in a process killed at its point; return the processes' statuses.

    Args:
        folders: one for each fault.
        form: of the files.
        faults: where each process kills itself.

    Returns:
        −9 for a process that was killed, 0 for one that never met its point.
    """
    plan = [
        {"folder": str(folder), **{k: v for k, v in asdict(fault).items() if k not in ("gate", "met")}}
        for folder, fault in zip(folders, faults, strict=True)
    ]
    command = [sys.executable, "-m", "tests.faults.logits_killed", form]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        command, input=json.dumps(plan), capture_output=True, text=True, check=False, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def main() -> None:
    """Read the plan and print the statuses."""
    form = sys.argv[1]
    statuses = []
    for point in json.load(sys.stdin):
        folder = Path(point.pop("folder"))
        child = os.fork()
        if child == 0:
            with broken_disk(folder, Fault(**point)):
                save(folder, form, STEPS)
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
