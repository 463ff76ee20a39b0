"""Training steps of the presets beside the same weights in step loops: tokens per second and peak memory.

The loop model is the plain form: every recurrence token by token through autograd, rows of a tensor train gathered and
contracted by einsum, a table made of the train for a head tied to it, logits whole. Both give the same loss, or nothing
is measured. Times are CPU time of one thread, the least of some steps after one that does not count; the body alone
(forward and backward without head) tells what share of a step the head takes. A loop that would take longer than
``--longest-loop`` seconds or more than ``--loop-gigabytes``, by what it took at the length before, is left out.

    python -m benchmarks.step_loops [--models NAME …] [--lengths 512 2048 …] [--batches 1 4]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.allocation import peak_bytes
from benchmarks.harness import RESULTS, environment
from benchmarks.language_models import seconds
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.ops import semiseparable

MODELS: dict[str, tuple[Callable[..., PreTrainedModel], dict[str, object]]] = {
    "Phase 2 small": (create_phase2_model, {"preset": "small"}),
    "Phase 2 small, tensor train": (create_phase2_model, {"preset": "small", "embedding": "tt"}),
    "Phase 2 small, tied train": (
        create_phase2_model, {"preset": "small", "embedding": "tt", "tie_word_embeddings": True},
    ),
    "Phase 2 small, bytes": (create_phase2_model, {"preset": "small", "embedding": "tt", "vocab_size": 256}),
    "Phase 1 max_efficiency": (create_phase1_model, {"preset": "max_efficiency"}),
    "Phase 1 24gb": (create_phase1_model, {"preset": "24gb"}),
    "Phase 1 24gb, bytes": (create_phase1_model, {"preset": "24gb", "vocab_size": 256}),
}  # fmt: skip
"""What is compared: a preset as it is, or with few changes."""


@dataclass(frozen=True)
class Side:
    """A training step of one of the two; seconds of CPU time, bytes of the allocator."""

    seconds: float
    body_seconds: float
    peak: int


@dataclass(frozen=True)
class Row:
    """Both sides at a size; no loop where it would take too long."""

    model: str
    batch: int
    length: int
    ours: Side
    loop: Side | None


class Gathered(nn.Module):
    """Rows of a tensor train of two cores as indexing and einsum give them."""

    def __init__(self, embedding: HolographicTTEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the rows of ids."""
        places = self.embedding.id_permutation[input_ids]
        first, second = self.embedding.core1, self.embedding.core2
        left, right = first[places // len(second)][..., 0, :, :], second[places % len(second)][..., 0, :]
        product = torch.einsum("btra,r,btrc->btac", left, self.embedding.phase_shift.cos(), right)
        return product.flatten(-2)[..., : self.embedding.d_model]


class GatheredHead(nn.Module):
    """Logits from all rows of a tensor train, as a table."""

    def __init__(self, rows: Gathered, vocabulary: int) -> None:
        super().__init__()
        self.rows, self.vocabulary = rows, vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states."""
        return hidden @ self.rows(torch.arange(self.vocabulary)[None])[0].mT


def pair(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model, and the same weights in step loops.

    Args:
        name: one of ``MODELS``.
    """
    make, settings = MODELS[name]
    ours, theirs = (make(**settings, dropout=0.0, seed=0, backend=backend).train() for backend in ("auto", "eager"))
    theirs.load_state_dict(ours.state_dict())
    if isinstance(theirs.model.embed_tokens, HolographicTTEmbedding):
        theirs.model.embed_tokens = Gathered(theirs.model.embed_tokens)
    if theirs.lm_head is None:
        theirs.lm_head = GatheredHead(theirs.model.embed_tokens, ours.config.vocab_size)
    return ours, theirs


def looping() -> AbstractContextManager[object]:
    """Return a context in which the semiseparable mixer of Phase 1, which has no option for it, goes step by step."""
    return patch.object(semiseparable, "operator", partial(semiseparable.operator, backend="eager"))


def loss(model: PreTrainedModel, rows: Tensor, *, loop: bool) -> Callable[[], Tensor]:
    """Return what computes the loss of rows of tokens, with logits in a loop and without them else."""
    return lambda: model(input_ids=rows, labels=rows, skip_logits=not loop).loss


def step(model: PreTrainedModel, run: Callable[[], Tensor], context: AbstractContextManager[object]) -> float:
    """Take a training step, and return its loss."""
    model.zero_grad(set_to_none=True)
    with context:
        found = run()
        found.backward()
    return float(found.detach())


def side(model: PreTrainedModel, rows: Tensor, *, loop: bool, repeats: int) -> Side:
    """Measure one of the two.

    Args:
        model: to be trained.
        rows: tokens (B, T).
        loop: whether it is the one in loops, which has its logits whole.
        repeats: steps that are timed.
    """

    def body() -> Tensor:
        return model.model(input_ids=rows, use_cache=False).last_hidden_state.square().mean()

    def taken(run: Callable[[], Tensor]) -> Callable[[], float]:
        return lambda: step(model, run, looping() if loop else nullcontext())

    whole = taken(loss(model, rows, loop=loop))
    return Side(seconds(whole, repeats), seconds(taken(body), repeats), peak_bytes(whole))


def measured(name: str, batch: int, lengths: list[int], options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of a model and a batch, shortest first."""
    ours, theirs = pair(name)
    before: Row | None = None
    for length in sorted(lengths):
        tokens = torch.Generator().manual_seed(0)
        rows = torch.randint(ours.config.vocab_size, (batch, length), generator=tokens)
        affordable = True
        if before is not None:
            grown = length / before.length
            affordable = before.loop is not None and (
                before.loop.seconds * grown <= options.longest_loop
                and before.loop.peak * grown <= options.loop_gigabytes * 1e9
            )
        if affordable:
            losses = (
                step(ours, loss(ours, rows, loop=False), nullcontext()),
                step(theirs, loss(theirs, rows, loop=True), looping()),
            )
            torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
        fast = side(ours, rows, loop=False, repeats=options.repeats)
        slow = side(theirs, rows, loop=True, repeats=min(2, options.repeats)) if affordable else None
        before = Row(name, batch, length, fast, slow)
        yield before


def table(rows: list[Row]) -> Table:
    """Return the table of rows."""
    names = ("model", "rows × tokens", "tokens/s", "in loops", "times as fast", "head's share", "without head")
    found = Table(*names, "peak MB", "in loops", "share", title="training steps beside step loops")
    for row in rows:
        ours, loop, tokens = row.ours, row.loop, row.batch * row.length
        head = f"{1 - ours.body_seconds / ours.seconds:.0%}"
        size, speed, peak = f"{row.batch} × {row.length:,}", f"{tokens / ours.seconds:,.0f}", f"{ours.peak / 1e6:,.0f}"
        if loop is None:
            found.add_row(row.model, size, speed, "–", "–", head, "–", peak, "–", "–")
            continue
        found.add_row(
            row.model, size, speed, f"{tokens / loop.seconds:,.0f}", f"{loop.seconds / ours.seconds:.1f}", head,
            f"{loop.body_seconds / ours.body_seconds:.1f}", peak, f"{loop.peak / 1e6:,.0f}",
            f"{ours.peak / loop.peak:.2f}",
        )  # fmt: skip
    return found


def row_of(data: dict[str, Any]) -> Row:
    """Return a row as it was written."""
    sides = {name: None if data[name] is None else Side(**data[name]) for name in ("ours", "loop")}
    return Row(**(data | sides))


def main() -> None:
    """Measure what was asked for, put each row beside those of the output folder as soon as it is there, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest-loop", type=float, default=180.0)
    parser.add_argument("--loop-gigabytes", type=float, default=4.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "step_loops-cpu.json"
    known = [row_of(row) for row in json.loads(file.read_text())["rows"]] if file.exists() else []
    for name in options.models:
        for batch in options.batches:
            for new in measured(name, batch, options.lengths, options):
                place = (new.model, new.batch, new.length)
                known = [row for row in known if (row.model, row.batch, row.length) != place] + [new]
                document = {"environment": environment(), "rows": [asdict(row) for row in known]}
                file.write_text(json.dumps(document, indent=1) + "\n")
    order = list(MODELS)
    known.sort(key=lambda row: (order.index(row.model), row.batch, row.length))
    Console(width=170).print(table(known))


if __name__ == "__main__":
    main()
