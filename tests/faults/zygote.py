"""A process that has the libraries loaded and forks one child per training run, so that each run can be killed.

    python -m tests.faults.zygote        one JSON request per line on stdin, one JSON answer per line on stdout

A request names the arguments of ``so8t`` and a fault; the child runs the command and brings the fault about in itself.
The answer is the child's exit status, negative for the signal that ended it. Nobody but the child sends a signal, and
only to itself.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

MARK = ".tmp-"
WRITES = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}


def die() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Writes:
    """Counts the file operations that make a checkpoint, and dies before one of them.

    Args:
        fatal: number of the operation, from 1; 0 dies nowhere.
        torn: share of a tensor file that is on the disk when the process dies while it writes that file.
    """

    def __init__(self, fatal: int, torn: float) -> None:
        self.count, self._fatal, self._torn = 0, fatal, torn

    def install(self) -> None:
        """Watch from here on."""
        from so8t_torch.train import checkpoint_state

        sys.addaudithook(self._audit)
        fsync, save = os.fsync, checkpoint_state.save_file

        def watched_fsync(descriptor: int) -> None:
            self.seen()
            fsync(descriptor)

        def watched_save(tensors: Any, path: Any, **options: Any) -> None:
            save(tensors, path, **options)
            if self.count + 1 == self._fatal:
                os.truncate(path, int(self._torn * Path(path).stat().st_size))
            self.seen()

        os.fsync, checkpoint_state.save_file = watched_fsync, watched_save

    def seen(self) -> None:
        """Count one operation."""
        self.count += 1
        if self.count == self._fatal:
            die()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITES and any(MARK in str(argument) for argument in arguments[:2]):
            self.seen()


def after_micro_batch(number: int, act: Any) -> None:
    """Act in the middle of a step: behind the backward pass of the ``number``-th micro-batch of this process."""
    from so8t_torch.train.trainer import SO8TTrainer

    real, seen = SO8TTrainer.training_step, [0]

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        seen[0] += 1
        if seen[0] == number:
            act()
        return loss

    SO8TTrainer.training_step = watched  # type: ignore[method-assign]


def bring_about(fault: dict[str, Any]) -> Writes:
    """Arrange the fault of a request in this process."""
    writes = Writes(fault.get("write", 0), fault.get("torn", 0.0))
    writes.install()
    if "micro_batch" in fault:
        number = fault.get("signal", signal.SIGKILL)
        after_micro_batch(fault["micro_batch"], lambda: os.kill(os.getpid(), number))
    if "seconds" in fault:
        timer = threading.Timer(fault["seconds"], die)
        timer.daemon = True
        timer.start()
    return writes


def child(request: dict[str, Any]) -> int:
    """Run the command and return its exit status."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    from so8t_torch.cli import main

    writes = bring_about(request["fault"])
    sys.argv = ["so8t", *request["arguments"]]
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    else:
        status = 0
    if "count" in request:
        Path(request["count"]).write_text(str(writes.count))
    return status


def load() -> None:
    """Import what every child needs."""
    import torch

    for name in ("bitsandbytes", "peft", "transformers.models.phi3.modeling_phi3", "so8t_torch.train.run"):
        importlib.import_module(name)
    torch.set_num_threads(1)


def serve() -> None:
    """Answer requests until stdin ends."""
    load()
    answers = os.fdopen(os.dup(1), "w")
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            status = 70
            try:
                status = child(json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])), file=answers, flush=True)


if __name__ == "__main__":
    serve()
