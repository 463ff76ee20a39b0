"""The process that forks training runs, started once, and a process that can be interrupted."""

import signal
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from tests.faults.kills import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


@pytest.fixture
def interruptible() -> Iterator[Callable[[int, FrameType | None], object]]:
    """The handler of a process in the foreground; one that was started in the background may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)
