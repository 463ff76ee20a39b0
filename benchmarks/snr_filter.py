"""The filter of noise at a chunk boundary, beside the chunk itself and medians found by sorting.

``python -m benchmarks.snr_filter`` prints the table and writes ``docs/bench/snr_filter-cpu.json`` and ``.png``. The
chunk is what 64 tokens cost that read from and write to the same states by matrix products. The medians by sorting are
those of the noise alone, without the rest of the filter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, Rival, run
from benchmarks.resonance import SIZES, TOKENS, chunk_of, size, without_graph
from so8t_torch.ops import snr_filter

COMPONENT = "snr_filter"
ROOM = "snr_filter"


def cases() -> Iterator[Case]:
    """Yield the filter for every batch, number of heads and width of a head."""
    torch.manual_seed(0)
    for batch, heads, width in SIZES:
        state = torch.randn(batch, heads, width, width)
        rates = torch.full((batch, TOKENS, heads), 0.1)
        filtered = without_graph(partial(snr_filter.snr_filter, state, rates, rates))
        rivals = (
            Rival("so8t", filtered),
            Rival("chunk of 64 tokens", without_graph(chunk_of(state))),
            Rival("medians by sorting", without_graph(sorted_medians_of(state))),
        )
        yield Case(f"snr filter {batch}×{heads}×{width}²", size(state, filtered), "float32", rivals)


def sorted_medians_of(state: Tensor) -> Callable[[], object]:
    """Return the two medians of the noise by sorting."""

    def median(x: Tensor) -> Tensor:
        ordered, half = x.sort(-1).values, x.shape[-1] // 2
        return (ordered[..., half - 1, None] + ordered[..., half, None]) / 2.0

    entries = state.flatten(-2)
    return lambda: median((entries - median(entries)).abs())


if __name__ == "__main__":
    sys.exit(run("benchmarks.snr_filter"))
