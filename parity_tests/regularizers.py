"""A regulariser's port to PyTorch, judged by the declaration under which it was registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parity_tests.harness.pair import Budget, Law, OpPair, Rejection
from so8t_jax.regularizers import Regularizer


def pair_of(
    regularizer: Regularizer,
    production: Callable[..., Any],
    *,
    budget: Budget,
    oracle: Callable[..., Any] | None = None,
    rejections: tuple[Rejection, ...] = (),
    **fields: Any,
) -> OpPair:
    """Return the declaration of a pair: the registered function defines, its inputs, sizes and laws judge.

    Args:
        regularizer: as registered.
        production: the port, batched: axes before those of the definition count independent problems.
        budget: accepted error in eps.
        oracle: a float64 computation independent of both; without one there must be a law.
        rejections: bad calls that the port refuses.
        fields: others of ``OpPair``, by name.
    """
    return OpPair(
        **{
            "name": f"regularizers.{regularizer.name}",
            "reference": regularizer.function,
            "production": production,
            "inputs": regularizer.inputs,
            "sizes": regularizer.sizes,
            "wrt": regularizer.wrt,
            "keywords": regularizer.keywords,
            "laws": tuple(Law(law.name, law.residual, law.budget) for law in regularizer.laws),
            "finite_differences": regularizer.finite_differences,
            "returns": "accumulation",
            "budget": budget,
            "oracle": oracle,
            "rejections": rejections,
            **fields,
        }
    )
