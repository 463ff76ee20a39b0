"""The process that forks training runs, started once, a process that can be interrupted, and a patient writer."""

import signal
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from so8t_torch.train.logits.writer import Writer
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


@pytest.fixture
def none_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose saved files are counted: captures wait for a slow disk, however many there are."""
    monkeypatch.setitem(Writer.__init__.__kwdefaults__, "waiting", 1000)
