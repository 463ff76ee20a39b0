"""The long version of R7: 300 random faults of a disk under saved logits, and a kill at every call.

One case again: ``python -m tests.faults.soak_disk SEED`` for a fault, ``python -m tests.faults.soak_disk kills FORM``.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.faults.disk import trace
from tests.faults.logits_at_fault import complaints, contents, killed_points, random_fault, save, suffer
from tests.faults.logits_killed import STEPS, kill_at

FAULTS = 300
FORMS = ("safetensors", "pt")

Row = tuple[str, int, int, str, str]
"""Figure, trials, failures, bound, command that repeats the failures."""


def fault(seed: int) -> list[str]:
    """Return what went wrong under the random fault of a seed; even seeds write safetensors, odd ones ``.pt``."""
    with tempfile.TemporaryDirectory() as place:
        return suffer(Path(place) / "logits", FORMS[seed % 2], random_fault(seed))


def kills(form: str) -> tuple[int, list[str]]:
    """Kill a process at every call it makes while it saves; return how many kills, and what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        kept = place / "kept"
        save(kept, form, range(1, 4))
        before = contents(kept)
        rehearsal = shutil.copytree(kept, place / "rehearsal")
        calls = trace(rehearsal, lambda: save(rehearsal, form, STEPS))
        points = killed_points(calls, len(next(iter(contents(rehearsal).values()))))
        folders = [shutil.copytree(kept, place / str(number)) for number in range(len(points))]
        statuses = kill_at(folders, form, points)
        found = []
        for folder, point, status in zip(folders, points, statuses, strict=True):
            wrong = complaints(folder, before, alive=False) + ([] if status == -9 else [f"ended with {status}"])
            save(folder, form, range(20, 22))
            found += [f"{point}: {text}" for text in wrong + complaints(folder, before, alive=True)]
        return len(points), found


def run(report: Callable[[str], None] = print) -> list[Row]:
    """Run all of it, report each failure, and return the rows of the table."""
    command = "python -m tests.faults.soak_disk"
    bad = {seed: wrong for seed in range(FAULTS) if (wrong := fault(seed))}
    for seed, wrong in bad.items():
        report(f"{random_fault(seed)}: {wrong}; again: {command} {seed}")
    rows = [("R7 disk faults", FAULTS, len(bad), "0", f"{command} {next(iter(bad), 0)}")]
    for form in FORMS:
        count, found = kills(form)
        for text in found:
            report(f"{text}; again: {command} kills {form}")
        rows.append((f"R7 kills while saving, {form}", count, len(found), "0", f"{command} kills {form}"))
    return rows


def main(arguments: list[str]) -> int:
    """Run everything, one fault, or the kills of one form; the exit status says whether something failed."""
    if arguments[:1] == ["kills"]:
        count, found = kills(arguments[1])
        print(f"{count} kills", *found, sep="\n")
        return bool(found)
    if arguments:
        found = fault(int(arguments[0]))
        print(random_fault(int(arguments[0])), *found, sep="\n")
        return bool(found)
    rows = run()
    print(*rows, sep="\n")
    return any(row[2] for row in rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
