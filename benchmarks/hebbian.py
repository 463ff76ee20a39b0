"""Claim: fast weights in chunks train many times faster on a CPU than token by token, and than causal attention.

The shape is (1, T, 8, 64), float32, one decay and one strength per token and head, keys as they are (normalised
beforehand for all). Rivals: the step loop, in plain PyTorch with automatic differentiation; the naive recurrence of
flash-linear-attention's ``simple_gla`` as its definition reads, heads before tokens, written here; and PyTorch's scaled
dot-product attention, causal. Flat means that 65,536 tokens in one call cost at most 1.2 times what 64 calls of 1,024
tokens do. Peaks of PyTorch's allocator are printed below the times.

Run: python -m benchmarks.hebbian
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from benchmarks.allocation import peak_bytes
from benchmarks.harness import Case, Rival, run
from so8t_torch.ops.hebbian import hebbian

COMPONENT = "hebbian"
ROOM = "hebbian"
HEADS, WIDTH = 8, 64
LOOPS = {512: (25.0, 5), 2048: (50.0, 4)}
"""Tokens → least ratio to the step loop, and repetitions."""
SHORT, LONG = 1024, 65_536
Mix = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def cases() -> Iterator[Case]:
    """Yield forward and backward passes beside rivals, the delta rule, and long beside short."""
    for tokens, (must, repeats) in LOOPS.items():
        given = drawn(tokens)
        rivals = (
            Rival("so8t", step(ours, given)),
            Rival("step loop", step(loop, given), must),
            Rival("simple_gla, naive recurrence", step(naive, given)),
        )
        yield Case("forward + backward", f"1×{tokens}×{HEADS}×{WIDTH}", "float32", rivals, repeats)
    given = drawn(2048)
    attention = (Rival("so8t", step(ours, given)), Rival("causal attention (SDPA)", step(attend, given), 2.0))
    yield Case("forward + backward, attention", f"1×2048×{HEADS}×{WIDTH}", "float32", attention, repeats=9)
    given = drawn(512)
    delta = partial(loop, delta=True)
    yield Case(
        "delta rule, forward + backward", f"1×512×{HEADS}×{WIDTH}", "float32",
        (Rival("so8t", step(partial(ours, rule="delta"), given)), Rival("step loop", step(delta, given))), repeats=4,
    )  # fmt: skip
    long, short = drawn(LONG), drawn(SHORT)
    flat = (
        Rival("so8t, one call", step(ours, long)),
        Rival(f"so8t, {LONG // SHORT} calls of {SHORT} tokens", repeated(step(ours, short)), 1 / 1.2),
    )
    yield Case("flat in length", f"1×{LONG}×{HEADS}×{WIDTH}", "float32", flat, repeats=4)


def drawn(tokens: int) -> list[Tensor]:
    """Return queries, keys of norm one, values, decay rates and strengths."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, HEADS, WIDTH, generator=generator) for _ in range(3))
    decay, eta = (torch.rand(1, tokens, HEADS, generator=generator) for _ in range(2))
    return [q, normalize(k, dim=-1), v, 0.1 * decay, eta]


def ours(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, eta: Tensor, rule: str = "hebb") -> Tensor:
    """Run the fast weights of this library."""
    return hebbian(q, k, v, decay, eta, rule=rule, key_norm="none")[0]  # type: ignore[arg-type]


def loop(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, eta: Tensor, delta: bool = False) -> Tensor:
    """Run one step per token, differentiated automatically."""
    state, retention = q.new_zeros(q.shape[0], HEADS, WIDTH, WIDTH), (-decay).exp()
    rows = []
    for t in range(q.shape[1]):
        kept, value = retention[:, t, :, None, None] * state, v[:, t]
        if delta:
            value = value - torch.einsum("bhkv,bhk->bhv", kept, k[:, t])
        state = kept + (eta[:, t, :, None] * k[:, t])[..., None] * value[:, :, None, :]
        rows.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(rows, 1)


def naive(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, eta: Tensor) -> Tensor:
    """Run the naive recurrence of simple_gla: S ← S e^g + kᵀ v, o = Σ_k q S, into a tensor made beforehand."""
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v * eta[..., None], -decay))
    out, state = torch.zeros_like(v), q.new_zeros(q.shape[0], HEADS, WIDTH, WIDTH)
    for t in range(q.shape[2]):
        state = state * g[:, :, t].exp()[..., None, None] + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out[:, :, t] = (q[:, :, t].unsqueeze(-1) * state).sum(-2)
    return out.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, eta: Tensor) -> Tensor:  # noqa: ARG001
    """Run causal attention."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def step(mix: Mix, given: list[Tensor]) -> Callable[[], object]:
    """Return one forward and backward pass."""
    grad = torch.randn(given[2].shape, generator=torch.Generator().manual_seed(1))
    leaves = [x.clone().requires_grad_() for x in given]
    return lambda: torch.autograd.grad(mix(*leaves), leaves, grad, allow_unused=True)


def repeated(call: Callable[[], object]) -> Callable[[], object]:
    """Return as many short calls as make up the long one."""

    def calls() -> None:
        for _ in range(LONG // SHORT):
            call()

    return calls


def peaks() -> Table:
    """Measure what a forward and backward pass allocates at its peak beyond its arguments, and the gradients' share."""
    table = Table(title=f"Peak of the allocator, forward + backward, 1×T×{HEADS}×{WIDTH} float32, MB")
    for column in ("tokens", "implementation", "peak", "gradients", "beyond"):
        table.add_column(column, justify="left" if column == "implementation" else "right")
    for tokens in LOOPS:
        given = drawn(tokens)
        due = sum(x.nbytes for x in given)
        for name, mix in (("so8t", ours), ("step loop", loop), ("causal attention (SDPA)", attend)):
            call = step(mix, given)
            call()
            peak = peak_bytes(call)
            table.add_row(str(tokens), name, *(f"{value / 1e6:.2f}" for value in (peak, due, peak - due)))
    return table


if __name__ == "__main__":
    status = run("benchmarks.hebbian")
    if "--child" not in sys.argv:
        Console(width=150).print(peaks())
    sys.exit(status)
