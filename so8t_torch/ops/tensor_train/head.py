"""The tied head of a tensor train: logits h Eᵀ, their cross-entropy and their largest, without the table E.

    factored   Z[t, j, a, ρ] = Σ_b h[t, a, b] tail[j, ρ, b]
               logits[t, i_1 V' + j] = Σ_{a,ρ} Z[t, j, a, ρ] C_1[i_1, ρ, a]
    dense      logits[t, i] = Σ_d h[t, d] E[i, d], rows E[i] made slab by slab

tail[j] is the product of the cores behind the first at the digits of j, V' the number of its values. A token costs
V' r D + V r w_1 products factored and V D dense (plus a share of the cost of the rows); the cheaper way is taken. Both
go through the vocabulary in slabs for a tile of tokens, and again backward, where the slab's logits are computed anew:
neither logits nor their gradients are ever stored, and what is held beyond the results is a few megabytes.
The plain forms, differentiable to any order in both modes, stand first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops.tensor_train import eager

TILE_ELEMENTS = 1 << 18
"""Numbers per tile of Z, of logits or of a slab of rows: a megabyte in float32."""
FACTORED_TOKENS = 32
DENSE_TOKENS = 512


def logits(hidden: Tensor, cores: list[Tensor], vocab_size: int) -> Tensor:
    """Return the logits (T, V) of hidden (T, D) by differentiable operations."""
    return _wide_logits(hidden, cores, vocab_size).to(hidden.dtype)


def cross_entropy(hidden: Tensor, targets: Tensor, cores: list[Tensor], vocab_size: int, ignore: int) -> Tensor:
    """Return the loss (T,) of targets (T,) by differentiable operations."""
    kept = targets != ignore
    score = _wide_logits(torch.where(kept[:, None], hidden, 0.0), cores, vocab_size)
    aim = score.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    return torch.where(kept, score.logsumexp(1) - aim, 0.0)


def topk(hidden: Tensor, cores: list[Tensor], k: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits and their ids (T, k) by differentiable operations; ties go to the lower id."""
    score = _wide_logits(hidden, cores, vocab_size)
    ids = score.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]
    return score.gather(1, ids).to(hidden.dtype), ids


def logits_at(hidden: Tensor, ids: Tensor, cores: list[Tensor]) -> Tensor:
    """Return the logits (T, k) of hidden (T, D) at given ids (T, k) by differentiable operations."""
    found = eager.rows(ids.flatten(), cores, hidden.shape[1], None).view(*ids.shape, hidden.shape[1])
    return torch.einsum("td,tkd->tk", hidden.to(dtype := _wide_dtype(hidden, cores)), found.to(dtype)).to(hidden.dtype)


def logits_gradient(grad: Tensor, hidden: Tensor, cores: list[Tensor], vocab_size: int) -> tuple[Tensor, ...]:
    """Return the gradients of hidden and the cores for a gradient (T, V), by differentiable operations."""
    return torch.func.vjp(lambda h, *c: logits(h, list(c), vocab_size), hidden, *cores)[1](grad)


def cross_entropy_gradient(
    grad: Tensor, hidden: Tensor, targets: Tensor, cores: list[Tensor], vocab_size: int, ignore: int
) -> tuple[Tensor, ...]:
    """Return the gradients of hidden and the cores for a gradient (T,) of the losses, by differentiable operations."""
    return torch.func.vjp(lambda h, *c: cross_entropy(h, targets, list(c), vocab_size, ignore), hidden, *cores)[1](grad)


