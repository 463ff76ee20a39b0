"""How parity tests run: JAX in float64, shapes checked, one thread, drawn examples reproducible, skips counted."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from parity_tests.harness import environment, reference
from parity_tests.harness.skips import SkipCount

environment.check_shapes()
environment.prepare()

settings.register_profile("dev", max_examples=50, derandomize=True, database=None, deadline=None)
settings.register_profile("ci", max_examples=200, derandomize=True, database=None, deadline=None)
settings.register_profile("nightly", max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def pytest_configure(config: pytest.Config) -> None:
    """Draw as CI does unless ``--hypothesis-profile`` names another profile."""
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("ci")
    config.pluginmanager.register(SkipCount(), "parity-skip-count")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep interpreter tests in a process that interprets kernels, and every other test out of it."""
    from so8t_torch.core.backend import interpreting

    sorted_out: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        sorted_out[(item.get_closest_marker("interpreter") is not None) == interpreting()].append(item)
    if sorted_out[False]:
        config.hook.pytest_deselected(items=sorted_out[False])
        items[:] = sorted_out[True]


FINISHED = itertools.count(1)
MAPS, MOST_MAPS = Path("/proc/self/maps"), 20_000
"""A process has 65,530 memory maps on Linux, a compiled definition takes a dozen, and the compiler crashes without."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Forget what was compiled before memory maps run out."""
    if next(FINISHED) % 50 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        reference.forget_compiled()
        gc.collect()
