"""The filter of modes at a chunk boundary, beside the chunk itself and the original's change of basis.

``python -m benchmarks.resonance`` prints the table and writes ``docs/bench/resonance-cpu.json`` and ``.png``. The chunk
is what 64 tokens cost that read from and write to the same states by matrix products; a ratio of 1 to it means that
the filter takes as long as they do, and a ratio of 5 a fifth. The original inverts its complex basis in every call.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.allocation import peak_bytes
from benchmarks.harness import Case, Rival, run
from so8t_torch.ops import resonance, zeta

COMPONENT = "resonance"
ROOM = "resonance"
SIZES = ((1, 8, 64), (4, 8, 64), (4, 8, 128))
TOKENS = 64


def cases() -> Iterator[Case]:
    """Yield the filter for every batch, number of heads and width of a head."""
    torch.manual_seed(0)
    for batch, heads, width in SIZES:
        state = torch.randn(batch, heads, width, width)
        q = resonance.basis(width).float()
        chunk = Rival("chunk of 64 tokens", without_graph(chunk_of(state)))
        filtered = without_graph(partial(resonance.resonance, state, q, q))
        rivals = chunk, Rival("inverse per call", without_graph(original_of(state)))
        yield Case(
            f"resonance {batch}×{heads}×{width}²", size(state, filtered), "float32", (Rival("so8t", filtered), *rivals)
        )


def chunk_of(state: Tensor) -> Callable[[], object]:
    """Return what reading and writing a chunk of tokens costs in matrix products."""
    q, k, v = (torch.randn(*state.shape[:2], TOKENS, state.shape[-1]) for _ in range(3))
    return lambda: ((q @ k.mT).tril() @ v + q @ state, state + k.mT @ v)


def original_of(state: Tensor) -> Callable[[], object]:
    """Return the original's filter: complex waves at the raw zeros, their inverse, a mask on rows, and back."""
    n = state.shape[-1]
    waves = torch.exp(2j * math.pi / n * torch.outer(torch.arange(n), zeta.zeros(n))).to(torch.complex64) / n**0.5

    def call() -> Tensor:
        modes = torch.linalg.inv(waves) @ state.to(torch.complex64) @ waves
        mask = modes.diagonal(dim1=-2, dim2=-1).abs() > 0.1
        return (waves @ (mask[..., None] * modes) @ torch.linalg.inv(waves)).real

    return call


def without_graph(function: Callable[[], object]) -> Callable[[], object]:
    """Return a function that runs without recording derivatives."""
    return torch.no_grad()(function)


def size(state: Tensor, call: Callable[[], object]) -> str:
    """Return the shape of the states and the peak of the bytes that one call allocates."""
    call()
    return f"{tuple(state.shape)}, peak {peak_bytes(call) / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(run("benchmarks.resonance"))
