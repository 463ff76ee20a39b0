"""Memory of graphics cards, as the maker names it, and what part of it a process cannot use."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from so8t_torch.core.errors import ConfigError

GIB = 1 << 30

CUDA_CONTEXT = GIB // 2
"""Assumed size of the CUDA context with the libraries' kernels; it varies by driver and was not measured here."""

HEADROOM = 0.05
"""Assumed share of the planned tensors lost to the allocator's rounding and fragmentation."""


@dataclass(frozen=True)
class Card:
    """A card by name; ``bfloat16`` says whether it computes in that dtype."""

    name: str
    gib: int
    bfloat16: bool = True

    @property
    def size(self) -> int:
        """Memory in bytes."""
        return self.gib * GIB


CARDS = {
    card.name: card
    for card in (
        Card("t4-16gb", 16, bfloat16=False),
        Card("rtx2080ti-11gb", 11, bfloat16=False),
        Card("rtx3060-8gb", 8),
        Card("rtx3060-12gb", 12),
        Card("rtx3090-24gb", 24),
        Card("rtx4060ti-16gb", 16),
        Card("rtx4070-12gb", 12),
        Card("rtx4090-24gb", 24),
        Card("l4-24gb", 24),
        Card("a100-40gb", 40),
        Card("a100-80gb", 80),
        Card("h100-80gb", 80),
        Card("h200-141gb", 141),
    )
}


def find_card(name: str) -> Card:
    """Return the card of this name.

    Raises:
        ConfigError: the table has none; the nearest name is given.
    """
    if name not in CARDS:
        near = difflib.get_close_matches(name, CARDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"Unknown card {name!r}; {hint}Cards: {', '.join(CARDS)}.")
    return CARDS[name]
