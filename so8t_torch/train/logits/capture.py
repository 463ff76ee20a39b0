"""Takes the logits of one forward pass out of the chunked loss while each block exists.

Nothing is computed twice: the blocks are the loss's own, and log Σ exp comes from it, logsumexp = nll + z_label. What
is kept is small (top-k) or the block itself (full), which nobody else holds: the backward pass computes it again. It
leaves the device without waiting for it.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from so8t_torch.train.logits.record import LogitsRecord, Mode


class Capture:
    """Watches one forward pass; a later one replaces what an earlier one gave.

    Args:
        step: optimiser step, counted from 1.
        epoch: counted from 0.
        mode: ``topk`` or ``full``.
        top_k: how many logits are kept of each position in mode ``topk``; all of a smaller vocabulary.
        dtype: of the kept logits.
    """

    def __init__(self, step: int, epoch: int, *, mode: Mode, top_k: int, dtype: torch.dtype) -> None:
        self.step, self.epoch, self._mode, self._top_k, self._dtype = step, epoch, mode, top_k, dtype
        self.problem: str | None = None
        self._expected, self._seen = -1, 0

    def begin(self, rows: Tensor, positions: Tensor, labels: Tensor, shape: tuple[int, int]) -> None:
        """Forget an earlier pass; the positions of this one are known."""
        self._shape, self._expected, self._seen = list(shape), labels.numel(), 0
        places = {"labels": labels, "rows": rows.int(), "positions": positions.int()}
        self._places = {name: _leave(value) for name, value in places.items()}
        self._parts: list[dict[str, Tensor]] = []

    def chunk(self, logits: Tensor, labels: Tensor, nll: Tensor) -> None:
        """Keep what the mode asks for of one block; blocks recomputed in the backward pass are passed over.

        Saving must never end a run: where memory does not suffice, this record is given up and ``problem`` says so.
        """
        if self._seen == self._expected or self.problem is not None:
            return
        try:
            with torch.no_grad():
                self._parts.append(self._keep(logits, labels, nll))
        except (RuntimeError, MemoryError) as error:
            self.problem, self._parts = f"{type(error).__name__}: {error}", []
            return
        self._seen += labels.numel()
        if self._seen == self._expected:
            self._vocabulary, self._computed = logits.shape[-1], logits.dtype
            self._copied = torch.cuda.Event() if logits.is_cuda else None
            if self._copied is not None:
                self._copied.record()

    def _keep(self, logits: Tensor, labels: Tensor, nll: Tensor) -> dict[str, Tensor]:
        at_label = logits.gather(1, labels[:, None])[:, 0].to(nll.dtype)
        kept = {"logsumexp": (nll + at_label).float(), "label_logits": at_label.float()}
        if self._mode == "full":
            kept["logits"] = logits.to(self._dtype)
        else:
            values, ids = _largest(logits, min(self._top_k, logits.shape[-1]))
            kept |= {"values": values.to(self._dtype), "ids": ids.int()}
        return {name: _leave(value) for name, value in kept.items()}

    @property
    def complete(self) -> bool:
        """Whether every position of the pass was seen."""
        return self.problem is None and self._seen == self._expected

    def record(self) -> LogitsRecord:
        """Return the record, stamped with the present time; waits until the copies have left the device."""
        if self._copied is not None:
            self._copied.synchronize()
        tensors = self._places | {name: _joined([part[name] for part in self._parts]) for name in self._parts[0]}
        return LogitsRecord(
            tensors,
            self._mode,
            self.step,
            self.epoch,
            time.strftime("%Y%m%d_%H%M%S"),
            self._shape,
            [self._expected, self._vocabulary],
            str(self._computed),
        )


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest logits of each row in falling order, and their ids."""
    if logits.is_cuda or logits.dtype != torch.float32 or 64 * count <= logits.shape[-1]:
        return logits.topk(count)
    # where the share is that large, torch selects on a CPU four times slower than numpy
    split = np.argpartition(logits.numpy(), logits.shape[-1] - count, axis=1)
    ids = torch.from_numpy(split[:, -count:].copy())
    values, order = logits.gather(1, ids).sort(1, descending=True)
    return values, ids.gather(1, order)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _leave(value: Tensor) -> Tensor:
    return value.to("cpu", non_blocking=True)
