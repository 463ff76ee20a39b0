"""Drawn examples that are the same in every run and take whatever time a loaded machine needs."""

from hypothesis import HealthCheck, settings

steadily = settings(deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
"""Decorator of a test with ``given``."""
