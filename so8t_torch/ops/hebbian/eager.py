"""Fast weights in PyTorch: a plain differentiable loop, and chunks of tokens as matrix products on the CPU.

    D_ts = e^{g_{s+1} + … + g_t}  for s ≤ t of one segment, else 0        g = −Γ = log a,  e_t = D_{t,−1}
    Y = ((Q Kᵀ) ∘ D) W + e ∘ (Q S)        S′ = e_C S + (K ∘ D_C)ᵀ W        W = η U
    hebb: U = V        delta: (1 + tril(K Kᵀ ∘ D, −1) η) U = V − e ∘ (K S)

S enters a chunk and S′ leaves it. The sum in an exponent runs over the terms between two tokens and over no others, so
that one large rate does not drown the small ones around it; nothing is divided by a product of decays, and whatever
comes later is left out by a choice, before anything is exponentiated. A product of matrices multiplies what is left
out by zero, which says NaN where that is not finite: such a chunk is put right by the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from so8t_torch.core.precision import accumulation_dtype

CHUNK = 64
"""Tokens of a chunk: a product of matrices per head is 64 × 64."""
DELTA_CHUNK = 16
"""The same for the delta rule, whose triangular system loses digits with its size."""
TILE_ELEMENTS = 1 << 15
"""Entries of one argument that are worked on together: 128 KB in float32, so that a chunk stays in the cache."""
Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Part(NamedTuple):
    """A chunk of c tokens for n rows and h heads, heads before tokens, as it is computed.

    Attributes:
        q: queries (n, h, c, k).
        k: keys (n, h, c, k).
        v: values (n, h, c, v).
        log_decay: g (n, h, c).
        eta: η (n, h, c).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    eta: Tensor


class Weights(NamedTuple):
    """Decays between the tokens of a chunk.

    Attributes:
        pair: Dᵀ (n, h, c, c), the earlier token first, as sums and products with it run fastest.
        enter: e (n, h, c, 1), the decay of what entered the chunk.
        dropped: where a segment began at or before the token (n, 1, c, 1), or nothing.
    """

    pair: Tensor
    enter: Tensor
    dropped: Tensor | None


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    eta: Tensor,
    initial: Tensor | None,
    restart: Tensor | None,
    *,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (N, T, H, V) and the last state by differentiable operations, one step per token."""
    kind = accumulation_dtype(v.dtype)
    state = _start(initial, k, v)
    rows = []
    tokens = zip(*(x.to(kind).unbind(1) for x in (q, k, v, log_decay, eta)), strict=True)
    for t, token in enumerate(tokens):
        y, state, _ = advance(_dropped(state, restart, t), *token, delta=delta)
        rows.append(y)
    return torch.stack(rows, 1).to(v.dtype), state.to(v.dtype if initial is None else initial.dtype)


def advance(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, eta: Tensor, *, delta: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one token (…, H, ·) reads, the state that it leaves, and what it wrote."""
    kept = log_decay.exp()[..., None, None] * state
    if delta:
        v = v - (k[..., None] * kept).sum(-2)
    state = kept + (eta[..., None] * k)[..., None] * v[..., None, :]
    return (q[..., None] * state).sum(-2), state, v


