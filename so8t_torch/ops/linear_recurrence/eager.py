"""Linear recurrences in PyTorch: a plain differentiable loop, and blocks that run side by side on the CPU.

    h_t = a_t h_{t−1} + b_t        λ_t = ḡ_t + ā_{t+1} λ_{t+1},   ∂b_t = λ_t,   ∂a_t = λ_t · conj(h_{t−1})

The plain form takes one step per token and is differentiable to any order, in both modes. The blocked form cuts a
stretch of tokens into n blocks of L: all blocks take their L steps together from a state of zero and keep the product
of their multipliers; a loop over blocks carries the states that enter them, h ← S_k + A_k h; then all blocks take
their steps again from there. Where A_k overflows, or meets an infinite state, it says nothing, and the block is walked
token by token instead: the result is that of the plain loop. The adjoint is the same scan in the other direction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from so8t_torch.core.pages import allocate

Items = TypeVar("Items", list, tuple)
TILE_ELEMENTS = 1 << 15
"""States that take one step together: 128 KB in float32, small enough for a core's second-level cache."""
STEPS = 64
"""Steps of a block where there are more tokens than one stretch holds."""
FEWEST_BLOCKS = 16
"""Blocks below which three passes cost more than one step per token."""


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for the half dtypes and any other dtype, real or complex, itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def recurrence(
    a: Tensor, b: Tensor, initial: Tensor | None, restart: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return h (N, T, C) and the last state (N, C) by differentiable operations."""
    kind = accumulation(b.dtype)
    multipliers, inputs = a.to(kind).unbind(1), b.to(kind).unbind(1)
    state = _start(initial, b, kind)
    rows: list[Tensor] = [state] * len(inputs)
    for t in _order(len(inputs), reverse):
        a_t, h = _kept(multipliers[t], restart, t), _kept(state, restart, t)
        rows[t] = state = a_t * h + inputs[t]
    return torch.stack(rows, 1).to(b.dtype), state.to(b.dtype if initial is None else initial.dtype)


def gradient(
    grad: Tensor,
    grad_final: Tensor,
    a: Tensor,
    h: Tensor | None,
    initial: Tensor | None,
    restart: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a (nothing without h), b and initial by differentiable operations."""
    kind = accumulation(grad.dtype)
    multipliers, cotangents = a.to(kind).unbind(1), grad.to(kind).unbind(1)
    before = None if h is None else [_start(initial, grad, kind), *_ordered(h.to(kind).unbind(1), reverse)]
    passed = grad_final.to(kind)
    da: list[Tensor] = [passed] * len(cotangents)
    db: list[Tensor] = [passed] * len(cotangents)
    for t in _order(len(cotangents), not reverse):
        db[t] = cotangents[t] + passed
        through = _kept(db[t], restart, t)
        if before is not None:
            place = len(cotangents) - 1 - t if reverse else t
            da[t] = through * _kept(before[place], restart, t).conj()
        passed = _kept(multipliers[t], restart, t).conj() * through
    found = a.new_empty(0) if h is None else torch.stack(da, 1).to(a.dtype)
    return found, torch.stack(db, 1).to(grad.dtype), passed.to(grad_final.dtype)


def cumulative_sum(x: Tensor, reverse: bool) -> Tensor:
    """Return Σ_{s≤t} x_s, or Σ_{s≥t} x_s, along the axis before the last."""
    terms = x.to(accumulation(x.dtype))
    return (terms.flip(-2).cumsum(-2).flip(-2) if reverse else terms.cumsum(-2)).to(x.dtype)


def recurrence_blocked(
    a: Tensor, b: Tensor, initial: Tensor | None, restart: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return h (N, T, C) and the last state (N, C), many blocks of tokens at a time."""
    kind = accumulation(b.dtype)
    h = allocate(tuple(b.shape), b.dtype)
    final = b.new_empty((b.shape[0], b.shape[2]), dtype=b.dtype if initial is None else initial.dtype)
    plan = Plan.of(b)
    for n in plan.groups():
        state = _start(initial, b, kind, n)
        for t in plan.stretches(reverse):
            out, written = _target(h[n, t], kind)
            state = _scan(a[n, t].to(kind), b[n, t].to(kind), state, _part(restart, n, t), out, plan.blocks, reverse)
            written()
        final[n] = state
    return h, final


def gradient_blocked(
    grad: Tensor,
    grad_final: Tensor,
    a: Tensor,
    h: Tensor | None,
    initial: Tensor | None,
    restart: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a (nothing without h), b and initial, many blocks of tokens at a time."""
    kind = accumulation(grad.dtype)
    da = allocate((0,) if h is None else tuple(a.shape), a.dtype)
    db = allocate(tuple(grad.shape), grad.dtype)
    dinitial = torch.empty(grad_final.shape, dtype=grad_final.dtype)
    plan = Plan.of(grad)
    for n in plan.groups():
        passed = grad_final[n].to(kind)
        for t in plan.stretches(not reverse):
            out, written = _target(db[n, t], kind)
            dropped = _part(restart, n, t)
            passed = _adjoint(a[n, t].to(kind).conj(), grad[n, t].to(kind), passed, dropped, out, plan.blocks, reverse)
            if h is not None:
                _multiply_by_states(out, h[n], _start(initial, grad, kind, n), da[n, t], t, reverse)
                if dropped is not None:
                    da[n, t].masked_fill_(dropped[..., None], 0.0)
            written()
        dinitial[n] = passed
    return da, db, dinitial


@dataclass(frozen=True)
class Plan:
    """How rows and tokens are cut; it depends on the length and width of a row alone, never on how many there are.

    Attributes:
        rows: N.
        length: T.
        together: rows that are run at a time.
        blocks: most blocks of a stretch; 0 where it is run token by token.
        stretch: tokens that are run at a time.
    """

    rows: int
    length: int
    together: int
    blocks: int
    stretch: int

    @classmethod
    def of(cls, x: Tensor) -> Plan:
        """Return the cut for a tensor (N, T, C)."""
        rows, length, width = x.shape
        most = TILE_ELEMENTS // width
        if most < FEWEST_BLOCKS:
            return cls(rows, length, max(1, most), 0, STEPS)
        blocks, _ = _cut(min(length, most * STEPS), most)
        return cls(rows, length, max(1, most // max(1, blocks)), most, most * STEPS)

    def groups(self) -> Iterator[slice]:
        """Yield the rows that run together."""
        return (slice(first, min(first + self.together, self.rows)) for first in range(0, self.rows, self.together))

    def stretches(self, descending: bool) -> Iterator[slice]:
        """Yield stretches of tokens in the order of the run."""
        if descending:
            return (slice(max(0, last - self.stretch), last) for last in range(self.length, 0, -self.stretch))
        return (slice(first, min(first + self.stretch, self.length)) for first in range(0, self.length, self.stretch))


@functools.cache
def _cut(length: int, most: int) -> tuple[int, int]:
    """Return (blocks, steps) that need the fewest operations on a stretch, with at most so many blocks.

    Three passes of ``steps`` operations, one per block, and one for each token that no whole block holds; a single
    block is no gain, and then there is none.
    """
    fewest, found = length, (0, 0)
    for steps in range(1, 2 * max(STEPS, math.isqrt(length))):
        blocks = min(most, length // steps)
        operations = 3 * steps + blocks + length - blocks * steps
        if blocks > 1 and operations < fewest:
            fewest, found = operations, (blocks, steps)
    return found


def _scan(
    a: Tensor, b: Tensor, state: Tensor, restart: Tensor | None, out: Tensor, most: int, descending: bool
) -> Tensor:
    """Write every state of one stretch into out, and return the last one."""
    blocks, steps = _cut(b.shape[1], most)
    whole, rest = _parts_of(b.shape[1], blocks * steps, descending)
    if blocks:
        cut_a, cut_b, cut_out = (x[:, whole].unflatten(1, (blocks, steps)) for x in (a, b, out))
        cuts = None if restart is None else restart[:, whole].unflatten(1, (blocks, steps))
        state = _scan_blocks(cut_a, cut_b, state, cuts, cut_out, descending)
    flags = None if restart is None else restart[:, rest]
    return _walk(a[:, rest], b[:, rest], state, flags, out[:, rest], descending)


def _scan_blocks(a: Tensor, b: Tensor, state: Tensor, restart: Tensor | None, out: Tensor, descending: bool) -> Tensor:
    """Write every state of blocks (N, n, L, C) into out, all blocks side by side, and return the last one."""
    enter = _entering(a, b, state, restart, descending)
    targets = _ordered(out.unbind(2), descending)
    for row, target in zip(_rows(a, b, restart, 2, descending), targets, strict=True):
        enter = _advance(enter, *row, out=target)
    return enter[:, 0] if descending else enter[:, -1]


def _entering(a: Tensor, b: Tensor, state: Tensor, restart: Tensor | None, descending: bool) -> Tensor:
    """Return the states (N, n, C) that enter the blocks."""
    (first_a, first_b, _), *others = _rows(a, b, restart, 2, descending)
    sums, products = (x.clone(memory_format=torch.contiguous_format) for x in (first_b, first_a))
    for row in others:
        _advance(sums, *row, out=sums)
        # right after its first use, where it is still in cache
        products.mul_(row[0])
    if restart is not None:
        products.masked_fill_(restart.any(2)[..., None], 0.0)
    enter = torch.empty_like(sums)
    places, pairs = enter.unbind(1), list(zip(sums.unbind(1), products.unbind(1), strict=True))
    places, pairs = _ordered(places, descending), _ordered(pairs, descending)
    places[0].copy_(state)
    for (total, product), source, target in zip(pairs, places, places[1:], strict=False):
        torch.addcmul(total, product, source, out=target)
    if not enter.isfinite().all():
        _carry_beyond_overflow(a, b, restart, pairs, places, descending)
    return enter


def _carry_beyond_overflow(
    a: Tensor,
    b: Tensor,
    restart: Tensor | None,
    pairs: list[tuple[Tensor, Tensor]],
    places: tuple[Tensor, ...],
    descending: bool,
) -> None:
    """Carry again, and walk through the tokens of a block wherever its product does not give a number."""
    numbers = _ordered(list(range(len(places))), descending)
    for (total, product), block, source, target in zip(pairs, numbers, places, places[1:], strict=False):
        found = torch.addcmul(total, product, source)
        known = found.isfinite()
        if not known.all():
            dropped = None if restart is None else restart[:, block]
            states = torch.empty_like(b[:, block], memory_format=torch.contiguous_format)
            walked = _walk(a[:, block], b[:, block], source, dropped, states, descending)
            found = torch.where(known, found, walked)
        target.copy_(found)


def _walk(a: Tensor, b: Tensor, state: Tensor, restart: Tensor | None, out: Tensor, descending: bool) -> Tensor:
    """Write every state of tokens (N, T, C) into out, one after the other, and return the last one."""
    targets = _ordered(out.unbind(1), descending)
    for row, target in zip(_rows(a, b, restart, 1, descending), targets, strict=True):
        state = _advance(state, *row, out=target)
    return state


def _rows(
    a: Tensor, b: Tensor, restart: Tensor | None, axis: int, descending: bool
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Return (a, b, where the state is dropped, if anywhere) of every step along an axis, in the order of the run."""
    multipliers, inputs = (_ordered(x.unbind(axis), descending) for x in (a, b))
    flags: Sequence[Tensor | None] = [None] * len(inputs)
    if restart is not None:
        others = [place for place in range(restart.ndim) if place != axis]
        anywhere = _ordered(restart.any(others).tolist(), descending)
        lanes = _ordered(restart.unbind(axis), descending)
        flags = [lane if some else None for lane, some in zip(lanes, anywhere, strict=True)]
    return list(zip(multipliers, inputs, flags, strict=True))


def _parts_of(length: int, whole: int, descending: bool) -> tuple[slice, slice]:
    """Return the tokens of whole blocks, which the run visits first, and the rest."""
    edge = length - whole if descending else whole
    return (slice(edge, length), slice(0, edge)) if descending else (slice(0, edge), slice(edge, length))


def _advance(state: Tensor, a: Tensor, b: Tensor, dropped: Tensor | None, out: Tensor) -> Tensor:
    """Write a · state + b, where the state is not dropped, into out."""
    if dropped is not None:
        state, a = (torch.where(dropped[..., None], 0.0, x) for x in (state, a))
    return torch.addcmul(b, a, state, out=out)


def _adjoint(
    a: Tensor, grad: Tensor, passed: Tensor, restart: Tensor | None, out: Tensor, most: int, reverse: bool
) -> Tensor:
    """Write λ of one stretch into out, and return what it passes on to the token before: ā λ of its last one.

    The multiplier of a step is that of the token it comes from, so that the scan pairs neighbours.
    """
    from_end = not reverse
    sooner, later = (slice(1, None), slice(None, -1)) if from_end else (slice(None, -1), slice(1, None))
    first, last = (-1, 0) if from_end else (0, -1)
    torch.add(grad[:, first], passed, out=out[:, first])
    if grad.shape[1] > 1:
        dropped = None if restart is None else restart[:, sooner]
        _scan(a[:, sooner], grad[:, later], out[:, first], dropped, out[:, later], most, from_end)
    passed = a[:, last] * out[:, last]
    return passed if restart is None else passed.masked_fill(restart[:, last, None], 0.0)


def _multiply_by_states(out: Tensor, h: Tensor, start: Tensor, da: Tensor, t: slice, reverse: bool) -> None:
    """Write λ_t · conj(h_{t−1}) of the tokens t into da."""
    if reverse:
        inside, states, edge = slice(None, -1), h[:, t.start + 1 : t.stop], -1
        beyond = h[:, t.stop] if t.stop < h.shape[1] else start
    else:
        inside, states, edge = slice(1, None), h[:, t.start : t.stop - 1], 0
        beyond = h[:, t.start - 1] if t.start > 0 else start
    torch.mul(out[:, inside], states.conj(), out=da[:, inside])
    torch.mul(out[:, edge], beyond.conj(), out=da[:, edge])


def _target(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Callable[[], object]]:
    """Return where a stretch is computed, and what to call when it is done: x itself, or a wider buffer to round."""
    if x.dtype == kind:
        return x, lambda: None
    buffer = torch.empty(x.shape, dtype=kind, device=x.device)
    return buffer, lambda: x.copy_(buffer)


def _start(initial: Tensor | None, like: Tensor, kind: torch.dtype, n: slice = slice(None)) -> Tensor:
    """Return the state that enters rows n."""
    return like.new_zeros(like[n, 0].shape, dtype=kind) if initial is None else initial[n].to(kind)


def _part(restart: Tensor | None, n: slice, t: slice) -> Tensor | None:
    return None if restart is None else restart[n, t]


def _kept(x: Tensor, restart: Tensor | None, t: int) -> Tensor:
    """Return x (N, C) with zeros in the rows that restart at token t, whatever x is there."""
    return x if restart is None else torch.where(restart[:, t, None], 0.0, x)


def _order(length: int, descending: bool) -> range:
    return range(length - 1, -1, -1) if descending else range(length)


def _ordered(items: Items, descending: bool) -> Items:
    """Return items by position in the order of the run."""
    return items[::-1] if descending else items
