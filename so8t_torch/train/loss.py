"""Cross-entropy of the supervised tokens without the full logits.

    nll_n = log Σ_v exp(z_nv) − z_n,y(n),   z_n = W_head h_n

n runs over the positions whose next token is supervised, in chunks of C: at any time one (C, V) block of logits
exists instead of (B, T, V). Each block is recomputed in the backward pass, so no block is kept either. It is computed
where the model calls its head: there a head whose weight is in shards over the processes is whole. A head that is no
part of the model computes it behind the forward pass.
Symbols: h hidden states after the last norm, V vocabulary, y(n) the next token. Cost: 6 N D V operations with the
recomputation, memory C V in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from so8t_torch.core.errors import TrainingError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.data.chat import IGNORED


class Watch(Protocol):
    """Sees the logits of one forward pass while each block exists; it must keep no block."""

    def begin(self, rows: Tensor, positions: Tensor, labels: Tensor, shape: tuple[int, int]) -> None:
        """Learn where the supervised tokens stand: row and position of each, the token, and the batch's (B, T)."""

    def chunk(self, logits: Tensor, labels: Tensor, nll: Tensor) -> None:
        """Look at one block of logits (C, V), in order; a block that is recomputed for its gradient comes again."""


def supervised_nll(
    hidden: Float[Tensor, "b t d"],
    labels: Int[Tensor, "b t"],
    head: nn.Module,
    *,
    chunk: int,
    watch: Watch | None = None,
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the negative log-likelihood of every supervised token, and the row it stands in.

    Args:
        hidden: states that the head turns into logits.
        labels: token to learn at each position, ``IGNORED`` elsewhere; position 0 has no predecessor and is left out.
        head: module from hidden states to logits.
        chunk: number of positions whose logits exist at once.
        watch: sees each block of logits; no other one is computed for it.

    Returns:
        Values in nats, in the order of the supervised positions, and their row indices.
    """
    # positions are looked up once: each look-up makes a device wait for the host
    rows, places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    states = hidden[rows, places].to(_input_dtype(head, hidden.dtype))
    targets = labels[rows, places + 1]
    if watch is not None:
        watch.begin(rows, places + 1, targets, (labels.shape[0], labels.shape[1]))
    parts = zip(states.split(chunk), targets.split(chunk), strict=True)
    nll = [checkpoint(_chunk_nll, s, t, head, watch, use_reentrant=False, preserve_rng_state=False) for s, t in parts]
    return torch.cat(nll), rows


@dataclass
class Supervised:
    """The losses of one forward pass in nats, and the row each stands in; filled when the model calls its head."""

    labels: Int[Tensor, "b t"]
    states: Mapping[int, Tensor]
    watch: Watch | None = None
    nll: Tensor | None = None
    rows: Tensor | None = None

    def result(self) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """Return values and rows.

        Raises:
            TrainingError: the model never called its head.
        """
        if self.nll is None or self.rows is None:
            raise TrainingError("The model's forward pass did not call its output embedding; there is no loss.")
        return self.nll, self.rows


class LossAtHead:
    """Puts the supervised losses in the place of the head's output, during chosen forward passes.

    Args:
        head: the model's output embedding.
        key: under which the states that go into the head are found.
        chunk: number of positions whose logits exist at once.
        called: whether the model's forward pass calls it.
    """

    def __init__(self, head: nn.Module, key: int, *, chunk: int, called: bool = True) -> None:
        self._called = called
        self._key, self._chunk, self._head = key, chunk, head
        self._open: Supervised | None = None
        # Shards register their own hooks later and see the losses as the head's output: what gathers the weight again
        # for the backward pass hangs on them.
        head.register_forward_hook(self._replace)

    @contextmanager
    def open(
        self, labels: Int[Tensor, "b t"], states: Mapping[int, Tensor], watch: Watch | None = None
    ) -> Iterator[Supervised]:
        """Collect the losses of the forward pass inside the block.

        Args:
            labels: token to learn at each position.
            states: holds the head's whole input by the time it is called.
            watch: sees the logits of this pass.
        """
        self._open = Supervised(labels, states, watch)
        try:
            yield self._open
            if self._open.nll is None and not self._called:
                self._compute(self._open)
        finally:
            self._open = None

    def _replace(self, head: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        del head, inputs
        if self._open is None:
            return output
        return self._compute(self._open)

    def _compute(self, now: Supervised) -> Tensor:
        hidden = now.states[self._key]
        # the head computes in its own dtype, whatever the model runs in
        with torch.autocast(hidden.device.type, enabled=False):
            now.nll, now.rows = supervised_nll(hidden, now.labels, self._head, chunk=self._chunk, watch=now.watch)
        return now.nll


def row_sums(values: Float[Tensor, " n"], rows: Int[Tensor, " n"], count: int) -> Float[Tensor, "b 2"]:
    """Return, for each of ``count`` rows, the sum of its values and how many there are, in float64."""
    pairs = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)], dim=1)
    return torch.zeros(count, 2, dtype=torch.float64, device=values.device).index_add_(0, rows, pairs)


def _chunk_nll(states: Tensor, targets: Tensor, head: nn.Module, watch: Watch | None) -> Tensor:
    # not a call: the hooks of one count it as another use of the head, and one of them computes this loss
    logits = head.forward(states)
    nll = functional.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), targets, reduction="none")
    if watch is not None:
        watch.chunk(logits.detach(), targets, nll.detach())
    return nll


def _input_dtype(head: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype the head computes in; a quantised head takes what it is given."""
    weight = next(head.parameters())
    return weight.dtype if weight.dtype.is_floating_point else default
