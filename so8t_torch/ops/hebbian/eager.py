"""Fast weights in PyTorch: a plain differentiable loop, and chunks of tokens as matrix products on the CPU.

    D_ts = a_{s+1} ⋯ a_t  for s ≤ t of one segment, else 0        a = e^g, g = −Γ,  e_t = D_{t,−1},  K̂ = η K
    Y = ((Q K̂ᵀ) ∘ D) U + e ∘ (Q S)        S′ = e_C S + (K̂ ∘ D_C)ᵀ U
    hebb: U = V        delta: (1 + tril(K Kᵀ ∘ D, −1) η) U = V − e ∘ (K S)

S enters a chunk and S′ leaves it. A decay between two tokens is the product of the factors between them and of no
others: nothing is divided by a product of decays, and one strong factor does not drown the weak ones around it. A
product of matrices multiplies what is left out by zero, which says NaN where that is not finite: such a chunk is put
right by the loop.
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
    """A chunk of c tokens, b = rows × heads at a time, as it is computed.

    Attributes:
        q: queries (b, c, k).
        k: keys (b, c, k).
        v: values (b, c, v).
        log_decay: g (b, c).
        eta: η (b, c).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    eta: Tensor


class Weights(NamedTuple):
    """Decays between the tokens of a chunk.

    Attributes:
        pair: Dᵀ (b, c, c), the earlier token first, as sums and products with it run fastest.
        enter: e (b, c, 1), the decay of what entered the chunk.
        dropped: where a segment began at or before the token (b, c, 1), or nothing.
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
    final = start.new_empty(start.shape, dtype=v.dtype if initial is None else initial.dtype)
    cuts = chunks(v.shape[1], delta)
    states = start.new_empty((len(start), len(cuts), *start.shape[1:]))
    for n in rows_together(v, k):
        state, columns = start[n].flatten(0, 1), heads_first(n, q, k, v, log_decay, eta)
        for place, t in enumerate(cuts):
            states[n, place] = state.view_as(start[n])
            found, state = _finite_or_walked(part_of(columns, t), state, lanes(restart, n, t, v.shape[2]), delta)
            y[n, t] = _tokens_first(found, y[n, t])
        final[n] = state.view_as(final[n])
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
    kind, cuts = accumulation_dtype(v.dtype), chunks(v.shape[1], delta)
    for n in rows_together(v, k):
        passed, columns, (arrivals,) = (
            grad_final[n].to(kind).flatten(0, 1),
            heads_first(n, *inputs),
            heads_first(n, grad),
        )
        for place, t in reversed(list(enumerate(cuts))):
            part, state, arrived = part_of(columns, t), states[n, place].flatten(0, 1), _chunk(arrivals, t, kind)
            *grads, passed = _pulled(part, state, lanes(restart, n, t, v.shape[2]), arrived, passed, delta)
            for out, value in zip(found, grads, strict=True):
                out[n, t] = _tokens_first(value, out[n, t])
        dinitial[n] = passed.view_as(dinitial[n])
    return *found, dinitial  # type: ignore[return-value]


def read_chunk(part: Part, state: Tensor, restart: Tensor | None, delta: bool) -> tuple[Tensor, Tensor]:
    """Return what a chunk reads (b, c, v), and the state (b, k, v) that leaves it."""
    weights = decays(part.log_decay, restart)
    keys, values = part.eta[..., None] * part.k, innovations(part, state, weights) if delta else part.v
    scores = torch.bmm(keys, part.q.mT).mul_(weights.pair)
    y = of_state(weights, torch.bmm(part.q, state)).baddbmm_(scores.mT, values)
    after = through(weights, state).baddbmm_(keys.mul_(leave(weights)).mT, values)
    return y, after


def decays(log_decay: Tensor, restart: Tensor | None) -> Weights:
    """Return the decays between the tokens of a chunk, from g (b, c) and where segments begin (b, c)."""
    ones = torch.ones(log_decay.shape[-1:] * 2, dtype=log_decay.dtype, device=log_decay.device)
    factors = log_decay.exp()
    # row s: ones up to s, then the factors behind it
    pair = torch.addcmul(ones.tril(), factors[..., None, :], ones.triu(1)).cumprod(-1).mul_(ones.triu())
    enter = factors.cumprod(-1)[..., None]
    if restart is None:
        return Weights(pair, enter, None)
    segment = restart.cumsum(-1)
    pair = torch.where(_before(segment), pair, 0.0)
    return Weights(pair, enter, (segment > 0)[..., None])


def _before(segment: Tensor) -> Tensor:
    """Return whether token s reaches token t ≥ s of a chunk (b, s, t): both are in one segment (b, c)."""
    return (segment[:, None, :] == segment[:, :, None]).triu()


def of_state(weights: Weights, x: Tensor) -> Tensor:
    """Return x (b, c, ·), which meets the state that entered, decayed to each token."""
    found = weights.enter * x
    return found if weights.dropped is None else found.masked_fill(weights.dropped, 0.0)


def through(weights: Weights, state: Tensor) -> Tensor:
    """Return what is left of a state (b, ·, ·) behind the chunk."""
    found = weights.enter[:, -1:] * state
    return found if weights.dropped is None else found.masked_fill(weights.dropped[:, -1:], 0.0)


def leave(weights: Weights) -> Tensor:
    """Return the decay of each token's write behind the chunk (b, c, 1)."""
    return weights.pair[..., -1:]


