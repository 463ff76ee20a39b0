"""Claim: h_t = a_t h_{t−1} + b_t on a CPU is faster than every scan that PyTorch offers, and its cost per token flat.

The shape is (1, 4096, 512), float32. Rivals: the ``associative_scan`` of PyTorch; the two sweeps over a binary tree of
``accelerated_scan.ref``, in its layout (B, C, T), written here; the two cumulative sums of logarithms of Heinsen
(complex, because inputs have signs); and ``jax.lax.scan``, compiled, where JAX is installed: the goal is at most twice
its time. Flat means that 65,536 tokens in one call cost at most 1.2 times what 64 calls of 1,024 tokens do. Peaks of
PyTorch's allocator are printed below the times.

Run: python -m benchmarks.linear_recurrence
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
from torch._higher_order_ops.associative_scan import associative_scan

from benchmarks.allocation import peak_bytes
from benchmarks.harness import Case, Rival, run
from so8t_torch.ops.linear_recurrence import linear_recurrence

COMPONENT = "linear_recurrence"
ROOM = "linear_recurrence"
TOKENS, WIDTH = 4096, 512
SHORT, LONG = 1024, 65_536
Scan = Callable[[Tensor, Tensor], Tensor]


def cases() -> Iterator[Case]:
    """Yield the recurrence beside its rivals, forward and with gradients, and long beside short."""
    a, b, grad = drawn(TOKENS)
    shape = f"1×{TOKENS}×{WIDTH}"
    forward = [
        Rival("so8t", lambda: ours(a, b)),
        Rival("torch associative_scan", lambda: pytorch(a, b), 3.0),
        Rival("tree of accelerated_scan.ref", prepared(tree, a, b), 5.0),
    ]
    if find_spec("jax") is not None:
        forward.append(Rival("jax.lax.scan, compiled", jax_scan(a, b), 0.5))
    yield Case("forward", shape, "float32", tuple(forward))
    slow = (Rival("so8t", lambda: ours(a, b)), Rival("Heinsen, logarithms", lambda: heinsen(a, b), 50.0))
    yield Case("forward, logarithms", shape, "float32", slow, repeats=4)
    both = (Rival("so8t", step(ours, a, b, grad)), Rival("torch associative_scan", step(pytorch, a, b, grad), 2.5))
    yield Case("forward + backward", shape, "float32", both)
    long, short = drawn(LONG), drawn(SHORT)
    flat = (
        Rival("so8t, one call", lambda: ours(*long[:2])),
        Rival(f"so8t, {LONG // SHORT} calls of {SHORT} tokens", repeated(ours, *short[:2]), 1 / 1.2),
    )
    yield Case("flat in length", f"1×{LONG}×{WIDTH}", "float32", flat, repeats=5)


def drawn(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return decays in (0.8, 1), inputs and a gradient."""
    generator = torch.Generator().manual_seed(0)
    a = 0.8 + 0.2 * torch.rand(1, tokens, WIDTH, generator=generator)
    b, grad = (torch.randn(1, tokens, WIDTH, generator=generator) for _ in range(2))
    return a, b, grad


def ours(a: Tensor, b: Tensor) -> Tensor:
    """Run the recurrence of this library."""
    return linear_recurrence(a, b)[0]


def pytorch(a: Tensor, b: Tensor) -> Tensor:
    """Run PyTorch's scan over pairs (product of multipliers, state)."""
    pair = associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), 1, combine_mode="generic")
    return pair[1]


def tree(a: Tensor, b: Tensor) -> Tensor:
    """Return the states (B, C, T), T a power of two, by an up-sweep and a down-sweep over a binary tree of tokens."""
    return _before(a, b)[1] * a + b


def _before(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (product of multipliers, state) of everything before each token."""
    left_a, right_a, left_b, right_b = a[..., ::2], a[..., 1::2], b[..., ::2], b[..., 1::2]
    above = left_a * right_a, right_a * left_b + right_b
    product, state = _before(*above) if b.shape[-1] > 2 else (torch.ones_like(left_a), torch.zeros_like(left_b))
    lefts, rights = (product, state), (product * left_a, state * left_a + left_b)
    return tuple(torch.stack(pair, -1).flatten(-2) for pair in zip(lefts, rights, strict=True))


def prepared(scan: Scan, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """Return a call of a scan on (B, C, T), whose arguments were transposed beforehand."""
    multipliers, inputs = (x.transpose(1, 2).contiguous() for x in (a, b))
    return lambda: scan(multipliers, inputs)


def heinsen(a: Tensor, b: Tensor) -> Tensor:
    """Return e^A Σ e^{log b − A} with A = Σ log a, by cumulative sums and log-sum-exps of logarithms."""
    logs = a.log().cumsum(1)
    return (logs + torch.logcumsumexp(b.to(torch.complex64).log() - logs, 1)).exp().real


def jax_scan(a: Tensor, b: Tensor) -> Callable[[], object]:
    """Return a call of the compiled step loop of JAX on the same numbers."""
    import jax
    import jax.numpy as jnp

    rows = tuple(jnp.asarray(x[0].numpy()) for x in (a, b))

    def advance(h: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = row[0] * h + row[1]
        return h, h

    compiled = jax.jit(lambda x, y: jax.lax.scan(advance, jnp.zeros(WIDTH), (x, y))[1])
    return lambda: compiled(*rows).block_until_ready()


def step(scan: Scan, a: Tensor, b: Tensor, grad: Tensor) -> Callable[[], object]:
    """Return one forward and backward pass."""
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    return lambda: torch.autograd.grad(scan(*leaves), leaves, grad)


def repeated(scan: Scan, a: Tensor, b: Tensor) -> Callable[[], object]:
    """Return as many short calls as make up the long one."""

    def calls() -> None:
        for _ in range(LONG // SHORT):
            scan(a, b)

    return calls


def peaks() -> Table:
    """Measure what each pass allocates at its peak beyond its arguments, next to what it returns."""
    table = Table(title=f"Peak of the allocator at 1×{TOKENS}×{WIDTH} float32, MB")
    for column in ("pass", "implementation", "peak", "results", "beyond"):
        table.add_column(column, justify="left" if column in ("pass", "implementation") else "right")
    a, b, grad = drawn(TOKENS)
    size = 4 * TOKENS * WIDTH
    for name, scan in (("so8t", ours), ("torch associative_scan", pytorch)):
        passes = (
            ("forward", partial(scan, a, b), size),
            ("forward + backward", step(scan, a, b, grad), 3 * size),
        )
        for what, call, due in passes:
            call()
            peak = peak_bytes(call)
            table.add_row(what, name, *(f"{value / 1e6:.2f}" for value in (peak, due, peak - due)))
    return table


if __name__ == "__main__":
    status = run("benchmarks.linear_recurrence")
    if "--child" not in sys.argv:
        Console(width=150).print(peaks())
    sys.exit(status)
