"""The process that forks training runs, started once, and a writer of logits that has patience."""

from collections.abc import Iterator

import pytest

from so8t_torch.train.logits.writer import Writer
from tests.faults.kills import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process


@pytest.fixture
def none_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose saved files are counted: captures wait for a slow disk, however many there are."""
    monkeypatch.setitem(Writer.__init__.__kwdefaults__, "waiting", 1000)
