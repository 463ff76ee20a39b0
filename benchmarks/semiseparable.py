"""Claims: closed rank channels are not paid for, a token costs the same in any length, and attention costs more.

The operator runs on (1, 4096, 512), float32, in chunks of 32 with 64 or 128 rank channels. With the upper half of the
channels closed at all tokens, by gates of zero, it takes at most 0.65 of the time. Flat means that 65,536 tokens in one
call cost at most 1.2 times what 64 calls of 1,024 tokens do. Rivals: causal attention of PyTorch with heads of 64; the
operator through the full N×N matrix of weights, without decays; one step per token in PyTorch. Peaks of PyTorch's
allocator are printed below the times.

Run: python -m benchmarks.semiseparable
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.allocation import peak_bytes
from benchmarks.harness import Case, Rival, run
from so8t_torch.ops.semiseparable import operator

COMPONENT = "semiseparable"
ROOM = "semiseparable"
TOKENS, WIDTH, HEAD, CHUNK = 4096, 512, 64, 32
SHORT, LONG = 1024, 65_536
RANKS = (64, 128)
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def cases() -> Iterator[Case]:
    """Yield open beside closed channels, the operator beside its rivals, and long beside short."""
    for rank in RANKS:
        shape = f"1×{TOKENS}×{WIDTH}, R={rank}"
        given = drawn(TOKENS, rank)
        rivals: tuple[Rival, ...] = (
            Rival("so8t, half of them closed", forward(*closed(given))),
            Rival("so8t, all open", forward(*given), 1 / 0.65),
        )
        yield Case("closed channels", shape, "float32", rivals)
    given, shape = drawn(TOKENS, RANKS[0]), f"1×{TOKENS}×{WIDTH}, R={RANKS[0]}"
    rivals = (
        Rival("so8t", forward(*given)),
        Rival("causal attention", attention()),
        Rival("full matrix, no decay", full_matrix(*given)),
    )
    yield Case("forward", shape, "float32", rivals, repeats=5)
    slow = (Rival("so8t", forward(*given)), Rival("one step per token", forward(*given, backend="eager")))
    yield Case("forward, loop", shape, "float32", slow, repeats=4)
    both = (Rival("so8t", training(*given)), Rival("causal attention", attention(training=True)))
    yield Case("forward + backward", shape, "float32", both, repeats=4)
    long, short = drawn(LONG, RANKS[0]), drawn(SHORT, RANKS[0])
    flat = (
        Rival("so8t, one call", forward(*long)),
        Rival(f"so8t, {LONG // SHORT} calls of {SHORT} tokens", repeated(forward(*short)), 1 / 1.2),
    )
    yield Case("flat in length", f"1×{LONG}×{WIDTH}, R={RANKS[0]}", "float32", flat, repeats=4)


def drawn(tokens: int, rank: int) -> Four:
    """Return inputs, what is written and read, and decays in (0.9, 1)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, WIDTH, generator=generator)
    u, v = (torch.randn(1, tokens, rank, generator=generator) for _ in range(2))
    return x, u, v, 0.9 + 0.1 * torch.rand(1, tokens, rank, generator=generator)


def closed(given: Four) -> Four:
    """Return the same with gates of zero on the upper half of the rank channels."""
    x, u, v, decay = given
    gate = (torch.arange(u.shape[-1]) < u.shape[-1] // 2).to(u.dtype)
    return x, u * gate, v * gate, decay


def forward(x: Tensor, u: Tensor, v: Tensor, decay: Tensor, backend: str = "auto") -> Callable[[], object]:
    """Return a call of the operator without gradients."""

    def call() -> Tensor:
        with torch.no_grad():
            return operator(x, u, v, decay, chunk=CHUNK, backend=backend)[0]

    return call


def training(*given: Tensor) -> Callable[[], object]:
    """Return a call of the operator and the gradients of everything."""
    leaves = [z.clone().requires_grad_() for z in given]
    grad = torch.ones_like(leaves[0])

    def call() -> object:
        x, u, v, decay = leaves
        return torch.autograd.grad(operator(x, u, v, decay, chunk=CHUNK)[0], leaves, grad)

    return call


def attention(training: bool = False) -> Callable[[], object]:
    """Return a call of causal attention on the same width."""
    generator = torch.Generator().manual_seed(0)
    shape = 1, WIDTH // HEAD, TOKENS, HEAD
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_(training) for _ in range(3))
    grad = torch.ones(shape)

    def call() -> object:
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(y, (q, k, v), grad) if training else y

    return call


def full_matrix(x: Tensor, u: Tensor, v: Tensor, _: Tensor) -> Callable[[], object]:
    """Return a call that builds tril(V Uᵀ) and applies it."""
    return lambda: (v @ u.mT).tril() @ x


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    """Return a call that does as many tokens as the long one."""
    return lambda: [call() for _ in range(LONG // SHORT)]


def print_peaks() -> None:
    """Print the largest amount of memory that PyTorch holds at a time beyond the arguments."""
    table = Table(title="peak of PyTorch's allocator, MiB")
    for column in ("case", "so8t", "rival"):
        table.add_column(column, justify="left" if column == "case" else "right")
    given = drawn(TOKENS, RANKS[0])
    for name, ours, theirs in (
        ("forward, beside the full matrix", forward(*given), full_matrix(*given)),
        ("forward + backward, beside attention", training(*given), attention(training=True)),
    ):
        table.add_row(name, *(f"{peak_bytes(call) / 2**20:.1f}" for call in (ours, theirs)))
    Console(width=150).print(table)


if __name__ == "__main__":
    status = run("benchmarks.semiseparable")
    if "--child" not in sys.argv:
        print_peaks()
    sys.exit(status)
