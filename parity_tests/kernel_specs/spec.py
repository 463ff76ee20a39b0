"""One Triton kernel as it is compiled without a GPU: its tiles, its arguments, what its machine code must contain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from so8t_torch.core.launch import Tile

ELEMENTS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel and how it is called.

    Attributes:
        room: the room it belongs to.
        kernel: the ``@triton.jit`` function.
        tiles: its tile table.
        signature: argument name → Triton type; ``*`` alone stands for a pointer to the element type.
        constants: ``tl.constexpr`` arguments that are not tile sizes.
        elements: element types it is launched with.
        wide_loads: 16-byte loads that the hot path must have at least.
        wide_stores: the same for stores; 0 where the kernel writes scalars only.
    """

    room: str
    kernel: Any
    tiles: tuple[Tile, ...]
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    elements: tuple[str, ...] = ELEMENTS
    wide_loads: int = 1
    wide_stores: int = 1