def recurrence_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    eta: Tensor,
    initial: Tensor | None,
    restart: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state (N, H, K, V) and the states (N, T/C, H, K, V) that enter the chunks."""
    y, start = torch.empty_like(v, memory_format=torch.contiguous_format), _start(initial, k, v)
    final = torch.empty_like(start, dtype=v.dtype if initial is None else initial.dtype)
    states = start.new_empty((len(start), len(chunks(v.shape[1], delta)), *start.shape[1:]))
    for n in rows_together(v, k):
        state = start[n]
        for place, t in enumerate(chunks(v.shape[1], delta)):
            states[n, place] = state
            part = part_of(q, k, v, log_decay, eta, n, t)
            found, state = _finite_or_walked(part, state, _some(restart, n, t), delta)
            y[n, t] = found.transpose(1, 2)
        final[n] = state
    return y, final, states


def gradient_chunked(
    grad: Tensor,
    grad_final: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    eta: Tensor,
    states: Tensor,
    restart: Tensor | None,
    delta: bool,
) -> Grads:
    """Return the gradients of q, k, v, g, η and the state that enters, from the last chunk to the first."""
    inputs = q, k, v, log_decay, eta
    found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    dinitial = torch.empty_like(grad_final, memory_format=torch.contiguous_format)
    kind = accumulation_dtype(v.dtype)
    for n in rows_together(v, k):
        passed = grad_final[n].to(kind)
        for place, t in reversed(list(enumerate(chunks(v.shape[1], delta)))):
            part, state, flags = part_of(*inputs, n, t), states[n, place], _some(restart, n, t)
            arrived = grad[n, t].transpose(1, 2).to(kind, memory_format=torch.contiguous_format)
            *grads, onward = _pulled(part, state, flags, arrived, passed, delta)
            for out, value in zip(found, grads, strict=True):
                out[n, t] = value.transpose(1, 2)
            passed = onward
        dinitial[n] = passed
    return *found, dinitial  # type: ignore[return-value]


def read_chunk(part: Part, state: Tensor, restart: Tensor | None, delta: bool) -> tuple[Tensor, Tensor]:
    """Return what a chunk reads (n, h, c, v), and the state that leaves it, by differentiable operations."""
    weights = decays(part.log_decay, restart)
    written = part.eta[..., None] * (innovations(part, state, weights) if delta else part.v)
    scores = (part.k @ part.q.mT).mul_(weights.pair)
    y = (scores.mT @ written).add_(of_state(weights, part.q @ state))
    return y, through(weights, state) + (part.k * leave(weights)).mT @ written


def decays(log_decay: Tensor, restart: Tensor | None) -> Weights:
    """Return the decays between the tokens of a chunk, from g (n, h, c) and where segments begin (n, c)."""
    size = log_decay.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).triu(1)
    logs = torch.where(earlier, log_decay[..., None, :], 0.0).cumsum(-1)
    pair = torch.where(_before(restart, size, log_decay.device), logs, -torch.inf).exp()
    dropped = None if restart is None else (restart.cumsum(-1) > 0)[:, None, :, None]
    return Weights(pair, log_decay.cumsum(-1).exp()[..., None], dropped)


def _before(restart: Tensor | None, size: int, device: torch.device | None = None) -> Tensor:
    """Return whether token s reaches token t ≥ s of a chunk, (…, s, t): both are in one segment."""
    if restart is None:
        return torch.ones(size, size, dtype=torch.bool, device=device).triu()
    segment = restart.cumsum(-1)
    return (segment[:, None, None, :] == segment[:, None, :, None]).triu()


def of_state(weights: Weights, x: Tensor) -> Tensor:
    """Return x (n, h, c, ·), a product with the state that entered, decayed to each token."""
    found = weights.enter * x
    return found if weights.dropped is None else torch.where(weights.dropped, 0.0, found)


def through(weights: Weights, state: Tensor) -> Tensor:
    """Return what is left of the state (n, h, k, v) behind the chunk."""
    found = weights.enter[..., -1:, :] * state
    return found if weights.dropped is None else torch.where(weights.dropped[..., -1:, :], 0.0, found)


def leave(weights: Weights) -> Tensor:
    """Return the decay of each token's write behind the chunk (n, h, c, 1)."""
    return weights.pair[..., -1:]


def innovations(part: Part, state: Tensor, weights: Weights) -> Tensor:
    """Return U of the delta rule: values less what the state reads under their keys when they arrive."""
    overlap = ((part.k @ part.k.mT) * weights.pair).mT.tril(-1) * part.eta[..., None, :]
    target = part.v - of_state(weights, part.k @ state)
    return torch.linalg.solve_triangular(overlap, target, upper=False, unitriangular=True)


def part_of(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, eta: Tensor, n: slice, t: slice) -> Part:
    """Return some tokens of some rows, in the dtype that is computed in."""
    kind = accumulation_dtype(v.dtype)
    given = (x[n, t].transpose(1, 2) for x in (q, k, v, log_decay, eta))
    return Part(*(x.to(kind).contiguous() for x in given))


