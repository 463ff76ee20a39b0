"""Claim: a tensor-train embedding is faster than its peers and than a dense table with its dense gradient.

The shape is Phi-3.5-mini's: V = 32 064 ids, D = 3072, 4096 tokens drawn by Zipf's law, rank 16, float32, forward and
backward. tensorly-torch needs vocabularies that are exact products: it gets the next larger one, with cores of our
sizes. The tied head is timed beside the dense product with cross-entropy of the same table; that one has no goal in
time, because its gain is memory: the peaks of the allocator are printed below, beside the bytes of the logits.

Run: python -m benchmarks.tensor_train
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding

from benchmarks.allocation import peak_bytes
from benchmarks.harness import Case, Rival, run
from so8t_torch.ops import tensor_train

COMPONENT = "tensor_train"
ROOM = "tensor_train"
VOCABULARY, TOKENS, WIDTH, RANK = 32_064, 4096, 3072, 16
HEAD_TOKENS = 256
SHAPES = {2: ((180, 180), (48, 64)), 3: ((32, 32, 32), (12, 16, 16))}
PEER = "tltorch blocktt"
GOALS = {(2, PEER): 1.2, (3, PEER): 2.5, (2, "nn.Embedding"): 1.5, (3, "nn.Embedding"): 1.5}


def cases() -> Iterator[Case]:
    """Yield embedding and head beside their peers."""
    torch.manual_seed(0)
    ids = zipf(TOKENS)
    grad = torch.randn(TOKENS, WIDTH)
    dense = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    for count in SHAPES:
        cores = train(count)
        ours = step(partial(tensor_train.rows, ids, *cores, vocab_size=VOCABULARY), cores, grad)
        rivals = [Rival(f"so8t, {count} cores", ours)]
        if find_spec("tltorch") is not None:
            table = tltorch_embedding(count)
            theirs = step(partial(table, ids), list(table.parameters()), grad)
            rivals.append(Rival(PEER, theirs, GOALS[count, PEER]))
        plain = step(partial(embedding, ids, dense), [dense], grad)
        rivals.append(Rival("nn.Embedding", plain, GOALS[count, "nn.Embedding"]))
        yield Case(f"{count} cores fwd+bwd", f"{TOKENS}×{WIDTH}", "float32", tuple(rivals))
    yield Case("tied head + loss fwd+bwd", f"{HEAD_TOKENS}×{VOCABULARY}", "float32", head_rivals(dense), repeats=3)


def zipf(tokens: int) -> Tensor:
    """Draw ids whose frequency falls as 1/rank, as those of a text do."""
    return torch.multinomial(1.0 / torch.arange(1, VOCABULARY + 1), tokens, replacement=True)


def train(count: int) -> list[Tensor]:
    """Return trainable cores of the shape of the claim."""
    ranks = (1, *(RANK for _ in range(count - 1)), 1)
    shapes = zip(ranks, ranks[1:], *SHAPES[count], strict=False)
    return [torch.nn.Parameter(torch.randn(v, left, right, d) * 0.3) for left, right, v, d in shapes]


def tltorch_embedding(count: int) -> torch.nn.Module:
    """Return tensorly-torch's factorised embedding with cores of the same sizes."""
    from tltorch import FactorizedEmbedding

    ids, features = SHAPES[count]
    rows = torch.tensor(ids).prod().item()
    return FactorizedEmbedding(
        rows, WIDTH, auto_tensorize=False, tensorized_num_embeddings=ids, tensorized_embedding_dim=features,
        factorization="blocktt", rank=RANK,
    )  # fmt: skip


def step(forward: Callable[[], Tensor], parameters: list[Tensor], grad: Tensor) -> Callable[[], object]:
    """Return one forward and backward pass that starts without gradients."""

    def once() -> None:
        for parameter in parameters:
            parameter.grad = None
        forward().backward(grad)

    return once


def head_rivals(dense: Tensor) -> tuple[Rival, ...]:
    """Return the fused tied head and the dense head, each with cross-entropy and all gradients."""
    hidden = torch.nn.Parameter(torch.randn(HEAD_TOKENS, WIDTH) / WIDTH**0.5)
    targets = zipf(HEAD_TOKENS)
    cores = train(2)
    ones = torch.ones(HEAD_TOKENS)

    def fused() -> Tensor:
        return tensor_train.cross_entropy(hidden, targets, *cores, vocab_size=VOCABULARY)

    def plain() -> Tensor:
        return cross_entropy(hidden @ dense.T, targets, reduction="none")

    return (
        Rival("so8t, 2 cores", step(fused, [hidden, *cores], ones)),
        Rival("dense head", step(plain, [hidden, dense], ones)),
    )


def peaks() -> Table:
    """Measure what each pass allocates at its peak beyond inputs, next to what it must return."""
    table = Table(title="Peak of the allocator, MB")
    for column in ("pass", "implementation", "peak", "output and gradients", "beyond"):
        table.add_column(column, justify="left" if column in ("pass", "implementation") else "right")
    for name, implementation, call, due in _passes():
        peak = peak_bytes(call)
        table.add_row(name, implementation, *(f"{value / 1e6:.2f}" for value in (peak, due, peak - due)))
    return table


def _passes() -> Iterator[tuple[str, str, Callable[[], object], int]]:
    ids, grad = zipf(TOKENS), torch.randn(TOKENS, WIDTH)
    for count in SHAPES:
        cores = train(count)
        due = 4 * (TOKENS * WIDTH + sum(core.numel() for core in cores))
        ours = step(partial(tensor_train.rows, ids, *cores, vocab_size=VOCABULARY), cores, grad)
        ours()
        yield f"{count} cores fwd+bwd", "so8t", ours, due
        if find_spec("tltorch") is not None:
            table = tltorch_embedding(count)
            theirs = step(partial(table, ids), list(table.parameters()), grad)
            yield f"{count} cores fwd+bwd", PEER, theirs, due
    logits = 4 * HEAD_TOKENS * VOCABULARY
    dense = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    for rival in head_rivals(dense):
        own = 4 * (HEAD_TOKENS * WIDTH + (dense.numel() if rival.name == "dense head" else sum(map(_size, train(2)))))
        yield f"tied head + loss fwd+bwd (logits: {logits / 1e6:.2f})", rival.name, rival.run, own


def _size(tensor: Tensor) -> int:
    return tensor.numel()


if __name__ == "__main__":
    status = run("benchmarks.tensor_train")
    if "--child" not in sys.argv:
        Console(width=150).print(peaks())
    sys.exit(status)
