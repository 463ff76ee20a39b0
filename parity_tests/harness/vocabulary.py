"""Whether both sides speak the same language: names, positional parameters, declarations and derivation pages."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

from parity_tests.harness.inputs import NUMPY
from parity_tests.harness.pair import OpPair

PRODUCTION_ONLY = {"backend"}
_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


def signature_problems(reference: Callable[..., Any], production: Callable[..., Any]) -> list[str]:
    """Return how two signatures differ: positional names (``*cores`` too), order and defaults, keyword-only names."""
    ours, theirs = (inspect.signature(f).parameters.values() for f in (reference, production))
    problems = []
    left, right = ([(_written(p), p.default) for p in side if p.kind in _POSITIONAL] for side in (ours, theirs))
    if [name for name, _ in left] != [name for name, _ in right]:
        problems.append(
            f"positional parameters differ: reference ({', '.join(n for n, _ in left)}), "
            f"production ({', '.join(n for n, _ in right)})"
        )
    elif left != right:
        problems.append(f"defaults differ: reference {left}, production {right}")
    named, meant = (
        {p.name: p.default for p in side if p.kind is p.KEYWORD_ONLY and p.name not in PRODUCTION_ONLY}
        for side in (ours, theirs)
    )
    if named.keys() != meant.keys():
        problems.append(f"keyword-only parameters differ: {sorted(named.keys() ^ meant.keys())}")
    problems += [
        f"defaults of {name} differ: reference {named[name]!r}, production {meant[name]!r}"
        for name in sorted(named.keys() & meant.keys())
        if named[name] != meant[name]
    ]
    return problems


def _written(parameter: inspect.Parameter) -> str:
    return f"*{parameter.name}" if parameter.kind is parameter.VAR_POSITIONAL else parameter.name


def declaration_problems(pair: OpPair) -> list[str]:
    """Return what is wrong with one declaration before anything is computed."""
    problems = signature_problems(pair.reference, pair.production)
    if not pair.inputs or not pair.sizes:
        problems.append("expected at least one input strategy and one size")
    if pair.oracle is None and not pair.laws:
        problems.append("expected an oracle or at least one law: nothing judges the reference")
    problems += [f"unknown dtype {d!r}; expected {', '.join(NUMPY)}" for d in pair.dtypes if d not in NUMPY]
    problems += [f"nonfinite names no input strategy: {s!r}" for s in pair.nonfinite if s not in pair.inputs]
    if _code(pair.reference) is _code(pair.production):
        problems.append("reference and production are the same function")
    if pair.oracle is not None and _code(pair.oracle) in (_code(pair.reference), _code(pair.production)):
        problems.append("the oracle is one of the two functions that it judges")
    return problems


def oracle_calls(pair: OpPair, arguments: tuple[Any, ...]) -> list[str]:
    """Return which of the judged functions the oracle ran while it computed one example."""
    assert pair.oracle is not None
    judged = {_code(pair.reference): "reference", _code(pair.production): "production"}
    seen: set[CodeType | None] = set()

    def watch(frame: FrameType, _event: str, _argument: Any) -> None:
        seen.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        pair.oracle(*arguments, **pair.keywords)
    finally:
        sys.setprofile(before)
    return sorted(name for code, name in judged.items() if code is not None and code in seen)


def _code(function: Callable[..., Any]) -> CodeType | None:
    while True:
        inner = getattr(function, "__wrapped__", None) or getattr(function, "func", None)
        if inner is None:
            return getattr(function, "__code__", None)
        function = inner


def rooms(package: ModuleType) -> dict[str, ModuleType]:
    """Return room name → module of every public room of ``so8t_jax.ops`` or ``so8t_torch.ops``."""
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


def room_problems(
    reference: dict[str, ModuleType], production: dict[str, ModuleType], pairs: Iterable[OpPair], math_pages: Path
) -> list[str]:
    """Return every room and public function that is missing on one side, undeclared, or without a derivation.

    Args:
        reference: room → module of the definitions.
        production: room → module of the production ops.
        pairs: the table.
        math_pages: folder with one ``<room>.md`` per room.
    """
    declared = {pair.name.partition(":")[0] for pair in pairs}
    problems = [f"room {room} exists on one side only" for room in sorted(reference.keys() ^ production.keys())]
    for room in sorted(reference.keys() & production.keys()):
        left, right = (getattr(side[room], "__all__", None) for side in (reference, production))
        if left is None or right is None:
            problems.append(f"room {room} has no __all__ on both sides")
            continue
        problems += [f"{room}.{name} is exported on one side only" for name in sorted(set(left) ^ set(right))]
        for name in sorted(set(left) & set(right)):
            functions = [getattr(side[room], name) for side in (reference, production)]
            problems += [f"{room}.{name}: {problem}" for problem in signature_problems(*functions)]
            if f"{room}.{name}" not in declared:
                problems.append(f"{room}.{name} is not declared in the table")
        if not (math_pages / f"{room}.md").is_file():
            problems.append(f"{room} has no page {math_pages.name}/{room}.md")
    exported = {f"{room}.{name}" for room, module in production.items() for name in getattr(module, "__all__", ())}
    problems += [f"{name} is declared but not exported" for name in sorted(declared - exported)]
    return problems
