"""A pytest plugin: a session that skips more generated tests than the census records has failed."""

from __future__ import annotations

import pytest

from parity_tests.harness.census import recorded


class SkipCount:
    """Counts skips in the process that sees every report and compares them with the census."""

    def __init__(self, allowed: int | None = None) -> None:
        self.allowed = int(recorded()["skips"]) if allowed is None else allowed
        self.skipped = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a skip; expected failures are reported as skips too and have their own record."""
        if report.skipped and not hasattr(report, "wasxfail") and report.nodeid.startswith("parity_tests/"):
            self.skipped += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the session when the skips grew; a worker sees only its own and leaves that to the controller."""
        if not hasattr(session.config, "workerinput") and self.skipped > self.allowed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say why the session failed."""
        if self.skipped > self.allowed:
            terminalreporter.write_line(
                f"parity: {self.skipped} tests skipped, the census allows {self.allowed}; "
                "find out why, or record it with `python -m parity_tests --census`",
                red=True,
            )
