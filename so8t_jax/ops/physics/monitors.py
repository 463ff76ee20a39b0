"""Diagnostics: what a penalty reports beside its value, without gradients."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float

Diagnostics = dict[str, Float[Array, ""]]


def monitors(**values: Float[Array, ""]) -> Diagnostics:
    """Return the values by name, held constant in every gradient."""
    return {name: jax.lax.stop_gradient(value) for name, value in values.items()}
