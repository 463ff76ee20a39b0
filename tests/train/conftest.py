"""The process that forks training runs, started once."""

from collections.abc import Iterator

import pytest

from tests.faults.kills import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    with Zygote() as process:
        yield process
