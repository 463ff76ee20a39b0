"""A semiseparable operator in PyTorch: token by token, and its chunks as small matrices made of products of decays.

A chunk of L tokens is x ↦ A x + reads S for the state S (R, D) that enters it, and leaves totals ⊙ S + writesᵀ x:

    p_t = Π_{q≤t} α_q,  s_t = Π_{q>t} α_q over the chunk        reads = v ⊙ p,  writes = u ⊙ s,  totals = p of its end
    two halves:  A = [A₁ 0; (v ⊙ p)₂ (u ⊙ s)₁ᵀ A₂],   p = [p₁; t₁ ⊙ p₂],   s = [t₂ ⊙ s₁; s₂]

From one token, A = v·u, p = α, s = 1, the halves are joined until they are a chunk. Decays are multiplied and never
divided or taken the logarithm of: α = 0 is exact, and no product leaves [0, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from so8t_torch.core.pages import allocate
from so8t_torch.ops.linear_recurrence import linear_recurrence

RANK_TILE = 16
"""Rank channels that are read, written or skipped together: enough terms to fill a product of matrices."""


class Chunks(NamedTuple):
    """What the chunks of some rows do to inputs and states.

    Attributes:
        within: A (N, n, L, L), lower triangular.
        reads: (N, n, L, R).
        writes: (N, n, L, R).
        totals: (N, n, R).
    """

    within: Tensor
    reads: Tensor
    writes: Tensor
    totals: Tensor


def recurrence(
    x: Tensor, u: Tensor, v: Tensor, decay: Tensor, initial: Tensor, restart: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y (N, T, D) and the last state (N, R, D), one step per token."""
    rows, state = [], initial
    for t in range(x.shape[1]):
        a = decay[:, t]
        if restart is not None:
            a, state = (torch.where(restart[:, t].reshape(-1, *[1] * (z.ndim - 1)), 0.0, z) for z in (a, state))
        state = a[..., None] * state + u[:, t, :, None] * x[:, t, None, :]
        rows.append((v[:, t, :, None] * state).sum(1))
    return torch.stack(rows, 1), state


def chunks(u: Tensor, v: Tensor, decay: Tensor, run: Tensor | None) -> Chunks:
    """Return what the chunks do, from u, v and α (N, n, L, R), L a power of two.

    Args:
        u: what is written.
        v: what is read.
        decay: α.
        run: (N, n, L) restarts since the chunk began, up to each token; None where there is none.
    """
    rows, count, length, rank = u.shape
    p, s = decay[..., None, :], torch.ones_like(decay)[..., None, :]
    within = (u * v).sum(-1)[..., None, None]
    size = 1
    while size < length:
        reads, writes = (
            (z.unflatten(2, (-1, size)) * products).unflatten(2, (-1, 2)) for z, products in ((v, p), (u, s))
        )
        below = reads[:, :, :, 1] @ writes[:, :, :, 0].mT
        first, second = within[:, :, 0::2], within[:, :, 1::2]
        within = torch.cat([torch.cat([first, torch.zeros_like(first)], -1), torch.cat([below, second], -1)], -2)
        p1, p2, s1, s2 = p[:, :, 0::2], p[:, :, 1::2], s[:, :, 0::2], s[:, :, 1::2]
        p, s = torch.cat([p1, p1[..., -1:, :] * p2], -2), torch.cat([s1 * p2[..., -1:, :], s2], -2)
        size *= 2
    p, s = (z.reshape(rows, count, length, rank) for z in (p, s))
    within = within.reshape(rows, count, length, length)
    return _parted(Chunks(within, v * p, u * s, p[:, :, -1]), run)


def _parted(whole: Chunks, run: Tensor | None) -> Chunks:
    """Return zeros where two tokens, or a token and the state that enters or leaves, are of different segments."""
    if run is None:
        return whole
    last = run[..., -1:]
    return Chunks(
        torch.where(run[..., :, None] == run[..., None, :], whole.within, 0.0),
        torch.where((run == 0)[..., None], whole.reads, 0.0),
        torch.where((run == last)[..., None], whole.writes, 0.0),
        torch.where(last == 0, whole.totals, 0.0),
    )


