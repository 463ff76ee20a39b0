"""From a table of pairs to tests: every check, every case, one parametrised function for pytest."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from parity_tests.harness import laws, layout, values, variants
from parity_tests.harness.cases import Case, Check
from parity_tests.harness.environment import prepare
from parity_tests.harness.pair import OpPair

CHECKS: dict[str, Check] = {
    "declaration": values.declaration,
    "oracle": values.oracle,
    "forward": values.forward,
    "gradient": values.gradient,
    "meaningful": values.meaningful,
    "gradcheck": values.gradcheck,
    "edges": values.edges,
    "batch": layout.batch,
    "layout": layout.layout,
    "memory": layout.memory,
    "halves": layout.halves,
    "laws": laws.laws,
    "rejections": laws.rejections,
    "plain_reference": variants.plain_reference,
    "compiled": variants.compiled,
    "checkpointed": variants.checkpointed,
    "backends": variants.backends,
}


def cases(pairs: Iterable[OpPair], checks: Iterable[str] = tuple(CHECKS)) -> Iterator[Case]:
    """Yield every case of the named checks; two pairs of one name are refused, their cases could not be told apart."""
    prepare()
    seen: set[str] = set()
    chosen = [CHECKS[name] for name in checks]
    for pair in pairs:
        if pair.name in seen:
            raise ValueError(f"expected one declaration named {pair.name!r}, found two; add a suffix after a colon")
        seen.add(pair.name)
        for check in chosen:
            yield from check(pair)


def generate_tests(pairs: Iterable[OpPair], checks: Iterable[str] = tuple(CHECKS)) -> Callable[[Case], None]:
    """Return a pytest function parametrised over every case of a table: bind it to a name that starts with ``test_``.

    Args:
        pairs: the table.
        checks: which checks to generate, all by default.
    """
    import pytest

    distributed = importlib.util.find_spec("xdist") is not None

    def parameter(case: Case) -> Any:
        marks = [pytest.mark.xdist_group(case.pair.name)] if distributed else []
        if case.interpreted:
            marks.append(pytest.mark.interpreter)
        if case.cuda:
            marks.append(pytest.mark.cuda)
        if case.known_gap is not None:
            marks.append(pytest.mark.xfail(strict=True, reason=case.known_gap))
        return pytest.param(case, id=case.name, marks=marks)

    @pytest.mark.parametrize("case", [parameter(case) for case in cases(pairs, checks)])
    def test_parity(case: Case) -> None:
        if case.unavailable is not None:
            pytest.skip(case.unavailable)
        case.run()

    return test_parity