def innovations(part: Part, state: Tensor, weights: Weights) -> Tensor:
    """Return U of the delta rule: values less what the state reads under their keys when they arrive."""
    overlap = ((part.k @ part.k.mT) * weights.pair).mT.tril(-1) * part.eta[..., None, :]
    target = part.v - of_state(weights, part.k @ state)
    return torch.linalg.solve_triangular(overlap, target, upper=False, unitriangular=True)


def part_of(columns: list[Tensor], t: slice) -> Part:
    """Return some tokens of q, k, v, g and η (n, H, T, ·), in the dtype that is computed in."""
    kind = accumulation_dtype(columns[2].dtype)
    return Part(*(_chunk(x, t, kind) for x in columns))


def lanes(restart: Tensor | None, n: slice, t: slice, heads: int) -> Tensor | None:
    """Return where segments begin in a chunk of some rows, once per head (b, c)."""
    return None if restart is None else restart[n, t].repeat_interleave(heads, 0)


def heads_first(n: slice, *tensors: Tensor) -> list[Tensor]:
    """Return some rows of (N, T, H, ·) as (n, H, T, ·), where they are."""
    return [x[n].transpose(1, 2) for x in tensors]


def _chunk(x: Tensor, t: slice, kind: torch.dtype) -> Tensor:
    """Return some tokens of (n, H, T, ·) as (b, c, ·); those of one row stay where they are."""
    return x[:, :, t].flatten(0, 1).to(kind)


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    """Return a chunk (b, c, ·) as (n, c, H, ·)."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


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

    It reaches the tokens behind it, and from the state that enters the first ones, to the end of their segment. What
    overflows in the chunk alone is the loop's, too.
    """
    y, after = read_chunk(part, state, restart, delta)
    if bool((y.sum() + after.sum()).isfinite()):
        return y, after
    # a rate without bound is a factor of zero
    sound = (part.log_decay < torch.inf) & part.eta.isfinite()
    sound = sound & part.k.isfinite().all(-1) & part.v.isfinite().all(-1)
    entered = state.isfinite().all(-1).all(-1)
    segment = torch.zeros_like(sound, dtype=torch.int64) if restart is None else restart.cumsum(-1)
    known = torch.where(entered[:, None, None], state, 0.0)
    y, after, sound = _read_of_sound(part, known, restart, segment, sound, delta)
    reached = (~sound[..., None] & _before(segment)).any(-2) | ((segment == 0) & ~entered[:, None])
    lost, changed = reached[..., None] | ~y.isfinite(), reached[:, -1:, None] | ~after.isfinite()
    if not bool(lost.any() | changed.any()):
        return y, after
    walked, left = _walk(part, state, restart, delta)
    return torch.where(lost, walked, y), torch.where(changed, left, after)


