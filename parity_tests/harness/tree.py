"""Nested outputs as a structure and a list of leaves, without the truncation that ``zip`` invites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def flatten(output: Any) -> tuple[str, list[Any]]:
    """Return the written-out structure of a nested output and its leaves in order.

    Args:
        output: arrays or tensors, nested in tuples, named tuples, lists and mappings; ``None`` is structure.

    Returns:
        The structure with ``*`` for each leaf, e.g. ``(*, None)``, and the leaves.
    """
    if output is None:
        return "None", []
    if isinstance(output, Mapping):
        parts = [(str(key), *flatten(output[key])) for key in sorted(output)]
        return "{" + ", ".join(f"{key}: {s}" for key, s, _ in parts) + "}", [x for *_, xs in parts for x in xs]
    if isinstance(output, (tuple, list)):
        inner = [flatten(item) for item in output]
        text = ", ".join(structure for structure, _ in inner)
        opening, closing = ("[", "]") if isinstance(output, list) else ("(", ")")
        named = type(output).__name__ if hasattr(output, "_fields") else ""
        return f"{named}{opening}{text}{closing}", [leaf for _, leaves in inner for leaf in leaves]
    return "*", [output]


def map_leaves(function: Callable[[Any], Any], output: Any) -> Any:
    """Return the same nesting with ``function`` applied to every leaf."""
    if output is None:
        return None
    if isinstance(output, Mapping):
        return {key: map_leaves(function, value) for key, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(map_leaves(function, item) for item in output))
    if isinstance(output, (tuple, list)):
        return type(output)(map_leaves(function, item) for item in output)
    return function(output)
