"""A disk that breaks: every call of ``os`` below one folder, until a chosen one goes wrong.

    with broken_disk(folder, Fault("write", errno.ENOSPC, after=4096)):   # full after 4096 bytes, and from then on
    with broken_disk(folder, Fault("fsync", KILL, after=2)):              # the third fsync never returns

Only paths below the folder, and descriptors opened there, are touched; a full disk takes a part of a write, as a real
one does. ``trace`` names the calls that a piece of work makes, which are the points at which it can be cut off.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

KILL = -1
"""In place of an error number: this process is killed, as by ``kill -9``. Only for child processes."""

CALLS = ("mkdir", "open", "write", "fsync", "link", "rename", "unlink", "scandir", "disk_usage")
"""What can break; ``disk_usage`` is that of ``shutil``."""


@dataclass
class Fault:
    """What goes wrong.

    ``call`` is one of ``CALLS``; ``error`` an error number, ``KILL``, or ``None`` for a call that only waits; ``after``
    the calls (of ``write``, the bytes) that still succeed; ``lasts`` whether all later ones fail too; ``gate`` an event
    that a call waits for, as on a slow disk.
    """

    call: str
    error: int | None
    after: int = 0
    lasts: bool = True
    gate: Event | None = None
    met: int = field(default=0, init=False)

    def strike(self) -> None:
        """Fail, or kill this process."""
        self.met += 1
        if self.gate is not None:
            self.gate.wait()
        if self.error == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))

    def __str__(self) -> str:
        name = {None: "slow", KILL: "kill"}.get(self.error) or errno.errorcode[self.error or 0]
        return f"{self.call}-{name}-after-{self.after}{'' if self.lasts else '-once'}"


class _Disk:
    def __init__(self, folder: Path, fault: Fault | None, real: SimpleNamespace) -> None:
        self.folder, self.fault, self.real = str(folder.absolute()), fault, real
        self.handles: set[int] = set()
        self.calls: list[str] = []
        self.passed = 0

    def below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(self.folder)

    def meet(self, call: str) -> None:
        """Count a call and break it when its time has come."""
        self.calls.append(call)
        fault = self.fault
        if fault is None or fault.call != call:
            return
        self.passed += 1
        if self.passed > fault.after and (fault.lasts or self.passed == fault.after + 1):
            fault.strike()

    def on_path(self, call: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self.below(path):
                self.meet(call)
            return real(path, *args, **kwargs)

        return wrapped

    def open(self, path: Any, *args: Any, **kwargs: Any) -> int:
        inside = self.below(path)
        if inside:
            self.meet("open")
        handle = self.real.open(path, *args, **kwargs)
        (self.handles.add if inside else self.handles.discard)(handle)
        return handle

    def fsync(self, handle: int) -> None:
        if handle in self.handles:
            self.meet("fsync")
        self.real.fsync(handle)

    def write(self, handle: int, data: Any) -> int:
        if handle not in self.handles:
            return self.real.write(handle, data)
        self.calls.append("write")
        fault = self.fault
        if fault is None or fault.call != "write":
            return self.real.write(handle, data)
        room = fault.after - self.passed
        if len(data) <= room or (fault.met and not fault.lasts):
            self.passed += len(data)
            return self.real.write(handle, data)
        if room > 0:
            self.passed = fault.after
            self.real.write(handle, memoryview(data)[:room])
            if fault.error != KILL:
                return room
        fault.strike()
        return self.real.write(handle, data)


@contextmanager
def broken_disk(folder: Path, fault: Fault | None) -> Iterator[list[str]]:
    """Break one kind of call below ``folder`` inside the block; yields the names of the calls as they are made."""
    real = SimpleNamespace(**{name: getattr(os, name) for name in CALLS if name != "disk_usage"})
    usage = shutil.disk_usage
    disk = _Disk(folder, fault, real)
    try:
        for name in ("mkdir", "link", "rename", "unlink", "scandir"):
            setattr(os, name, disk.on_path(name, getattr(real, name)))
        os.open, os.write, os.fsync = disk.open, disk.write, disk.fsync
        shutil.disk_usage = disk.on_path("disk_usage", usage)
        yield disk.calls
    finally:
        for name, call in vars(real).items():
            setattr(os, name, call)
        shutil.disk_usage = usage


def trace(folder: Path, work: Callable[[], object]) -> list[str]:
    """Return the names of the calls that ``work`` makes below ``folder``."""
    with broken_disk(folder, None) as calls:
        work()
    return calls
