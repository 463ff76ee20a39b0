"""How many cases each check generates for each pair, and how many are skipped: on record, so that neither drifts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from parity_tests.harness.generate import cases
from parity_tests.harness.pair import OpPair

RECORD = Path(__file__).parent.parent / "census.json"


def count(pairs: Iterable[OpPair]) -> dict[str, Any]:
    """Return the census of a table.

    Returns:
        ``pairs``: pair → check → number of cases; ``total``; ``skips``: cases that need a CUDA device, the only
        ones that a machine without one may skip; ``known_gaps``: cases expected to fail.
    """
    generated = list(cases(pairs))
    by_pair: dict[str, Counter[str]] = {}
    for case in generated:
        by_pair.setdefault(case.pair.name, Counter())[case.check] += 1
    return {
        "total": len(generated),
        "skips": sum(case.cuda for case in generated),
        "known_gaps": sorted(case.name for case in generated if case.known_gap is not None),
        "pairs": {name: dict(sorted(checks.items())) for name, checks in sorted(by_pair.items())},
    }


def recorded() -> dict[str, Any]:
    """Return the census on record."""
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def write(census: dict[str, Any]) -> None:
    """Put a census on record."""
    RECORD.write_text(json.dumps(census, indent=2) + "\n", encoding="utf-8")


def differences(found: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Return one line for each figure that is not the one on record."""
    lines = [
        f"{key}: {found[key]} now, {record[key]} on record"
        for key in ("total", "skips", "known_gaps")
        if found[key] != record[key]
    ]
    for name in sorted(found["pairs"].keys() | record["pairs"].keys()):
        now, then = found["pairs"].get(name, {}), record["pairs"].get(name, {})
        lines += [
            f"{name} {check}: {now.get(check, 0)} now, {then.get(check, 0)} on record"
            for check in sorted(now.keys() | then.keys())
            if now.get(check, 0) != then.get(check, 0)
        ]
    return lines
