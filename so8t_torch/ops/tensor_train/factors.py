"""How a vocabulary and a width are split into the factors of a tensor train: plain integers, no tensors.

    V ≤ v_1 v_2 ⋯ v_K (a vocabulary may be padded)        D = w_1 w_2 ⋯ w_K exactly (a width is never padded)

Derivation of the index maps: docs/math/tensor_train.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from so8t_torch.core.errors import ConfigError

__all__ = ["balanced_factors", "padded_factors"]


def balanced_factors(n: int, parts: int) -> tuple[int, ...]:
    """Return divisors w_1 ≤ … ≤ w_parts of n, each as close to n^(1/parts) as their product being n allows.

    Args:
        n: the number to split, for example the width of a model; at least 1.
        parts: how many factors, at least 1.

    Returns:
        The factors for which Σ (log w_k)² is least; of equally good ones the first in lexicographic order.

    Raises:
        ConfigError: n or parts is below 1, or every split has a factor of 1 (n is prime, say), with which a core
            would describe nothing; give the factors explicitly if that is wanted.
    """
    _check(n, parts)
    found = [split for split in _ascending_splits(n, parts, 1) if parts == 1 or split[0] > 1]
    if not found:
        raise ConfigError(
            f"balanced_factors: expected a number with {parts} factors above 1, got {n}; "
            f"choose another width or fewer cores, or give the factors explicitly."
        )
    return min(found, key=lambda split: sum(math.log(factor) ** 2 for factor in split))


def padded_factors(n: int, parts: int) -> tuple[int, ...]:
    """Return v_1 ≥ … ≥ v_parts, nearly equal, whose product is at least n: ⌈n^(1/parts)⌉, then the rest of n likewise.

    Args:
        n: the number to cover, for example the size of a vocabulary; at least 1.
        parts: how many factors, at least 1.

    Returns:
        The factors; lowering the last one by 1 would no longer cover n.

    Raises:
        ConfigError: n or parts is below 1.
    """
    _check(n, parts)
    if parts == 1:
        return (n,)
    first = _root(n, parts)
    return (first, *padded_factors(-(-n // first), parts - 1))


def _ascending_splits(n: int, parts: int, least: int) -> Iterator[tuple[int, ...]]:
    """Yield every ascending split of n into that many divisors, none below ``least``."""
    if parts == 1:
        if n >= least:
            yield (n,)
        return
    factor = least
    while factor**parts <= n:
        if n % factor == 0:
            yield from ((factor, *rest) for rest in _ascending_splits(n // factor, parts - 1, factor))
        factor += 1


def _root(n: int, degree: int) -> int:
    """Return ⌈n^(1/degree)⌉ exactly."""
    root = max(1, round(n ** (1 / degree)))
    while root**degree < n:
        root += 1
    while (root - 1) ** degree >= n:
        root -= 1
    return root


def _check(n: int, parts: int) -> None:
    if n < 1 or parts < 1:
        raise ConfigError(f"expected a number and a count of factors of at least 1, got {n} and {parts}.")