class Factored:
    """The head as two products with the cores; its columns are pairs (j, i_1), slabs are ranges of j."""

    def __init__(self, cores: list[Tensor], vocab_size: int, tokens: int, dtype: torch.dtype) -> None:
        if len(cores) == 1:
            cores = [*cores, torch.ones_like(cores[0][:1, :, :, :1])]
        self.cores, self.vocab_size = cores, vocab_size
        self.first, *self.tail = eager.step_matrices(cores, dtype)
        self.first = self.first[:, 0]
        self.count, self.width = cores[0].shape[0], cores[0].shape[3]
        self.tails = math.prod([core.shape[0] for core in cores[1:]])
        self.tokens = max(1, min(tokens, FACTORED_TOKENS))
        self.step = max(1, TILE_ELEMENTS // (self.tokens * max(self.first.shape[1], self.count)))

    def slabs(self) -> Iterator[Tensor]:
        """Yield the tail digits j of one slab after the other; each holds an id below V."""
        return iter(torch.arange(min(self.tails, self.vocab_size), device=self.first.device).split(self.step))

    def ids(self, slab: Tensor) -> Tensor:
        """Return the ids of the columns of a slab; some may be V or more."""
        return (torch.arange(self.count, device=slab.device) * self.tails + slab[:, None]).flatten()

    def columns(self, ids: Tensor, slab: Tensor) -> tuple[Tensor, Tensor]:
        """Return in which column of the slab each id stands, and whether it stands there at all."""
        place = ids % self.tails - slab[0]
        inside = (place >= 0) & (place < slab.numel())
        return torch.where(inside, place * self.count + ids // self.tails, 0), inside

    def scores(self, h: Tensor, slab: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits (n, c) of h (n, Π w_k) in a slab, and what ``pull`` needs."""
        chosen = [m.index_select(0, part) for m, part in zip(self.tail, self._digits(slab), strict=True)]
        tail = eager.chain(chosen).view(slab.numel() * self.cores[0].shape[2], -1)
        z = h.view(h.shape[0] * self.width, -1) @ tail.T
        z = z.view(h.shape[0], self.width, slab.numel(), -1).transpose(1, 2).reshape(-1, self.first.shape[1])
        return (z @ self.first.T).view(h.shape[0], -1), (z, tail, *chosen)

    def pull(self, p: Tensor, h: Tensor, slab: Tensor, saved: tuple[Tensor, ...], dh: Tensor) -> None:
        """Add the gradients for a gradient p (n, c) of the logits to dh and to the sums of the cores."""
        z, tail, *chosen = saved
        p = p.view(-1, self.count)
        self.sums[0].addmm_(p.T, z)
        dz = (p @ self.first).view(h.shape[0], slab.numel(), self.width, -1).transpose(1, 2)
        dz = dz.reshape(h.shape[0] * self.width, -1)
        dh.view(h.shape[0] * self.width, -1).addmm_(dz, tail)
        dtail = (dz.T @ h.view(dz.shape[0], -1)).view(slab.numel(), -1)
        _add(self.sums[1:], self._digits(slab), eager.chain_gradient(dtail, chosen))

    def start_sums(self) -> None:
        """Begin to add up the gradients of the cores."""
        self.sums = [torch.zeros_like(m) for m in (self.first, *self.tail)]

    def _digits(self, slab: Tensor) -> list[Tensor]:
        return eager.digits(slab, self.cores[1:])


class Dense:
    """The head as one product with the rows of the table; slabs are ranges of ids, columns are ids."""

    def __init__(self, cores: list[Tensor], vocab_size: int, tokens: int, dtype: torch.dtype) -> None:
        self.cores, self.vocab_size = cores, vocab_size
        self.matrices = eager.step_matrices(cores, dtype)
        self.tokens = max(1, min(tokens, DENSE_TOKENS))
        self.step = max(1, TILE_ELEMENTS // max(_width(cores), self.tokens, *(m[0].numel() for m in self.matrices)))

    def slabs(self) -> Iterator[Tensor]:
        """Yield the ids of one slab after the other."""
        return iter(torch.arange(self.vocab_size, device=self.matrices[0].device).split(self.step))

    def ids(self, slab: Tensor) -> Tensor:
        """Return the ids of the columns of a slab."""
        return slab

    def columns(self, ids: Tensor, slab: Tensor) -> tuple[Tensor, Tensor]:
        """Return in which column of the slab each id stands, and whether it stands there at all."""
        place = ids - slab[0]
        inside = (place >= 0) & (place < slab.numel())
        return torch.where(inside, place, 0), inside

    def scores(self, h: Tensor, slab: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the logits (n, c) of h (n, Π w_k) in a slab, and what ``pull`` needs."""
        chosen = [m.index_select(0, part) for m, part in zip(self.matrices, self._digits(slab), strict=True)]
        rows = eager.chain(chosen)
        return h @ rows.T, (rows, *chosen)

    def pull(self, p: Tensor, h: Tensor, slab: Tensor, saved: tuple[Tensor, ...], dh: Tensor) -> None:
        """Add the gradients for a gradient p (n, c) of the logits to dh and to the sums of the cores."""
        rows, *chosen = saved
        dh.addmm_(p, rows)
        _add(self.sums, self._digits(slab), eager.chain_gradient(p.T @ h, chosen))

    def start_sums(self) -> None:
        """Begin to add up the gradients of the cores."""
        self.sums = [torch.zeros_like(m) for m in self.matrices]

    def _digits(self, slab: Tensor) -> list[Tensor]:
        return eager.digits(slab, self.cores)


def choose_walk(hidden: Tensor, cores: list[Tensor], vocab_size: int, tokens: int) -> Factored | Dense:
    """Return the way through the vocabulary that takes fewer products."""
    width, (_, _, rank, first) = _width(cores), cores[0].shape
    tails = math.prod([core.shape[0] for core in cores[1:]])
    factored = min(tails, vocab_size) * rank * width + vocab_size * rank * first
    row, grown = 0, 1
    for core in cores:
        grown *= core.shape[3]
        row += grown * core.shape[1] * core.shape[2]
    dense = vocab_size * (width + row / max(1, min(tokens, DENSE_TOKENS)))
    return (Factored if factored <= dense else Dense)(cores, vocab_size, tokens, _wide_dtype(hidden, cores))


def logits_tiled(hidden: Tensor, cores: list[Tensor], vocab_size: int) -> Tensor:
    """Return the logits (T, V) of hidden (T, D)."""
    walk = choose_walk(hidden, cores, vocab_size, hidden.shape[0])
    out = hidden.new_empty((hidden.shape[0], vocab_size))
    for begin in range(0, hidden.shape[0], walk.tokens):
        h = _wide_rows(hidden[begin : begin + walk.tokens], cores)
        for slab in walk.slabs():
            ids, (score, _) = walk.ids(slab), walk.scores(h, slab)
            valid = ids < vocab_size
            out[begin : begin + walk.tokens, ids[valid]] = score[:, valid].to(out.dtype)
    return out


def logits_gradient_tiled(grad: Tensor, hidden: Tensor, cores: list[Tensor], vocab_size: int) -> list[Tensor]:
    """Return the gradients of hidden and the cores for a gradient (T, V) of the logits."""

    def slope(tokens: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
        chosen = grad[tokens].to(dtype).index_select(1, ids.clamp(max=vocab_size - 1))
        return chosen.masked_fill_(ids >= vocab_size, 0.0)

    dtype = _wide_dtype(hidden, cores)
    walk = choose_walk(hidden, cores, vocab_size, hidden.shape[0])
    return _walk_back(walk, hidden, torch.arange(hidden.shape[0], device=hidden.device), cores, slope)


def cross_entropy_tiled(
    hidden: Tensor, targets: Tensor, cores: list[Tensor], vocab_size: int, ignore: int
) -> tuple[Tensor, Tensor]:
    """Return the loss (T,) and the log-sum-exp (T,) in float64 of each token; both are 0 where a target is ignored."""
    kept = (targets != ignore).nonzero()[:, 0]
    walk = choose_walk(hidden, cores, vocab_size, kept.numel())
    loss = torch.zeros(targets.shape, dtype=_wide_dtype(hidden, cores), device=hidden.device)
    normaliser = torch.zeros_like(loss, dtype=torch.float64)
    for tokens in _split(kept, walk.tokens):
        h = _wide_rows(hidden[tokens], cores)
        peak = torch.full((tokens.numel(), 1), -math.inf, dtype=h.dtype, device=h.device)
        total, aim = torch.zeros_like(peak), torch.zeros_like(peak)
        for slab in walk.slabs():
            score = _masked(walk.scores(h, slab)[0], walk.ids(slab), vocab_size)
            column, inside = walk.columns(targets[tokens], slab)
            aim = torch.where(inside[:, None], score.gather(1, column[:, None]), aim)
            higher = torch.maximum(peak, score.amax(1, keepdim=True))
            total = total * (peak - higher).exp_() + score.sub_(higher).exp_().sum(1, keepdim=True)
            peak = higher
        normaliser[tokens] = (peak.double() + total.double().log())[:, 0]
        loss[tokens] = (peak - aim + total.log())[:, 0]
    return loss, normaliser


def cross_entropy_gradient_tiled(
    grad: Tensor, hidden: Tensor, targets: Tensor, normaliser: Tensor, cores: list[Tensor], vocab_size: int, ignore: int
) -> list[Tensor]:
    """Return the gradients of hidden and the cores: softmax minus the target, slab by slab, never stored whole."""

    def slope(tokens: Tensor, ids: Tensor, slab: Tensor, score: Tensor) -> Tensor:
        exponent = _masked(score, ids, vocab_size).sub_(high[tokens, None]).sub_(low[tokens, None])
        column, inside = walk.columns(targets[tokens], slab)
        aim = exponent.gather(1, column[:, None])
        # At the target p − 1 without cancellation; elsewhere p.
        aim = torch.where(inside[:, None], aim.expm1(), aim.exp())
        return exponent.exp_().scatter_(1, column[:, None], aim).mul_(grad[tokens, None])

    high = normaliser.to(_wide_dtype(hidden, cores))
    low = (normaliser - high).to(high.dtype)
    kept = (targets != ignore).nonzero()[:, 0]
    walk = choose_walk(hidden, cores, vocab_size, kept.numel())
    return _walk_back(walk, hidden, kept, cores, slope)


def topk_tiled(hidden: Tensor, cores: list[Tensor], k: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits and their ids (T, k), largest first; ties go to the lower id."""
    walk = choose_walk(hidden, cores, vocab_size, hidden.shape[0])
    values = hidden.new_empty((hidden.shape[0], k))
    found = torch.empty((hidden.shape[0], k), dtype=torch.int64, device=hidden.device)
    for begin in range(0, hidden.shape[0], walk.tokens):
        h = _wide_rows(hidden[begin : begin + walk.tokens], cores)
        best = h.new_empty((h.shape[0], 0)), found.new_empty((h.shape[0], 0))
        for slab in walk.slabs():
            ids = walk.ids(slab)
            score = _masked(walk.scores(h, slab)[0], ids, vocab_size)
            joined = torch.cat((best[0], score), 1), torch.cat((best[1], ids.expand(h.shape[0], -1)), 1)
            best = _largest(*joined, min(k, joined[0].shape[1]))
        values[begin : begin + walk.tokens], found[begin : begin + walk.tokens] = best[0].to(hidden.dtype), best[1]
    return values, found


def _largest(score: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row and their ids, by value and then by id; NaN counts as largest."""
    ids, by_id = ids.sort(1)
    score = score.gather(1, by_id)
    least = score.topk(k).values[:, -1:]
    above = (score > least) | (score.isnan() & ~least.isnan())
    level = (score == least) | (score.isnan() & least.isnan())
    chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    score, ids = score[chosen].view(-1, k), ids[chosen].view(-1, k)
    score, order = score.sort(dim=1, descending=True, stable=True)
    return score, ids.gather(1, order)


def _walk_back(walk: Any, hidden: Tensor, kept: Tensor, cores: list[Tensor], slope: Any) -> list[Tensor]:
    """Return the gradients of hidden and the cores, given the gradient of the logits of the kept tokens in a slab."""
    out = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    walk.start_sums()
    for tokens in _split(kept, walk.tokens):
        h = _wide_rows(hidden[tokens], cores)
        dh = torch.zeros_like(h)
        for slab in walk.slabs():
            score, saved = walk.scores(h, slab)
            walk.pull(slope(tokens, walk.ids(slab), slab, score), h, slab, saved, dh)
        out[tokens] = dh[:, : hidden.shape[1]].to(out.dtype)
    # A train of one core has a second sum, of the core of ones that stands behind it.
    return [out, *(eager.core_shaped(acc, core) for acc, core in zip(walk.sums, cores, strict=False))]


def _wide_logits(hidden: Tensor, cores: list[Tensor], vocab_size: int) -> Tensor:
    """Return the logits (T, V) in the accumulation dtype, contracted core by core from the last."""
    state = _wide_rows(hidden, cores)[:, :, None, None]
    for core in reversed(cores):
        state = state.unflatten(1, (-1, core.shape[3]))
        state = torch.einsum("tpwjr,vsrw->tpvjs", state, core.to(state.dtype)).flatten(2, 3)
    return state[:, 0, :vocab_size, 0]


def _wide_rows(hidden: Tensor, cores: list[Tensor]) -> Tensor:
    """Return hidden (n, D) in the accumulation dtype with zeros up to the width of the cores."""
    wide = hidden.to(_wide_dtype(hidden, cores))
    return pad(wide, (0, _width(cores) - hidden.shape[1])).contiguous()


def _wide_dtype(hidden: Tensor, cores: list[Tensor]) -> torch.dtype:
    return accumulation_dtype(torch.promote_types(hidden.dtype, cores[0].dtype))


def _width(cores: list[Tensor]) -> int:
    return math.prod([core.shape[3] for core in cores])


def _masked(score: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """Set the columns of ids that do not exist to −∞, in place."""
    outside = ids >= vocab_size
    if ids.device.type != "cpu":
        return score.masked_fill_(outside, -math.inf)
    # few columns or none: not worth a walk through all
    return score.index_fill_(1, outside.nonzero()[:, 0], -math.inf)


def _split(kept: Tensor, tokens: int) -> tuple[Tensor, ...]:
    return kept.split(tokens) if kept.numel() else ()


def _add(sums: list[Tensor], parts: list[Tensor], shares: list[Tensor]) -> None:
    """Add each share to the slices of a core that it belongs to."""
    for acc, part, share in zip(sums, parts, shares, strict=True):
        acc.flatten(1).index_add_(0, part, share.flatten(1))