def rows_together(v: Tensor, k: Tensor) -> Iterator[slice]:
    """Yield the rows that are worked on together; it depends on the shape of a row alone."""
    rows, length, heads, width = v.shape
    together = max(1, TILE_ELEMENTS // (heads * min(length, CHUNK) * max(width, k.shape[-1])))
    return (slice(first, min(first + together, rows)) for first in range(0, rows, together))


def chunks(length: int, delta: bool) -> list[slice]:
    """Return the tokens of every chunk."""
    size = DELTA_CHUNK if delta else CHUNK
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _finite_or_walked(part: Part, state: Tensor, restart: Tensor | None, delta: bool) -> tuple[Tensor, Tensor]:
    """Return what a chunk reads and leaves; the loop says it where a number that is not finite reaches a token.

    It reaches the tokens behind it, and from the state that enters the first ones, to the end of their segment.
    """
    y, after = read_chunk(part, state, restart, delta)
    if bool((y.sum() + after.sum()).isfinite()):
        return y, after
    sound = part.log_decay.isfinite() & part.eta.isfinite()
    sound = sound & part.k.isfinite().all(-1) & part.v.isfinite().all(-1)
    entered = state.isfinite().all(-1).all(-1)
    if bool(sound.all() & entered.all()):
        return y, after
    keys, values = (torch.where(sound[..., None], x, 0.0) for x in (part.k, part.v))
    rates, strengths = (torch.where(sound, x, 0.0) for x in (part.log_decay, part.eta))
    known = torch.where(entered[..., None, None], state, 0.0)
    y, after = read_chunk(Part(part.q, keys, values, rates, strengths), known, restart, delta)
    walked, left = _walk(part, state, restart, delta)
    reached = (~sound[..., None] & _before(restart, sound.shape[-1], sound.device)).any(-2)
    first = restart.cumsum(-1)[:, None] == 0 if restart is not None else torch.ones_like(reached)
    reached = (reached | (first & ~entered[..., None]))[..., None]
    return torch.where(reached, walked, y), torch.where(reached[..., -1:, :], left, after)


def _walk(part: Part, state: Tensor, restart: Tensor | None, delta: bool) -> tuple[Tensor, Tensor]:
    """Return what the loop makes of a chunk."""
    q, k, v, log_decay, eta = (x.transpose(1, 2) for x in part)
    y, after = recurrence(q, k, v, log_decay, eta, state, restart, delta=delta)
    return y.transpose(1, 2), after


def _pulled(
    part: Part, state: Tensor, restart: Tensor | None, grad: Tensor, passed: Tensor, delta: bool
) -> list[Tensor]:
    """Return the gradients of a chunk and of the state that enters it, finite where the loop's are."""
    found = _adjoint(part, state, restart, grad, passed, delta)
    if bool(torch.stack([x.sum() for x in found]).sum().isfinite()):
        return found
    return _walk_back(part, state, restart, grad, passed, delta)


def _adjoint(
    part: Part, state: Tensor, restart: Tensor | None, grad: Tensor, passed: Tensor, delta: bool
) -> list[Tensor]:
    """Return the gradients of a chunk for ``grad`` at y and ``passed`` at the state that leaves.

    dQ = X K + e ∘ (Ȳ Sᵀ)    dK = Xᵀ Q + D_C ∘ (W S̄ᵀ)    dW = Pᵀ Ȳ + D_C ∘ (K S̄)    dS = e_C S̄ + (e ∘ Q)ᵀ Ȳ
    with P = (Q Kᵀ) ∘ D and X = (Ȳ Wᵀ) ∘ D; a rate stands between everything that crosses its token:
    dg_t = ⟨S̄, e_C S⟩ + Σ_{s<t} w_s · D_C (K S̄)_s + Σ_{u≥t} q_u · e_u (Ȳ Sᵀ)_u + Σ_{s<t≤u} P_us (Ȳ Wᵀ)_us
    """
    q, k, v, log_decay, eta = part
    weights = decays(log_decay, restart)
    leaving, strength = leave(weights), eta[..., None]
    values = innovations(part, state, weights) if delta else v
    written = strength * values
    read, asked = (k @ q.mT).mul_(weights.pair), written @ grad.mT
    inside, across = read @ grad, (read * asked).triu_(1)
    scores, dread = asked.mul_(weights.pair), of_state(weights, grad @ state.mT)
    dq = (scores.mT @ k).add_(dread)
    dk = (scores @ q).add_(leaving * (written @ passed.mT))
    outside = leaving * (k @ passed)
    beyond = (written * outside).sum(-1)
    crossing = (q * dread).sum(-1)
    dwritten = inside.add_(outside)
    dv, deta = strength * dwritten, (values * dwritten).sum(-1)
    entered = through(weights, passed) + of_state(weights, q).mT @ grad
    if delta:
        dv, solved = _adjoint_of_innovations(part, state, weights, values, dv)
        for total, more in zip((dk, deta, across, crossing, entered), solved, strict=True):
            total.add_(more)
    kept = through(weights, state).mul_(passed).sum((-2, -1))[..., None]
    dlog_decay = kept + (beyond.cumsum(-1) - beyond) + _from_here(crossing) + _from_here(across).triu_(1).sum(-2)
    return [dq, dk, dv, dlog_decay, deta, entered]


def _adjoint_of_innovations(
    part: Part, state: Tensor, weights: Weights, values: Tensor, grad: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the gradient of V for ``grad`` at U, and what goes to K, η, pairs and states that cross a token, and S.

    With O = tril(K Kᵀ ∘ D, −1) and M = O η:  dV = (1 + M)⁻ᵀ Ū    dM = −dV Uᵀ    dO = dM η    e ∘ (K S) gets −dV
    """
    k, eta = part.k, part.eta[..., None, :]
    overlap = ((k @ k.mT) * weights.pair).mT.tril(-1)
    dv = torch.linalg.solve_triangular((overlap * eta).mT, grad, upper=True, unitriangular=True)
    dsystem = (dv @ values.mT).tril(-1).neg_()
    shares = dsystem * overlap
    pairs = (dsystem * eta) * weights.pair.mT
    read = of_state(weights, k @ state)
    dk = pairs @ k + pairs.mT @ k - of_state(weights, dv @ state.mT)
    return dv, (dk, shares.sum(-2), (shares * eta).mT, -(dv * read).sum(-1), -(of_state(weights, k).mT @ dv))


def _from_here(x: Tensor) -> Tensor:
    """Return Σ_{u≥t} x_u along the last axis."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _walk_back(
    part: Part, state: Tensor, restart: Tensor | None, grad: Tensor, passed: Tensor, delta: bool
) -> list[Tensor]:
    """Return the gradients of a chunk as the loop has them, token by token from the last."""
    tokens = list(zip(*(x.unbind(2) for x in part), strict=True))
    entering = []
    for t, token in enumerate(tokens):
        entering.append(_dropped(state, restart, t))
        _, state, _ = advance(entering[t], *token, delta=delta)
    columns: list[list[Tensor]] = [[] for _ in part]
    for t, (q, k, _, log_decay, eta) in reversed(list(enumerate(tokens))):
        y, retention = grad[:, :, t], log_decay.exp()[..., None, None]
        _, state, u = advance(entering[t], *tokens[t], delta=delta)
        passed = passed + q[..., None] * y[..., None, :]
        kept, du = retention * entering[t], (k[..., None] * passed).sum(-2)
        deta, du = (du * u).sum(-1), eta[..., None] * du
        dk = eta[..., None] * (passed * u[..., None, :]).sum(-1)
        if delta:
            dk = dk - (kept * du[..., None, :]).sum(-1)
            passed = passed - k[..., None] * du[..., None, :]
        row = (state * y[..., None, :]).sum(-1), dk, du, (passed * kept).sum((-2, -1)), deta
        for column, value in zip(columns, row, strict=True):
            column.insert(0, value)
        passed = _dropped(retention * passed, restart, t)
    return [*(torch.stack(column, 2) for column in columns), passed]


def _dropped(state: Tensor, restart: Tensor | None, t: int) -> Tensor:
    """Return a state (n, h, k, v), zeros in the rows that restart at token t."""
    return state if restart is None else torch.where(restart[:, t, None, None, None], 0.0, state)


def _start(initial: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """Return the state that enters the first token."""
    shape, kind = (v.shape[0], *k.shape[2:], v.shape[-1]), accumulation_dtype(v.dtype)
    return v.new_zeros(shape, dtype=kind) if initial is None else initial.to(kind)


def _some(restart: Tensor | None, n: slice, t: slice) -> Tensor | None:
    return None if restart is None else restart[n, t]
