"""Saved logits on a disk that breaks: the cases, the work they interrupt, and what must hold afterwards."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import torch

from so8t_torch.train.logits.capture import Capture
from so8t_torch.train.logits.reading import read_record
from so8t_torch.train.logits.store import NAME, WAITING, Store
from so8t_torch.train.logits.writer import Totals, Writer
from tests.faults.disk import KILL, Fault, broken_disk

VOCABULARY, POSITIONS, KEPT = 300, 24, 3


def capture(step: int, mode: str = "topk") -> Capture:
    """Return a complete capture with random logits that depend on the step."""
    source = torch.Generator().manual_seed(step)
    logits = torch.randn(POSITIONS, VOCABULARY, generator=source)
    labels = torch.randint(0, VOCABULARY, (POSITIONS,), generator=source)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    taken = Capture(step, 0, mode=mode, top_k=16, dtype=torch.float32)
    taken.begin(torch.zeros(POSITIONS), torch.arange(POSITIONS), labels, (1, POSITIONS + 1))
    taken.chunk(logits, labels, nll)
    return taken


def store(folder: Path, form: str) -> Store:
    """Return a store that keeps few files."""
    return Store(folder, form=form, max_files=KEPT, max_bytes=1 << 30)


def save(folder: Path, form: str, steps: range) -> tuple[Totals, list[str]]:
    """Save captures one after the other and return the totals and what was told."""
    writer = Writer(store(folder, form), len(steps), waiting=len(steps))
    for step in steps:
        writer.submit(capture(step))
    totals = writer.close(60.0)
    return totals, [note.outcome for note in writer.notes()]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file under a final name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if NAME.fullmatch(p.name)} if folder.is_dir() else {}


def complaints(folder: Path, before: dict[str, bytes], *, alive: bool) -> list[str]:
    """Return what is wrong with a folder after a fault.

    Args:
        folder: of the saved logits.
        before: its contents before the fault.
        alive: whether the process lived on, and so must have left no waiting file.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if WAITING.fullmatch(path.name):
            found += [f"{path.name} was left behind"] if alive else []
        elif not NAME.fullmatch(path.name):
            found.append(f"{path.name} is a stranger")
        elif path.name in before and path.read_bytes() != before[path.name]:
            found.append(f"{path.name} was changed")
        else:
            found += _unlike(path)
    return found


def _unlike(path: Path) -> list[str]:
    """Return a complaint unless the file holds what was captured at its step."""
    record = read_record(path)
    expected = capture(record.step).record()
    same = all(torch.equal(value, expected.tensors[name]) for name, value in record.tensors.items())
    return [] if same else [f"{path.name} does not hold what was captured"]


def fault_cases() -> list[Fault]:
    """Return the faults of every commit: each call, the errors a disk gives, full after several numbers of bytes."""
    full = [Fault("write", errno.ENOSPC, after) for after in (0, 1, 511, 2000, 4096, 9000)]
    calls = [
        Fault("mkdir", errno.EACCES),
        Fault("mkdir", errno.EROFS),
        Fault("open", errno.EROFS),
        Fault("open", errno.EACCES, 4),
        Fault("open", errno.ENOENT, 2, lasts=False),
        Fault("write", errno.EDQUOT, 3000),
        Fault("write", errno.EIO, 100, lasts=False),
        Fault("fsync", errno.EIO),
        Fault("fsync", errno.EIO, 1, lasts=False),
        Fault("link", errno.ENOSPC),
        Fault("link", errno.EPERM),
        Fault("unlink", errno.EROFS, 3),
        Fault("scandir", errno.ESTALE, 1),
        Fault("disk_usage", errno.ESTALE, 2),
    ]
    return full + calls


def random_fault(seed: int) -> Fault:
    """Return a random fault of the soak."""
    source = random.Random(seed)
    # the calls that saving four files makes at least, of write the bytes
    reach = {"mkdir": 4, "open": 8, "write": 12_000, "fsync": 8, "link": 4, "unlink": 4, "scandir": 4}
    call = source.choice([*reach, "write", "write"])
    error = source.choice([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.ESTALE])
    return Fault(call, error, source.randrange(reach[call]), lasts=source.random() < 0.5)


def suffer(folder: Path, form: str, fault: Fault) -> list[str]:
    """Save three files, save four more on the broken disk, two on the mended one; return what went wrong."""
    save(folder, form, range(1, 4))
    before = contents(folder)
    with broken_disk(folder, fault):
        totals, told = save(folder, form, range(4, 8))
    found = complaints(folder, before, alive=fault.call != "unlink")
    if totals.saved + totals.failed != 4 or told.count("failed") > 1:
        found.append(f"{totals}, told {told}")
    if not fault.met:
        found.append("the fault was never met")
    after, _ = save(folder, form, range(8, 10))
    names = contents(folder)
    newest = [name for step in (8, 9) for name in names if name.startswith(f"logits_step_{step}_")]
    if after.saved != 2 or len(newest) != 2 or len(names) > KEPT:
        found.append(f"on the mended disk: {after}, {sorted(names)}")
    return found + complaints(folder, before, alive=True)


def killed_points(calls: list[str], data: int) -> list[Fault]:
    """Return a fault for each call of a traced piece of work, and within the writes of each file.

    Args:
        calls: names in order.
        data: bytes of one file.
    """
    seen: dict[str, int] = {}
    faults = []
    for call in calls:
        number = seen.get(call, 0)
        seen[call] = number + 1
        if call == "link":
            # a file is written in several pieces and linked once
            faults += [Fault("write", KILL, number * data + part) for part in (0, 1, data // 2, data - 1)]
        if call != "write":
            faults.append(Fault(call, KILL, number))
    return faults