def _read_of_sound(
    part: Part, state: Tensor, restart: Tensor | None, segment: Tensor, sound: Tensor, delta: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``read_chunk`` of the tokens that are sound (b, c), and which are.

    Every read of a token behind sound ones alone is what ``read_chunk`` makes of it to the bit, or not finite.
    """
    keys, values = (torch.where(sound[..., None], x, 0.0) for x in (part.k, part.v))
    rates, strengths = (torch.where(sound, x, 0.0) for x in (part.log_decay, part.eta))
    cleaned, weights = Part(part.q, keys, values, rates, strengths), decays(rates, restart)
    if delta:
        values = innovations(cleaned, state, weights)
        sound = sound & values.isfinite().all(-1)
        values = torch.where(sound[..., None], values, 0.0)
    keys = strengths[..., None] * keys
    # chosen, as a product that overflows is NaN where a token that comes later is multiplied by zero
    scores = torch.where(_before(segment), torch.bmm(keys, part.q.mT) * weights.pair, 0.0)
    y = of_state(weights, torch.bmm(part.q, state)).baddbmm_(scores.mT, values)
    return y, through(weights, state).baddbmm_(keys.mul_(leave(weights)).mT, values), sound


def _walk(part: Part, state: Tensor, restart: Tensor | None, delta: bool) -> tuple[Tensor, Tensor]:
    """Return what the loop makes of a chunk, whose every lane is a row with one head."""
    q, k, v, log_decay, eta = (x[:, :, None] for x in part)
    y, after = recurrence(q, k, v, log_decay, eta, state[:, None], restart, delta=delta)
    return y[:, :, 0], after[:, 0]


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

    dQ = X K̂ + (e ∘ Ȳ) Sᵀ    dK̂ = Xᵀ Q + D_C ∘ (U S̄ᵀ)    dU = Pᵀ Ȳ + (D_C ∘ K̂) S̄    dS = e_C S̄ + Qᵀ (e ∘ Ȳ)
    with P = (Q K̂ᵀ) ∘ D and X = (Ȳ Uᵀ) ∘ D; a rate stands between everything that crosses its token:
    dg_t = ⟨S̄, e_C S⟩ + Σ_{s<t} u_s · (D_C ∘ K̂ S̄)_s + Σ_{u≥t} q_u · (e ∘ Ȳ Sᵀ)_u + Σ_{s<t≤u} P_us (Ȳ Uᵀ)_us
    """
    q, k, v, log_decay, eta = part
    weights = decays(log_decay, restart)
    leaving, strength = leave(weights), eta[..., None]
    values = innovations(part, state, weights) if delta else v
    keys, arriving = strength * k, of_state(weights, grad)
    read, asked = torch.bmm(keys, q.mT).mul_(weights.pair), torch.bmm(values, grad.mT)
    across = read * asked
    scores, dread = asked.mul_(weights.pair), torch.bmm(arriving, state.mT)
    crossing = (q * dread).sum(-1)
    dq = dread.baddbmm_(scores.mT, keys)
    outside = torch.bmm(keys.mul_(leaving), passed)
    beyond = (values * outside).sum(-1)
    dv = outside.baddbmm_(read, grad)
    dkeys = torch.bmm(values, passed.mT).mul_(leaving).baddbmm_(scores, q)
    deta = (k * dkeys).sum(-1)
    dk = dkeys.mul_(strength)
    entered = through(weights, passed).baddbmm_(q.mT, arriving)
    if delta:
        dv, solved = _adjoint_of_innovations(part, state, weights, values, dv)
        for total, more in zip((dk, deta, across, crossing, entered), solved, strict=True):
            total.add_(more)
    kept = through(weights, (state * passed).sum((-2, -1), keepdim=True))[..., 0]
    dlog_decay = kept + (beyond.cumsum(-1) - beyond) + crossing.flip(-1).cumsum(-1).flip(-1)
    # row t: the sums over s ≤ t, of which those with u > t cross the next token
    dlog_decay[:, 1:] += across.cumsum(-2).triu_(1).sum(-1)[:, :-1]
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


def _walk_back(
    part: Part, state: Tensor, restart: Tensor | None, grad: Tensor, passed: Tensor, delta: bool
) -> list[Tensor]:
    """Return the gradients of a chunk as the loop has them, token by token from the last."""
    tokens = list(zip(*(x.unbind(1) for x in part), strict=True))
    entering = []
    for t, token in enumerate(tokens):
        entering.append(_dropped(state, restart, t))
        _, state, _ = advance(entering[t], *token, delta=delta)
    columns: list[list[Tensor]] = [[] for _ in part]
    for t, (q, k, _, log_decay, eta) in reversed(list(enumerate(tokens))):
        y, retention = grad[:, t], log_decay.exp()[..., None, None]
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
    return [*(torch.stack(column, 1) for column in columns), passed]


def _dropped(state: Tensor, restart: Tensor | None, t: int) -> Tensor:
    """Return a state (n, …), zeros in the rows that restart at token t."""
    return state if restart is None else torch.where(restart[:, t].reshape(-1, *[1] * (state.ndim - 1)), 0.0, state)


def _start(initial: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """Return the state that enters the first token."""
    shape, kind = (v.shape[0], *k.shape[2:], v.shape[-1]), accumulation_dtype(v.dtype)
    return v.new_zeros(shape, dtype=kind) if initial is None else initial.to(kind)