def operate(
    x: Tensor, u: Tensor, v: Tensor, decay: Tensor, initial: Tensor, run: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y (N, n, L, D) and the last state (N, R, D), one chunk after the other; not differentiable.

    Tiles of rank channels are added up one by one, so that a closed tile can be left out without changing a bit: a
    later token that opens it changes nothing before. An input that is not finite touches its own column, from its own
    token on: as in the loop on the CPU, and as NaN off it, where looking at it would wait for the device.
    """
    wild = _wild(x)
    inputs = x if wild is None else torch.where(wild, 0.0, x)
    y = allocate(tuple(x.shape), x.dtype) if _readable(x) else torch.empty_like(x)
    states = [state.clone() for state in initial.split(RANK_TILE, 1)]
    within, tiles = None, []
    for place, (state, *given) in enumerate(zip(states, *(z.split(RANK_TILE, -1) for z in (u, v, decay)), strict=True)):
        if wild is None and _closed(state, *given):
            states[place] = _faded(state, given[-1], run)
        else:
            parts = chunks(given[0], given[1], given[2], run)
            within = parts.within if within is None else within + parts.within
            tiles.append(Tile(state, parts))
    pairs = within.unbind(1) if within is not None else ()
    for c, (target, values, pair) in enumerate(zip(y.unbind(1), inputs.unbind(1), pairs, strict=False)):
        runs = None if run is None else run[:, c]
        target.baddbmm_(pair, values, beta=0.0)
        for tile in tiles:
            tile.advance(c, target, values, runs)
        if wild is not None and _readable(x):
            _add_wild(c, target, x[:, c], wild[:, c], pair, tiles, runs)
    if within is None:
        y.zero_()
    final = torch.cat(states, 1)
    return (y, final) if wild is None or _readable(x) else _spoiled(y, final, wild, run)


class Tile:
    """Rank channels that are read, written or skipped together, and their state.

    Args:
        state: (N, r, D), advanced in place.
        parts: what the chunks do to it.
    """

    def __init__(self, state: Tensor, parts: Chunks) -> None:
        self.state = state
        self.reads, self.writes, self.totals = (z.unbind(1) for z in parts[1:])
        self.reading, self.writing = (_used(z) for z in parts[1:3])
        self.readable, self.finite = _readable(state), False
        self.fading = self.readable and math.isfinite(parts.totals.sum())

    def advance(self, c: int, y: Tensor, x: Tensor, run: Tensor | None) -> None:
        """Add what chunk c reads to y (N, L, D), and write its inputs."""
        if self.reading[c] or run is not None or not self._is_finite():
            self._read(c, y, run)
        self.state.mul_(self.totals[c][..., None])
        if run is not None:
            self.state.masked_fill_((run[:, -1] != 0)[:, None, None], 0.0)
        if self.writing[c]:
            self.state.baddbmm_(self.writes[c].mT, x)
            self.finite = False

    def _read(self, c: int, y: Tensor, run: Tensor | None) -> None:
        """Add reads · state to y, keeping a state that is not finite from the segments after it."""
        if run is None or self._is_finite():
            y.baddbmm_(self.reads[c], self.state)
        else:
            y.add_(torch.where((run == 0)[..., None], self.reads[c] @ self.state, 0.0))

    def _is_finite(self) -> bool:
        # a finite state fades without ceasing to be one; a sum that overflows only costs the reading of zeros
        self.finite = self.readable and ((self.finite and self.fading) or math.isfinite(self.state.sum()))
        return self.finite


def _readable(x: Tensor) -> bool:
    """Return whether numbers can be looked at without waiting for a device."""
    return x.device.type == "cpu"


def _wrapped(x: Tensor) -> bool:
    """Return whether a tensor stands for a batch of others, of which no one number can be asked."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def _closed(state: Tensor, u: Tensor, v: Tensor, decay: Tensor) -> bool:
    """Return whether a tile is neither written nor read by any token, and holds numbers; not looked at off the CPU."""
    if not _readable(state) or u.any() or v.any():
        return False
    return math.isfinite(state.sum()) and math.isfinite(decay.sum())


def _faded(state: Tensor, decay: Tensor, run: Tensor | None) -> Tensor:
    """Return the state (N, r, D) of a closed tile after all chunks, to the bit as if it were not left out."""
    if not state.any():
        return state
    while decay.shape[2] > 1:
        decay = decay[:, :, 0::2] * decay[:, :, 1::2]
    for total in decay[:, :, 0].unbind(1):
        state = state * total[..., None]
    return state if run is None else state.masked_fill((run[..., -1] != 0).any(1)[:, None, None], 0.0)


def _used(z: Tensor) -> list[bool]:
    """Return for which chunks (N, n, L, r) holds anything but zeros; for all of them off the CPU."""
    return z.any(2).any(-1).any(0).tolist() if _readable(z) else [True] * z.shape[1]


def _wild(x: Tensor) -> Tensor | None:
    """Return where x is not finite, or None where it is finite throughout, which is looked for on the CPU alone."""
    if not _readable(x):
        return ~x.isfinite()
    if not x.numel():
        return None
    low, high = torch.aminmax(x)
    return None if bool(low.isfinite() & high.isfinite()) else ~x.isfinite()


def _add_wild(
    c: int, y: Tensor, x: Tensor, wild: Tensor, within: Tensor, tiles: list[Tile], run: Tensor | None
) -> None:
    """Add what the inputs of chunk c that are not finite give to its outputs (N, L, D) and the states, one by one."""
    places = torch.arange(x.shape[1], device=x.device)
    for row, s in wild.any(-1).nonzero().tolist():
        alone = torch.where(wild[row, s], x[row, s], 0.0)
        reached, stays = places >= s, torch.ones((), dtype=torch.bool, device=x.device)
        if run is not None:
            reached, stays = reached & (run[row] == run[row, s]), run[row, -1] == run[row, s]
        y[row] += torch.where(reached[:, None], within[row, :, s, None] * alone, 0.0)
        for tile in tiles:
            tile.state[row] += torch.where(stays, tile.writes[c][row, s, :, None] * alone, 0.0)
            tile.finite = False


def _spoiled(y: Tensor, state: Tensor, wild: Tensor, run: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return y and the state with NaN in the column of an input that is not finite, from there to its segment's end."""
    token = torch.arange(1, 1 + y.shape[1] * y.shape[2], device=y.device)
    reached = torch.where(wild.flatten(1, 2), token[:, None], 0).cummax(1).values
    if run is not None:
        begins = (run.diff(dim=-1, prepend=torch.zeros_like(run[..., :1])) > 0).flatten(1)
        begun = torch.where(begins, token, 0).cummax(1).values
        reached = torch.where(reached >= begun[..., None], reached, 0)
    rows = torch.where(reached > 0, torch.nan, y.flatten(1, 2))
    return rows.reshape(y.shape), torch.where(reached[:, -1:] > 0, torch.nan, state)


def gradient(
    grad: Tensor,
    grad_final: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    decay: Tensor,
    initial: Tensor,
    run: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, u, v, α and the initial state.

    On the CPU a closed tile that holds nothing, and is asked for nothing by what comes after, is left out: its
    gradients are zero. Their own derivatives are not, so that nothing is left out where those are wanted.
    """
    kept = _of_effect(grad, grad_final, x, u, v, decay, initial)
    if kept is None:
        return _gradient(grad, grad_final, x, u, v, decay, initial, run)
    written, read, alpha = (z.index_select(-1, kept) for z in (u, v, decay))
    asked, started = (z.index_select(1, kept) for z in (grad_final, initial))
    dx, *of_tokens, dinitial = _gradient(grad, asked, x, written, read, alpha, started, run)
    whole = [torch.zeros_like(z).index_copy_(-1, kept, dz) for z, dz in zip((u, v, decay), of_tokens, strict=True)]
    return dx, *whole, torch.zeros_like(initial).index_copy_(1, kept, dinitial)


def _of_effect(
    grad: Tensor, grad_final: Tensor, x: Tensor, u: Tensor, v: Tensor, decay: Tensor, initial: Tensor
) -> Tensor | None:
    """Return the channels of tiles whose gradients may differ from zero, or None for all of them."""
    looked_at = _readable(x) and type(u) is Tensor and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    given = grad, grad_final, x, u, v, decay, initial
    if not looked_at or any(map(_wrapped, given)) or not (math.isfinite(x.sum()) and math.isfinite(grad.sum())):
        return None
    places = torch.arange(u.shape[-1], device=u.device).split(RANK_TILE)
    states, asked = (z.split(RANK_TILE, 1) for z in (initial, grad_final))
    tokens = (z.split(RANK_TILE, -1) for z in (u, v, decay))
    kept = [
        place
        for place, state, back, *given in zip(places, states, asked, *tokens, strict=True)
        if state.any() or back.any() or not _closed(state, *given)
    ]
    return None if len(kept) == len(places) else torch.cat(kept or [*places[:1]])


def _gradient(
    grad: Tensor,
    grad_final: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    decay: Tensor,
    initial: Tensor,
    run: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the gradients by differentiable operations; the chunks and the states between them are computed anew."""
    parts, pull, *_ = torch.func.vjp(lambda *factors: chunks(factors[0], factors[1], factors[2], run), u, v, decay)
    states, _ = _carry(parts.totals, parts.writes.mT @ x, initial, reverse=False)
    entering = torch.cat([initial[:, None], states[:, :-1]], 1)
    passed, dinitial = _carry(parts.totals, parts.reads.mT @ grad, grad_final, reverse=True)
    leaving = torch.cat([passed[:, 1:], grad_final[:, None]], 1)
    dparts = Chunks(grad @ x.mT, grad @ entering.mT, x @ leaving.mT, (entering * leaving).sum(-1))
    return (parts.within.mT @ grad + parts.writes @ leaving, *pull(dparts), dinitial)


def _carry(totals: Tensor, added: Tensor, start: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return h_c = totals_c ⊙ h_{c∓1} + added_c (N, n, R, D) and the last of them."""
    rows, count, rank, width = added.shape
    b = added.transpose(1, 2).reshape(rows * rank, count, width)
    a = totals.transpose(1, 2).reshape(rows * rank, count, 1)
    h, final = linear_recurrence(a, b, start.reshape(rows * rank, width), reverse=reverse)
    return h.reshape(rows, rank, count, width).transpose(1, 2), final.reshape(rows, rank, width)
