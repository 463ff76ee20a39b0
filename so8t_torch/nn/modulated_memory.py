"""A fast-weight memory that is judged where a chunk of tokens begins: noise is forgotten faster, faint modes fade.

    S = state that enters a chunk of C tokens of a document, counted from its first token; the first chunk has S = 0
    Γ_t ↦ Γ_t (1 + e^Γ),  η_t ↦ η_t (1 + e^η)  for its tokens     (e from the signal-to-noise ratios of S; 0 for S = 0)
    S ↦ resonance(S)                                               before the first of them
    adaptive time steps: Γ_t ↦ Γ_t δ_t,  η_t ↦ η_t δ_t,  δ_t = softplus(affine in x_t)/softplus(bias at the start)

Symbols: S (B, H, K, V); Γ decay and η strength of tokens (B, N, H); e ≥ 0 excesses (B, H). What a chunk works with
depends on the tokens before it alone. A piece of a call may begin anywhere inside a chunk: state and excesses are
carried, and are zero where a document begins.
Cost: the recurrence in runs of up to C tokens that end where a chunk does, and one judgement per chunk. Where chunks of
rows end at different tokens, which packed documents or unequal rows make them do, runs go through the recurrence twice.
Marks of rows that begin with the call wait for no device. Those of others are read, once for all memories that take
them, so that a token that comes alone is judged only where a chunk begins; compiled and captured graphs cannot read,
and judge every token that comes alone.
Layers: so8t_torch/nn/hebbian.py, memory_selection.py, memory_resonance.py. Derivation: docs/math/hebbian.md.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.core.readable import readable
from so8t_torch.nn.hebbian import DissipativeHebbianLayer, Tokens
from so8t_torch.nn.memory_resonance import MemoryResonanceLayer
from so8t_torch.nn.memory_selection import SNRMemoryFilter

__all__ = ["Marks", "MemoryState", "ModulatedMemory", "mark", "may_be_set"]


class MemoryState(NamedTuple):
    """What tokens leave for later ones; zeros at the beginning of a document.

    Attributes:
        weights: S (B, H, K, V).
        excess: e^Γ and e^η of the chunk that is under way (B, H, 2).
    """

    weights: Tensor
    excess: Tensor


_Run = tuple[dict[str, Tensor], MemoryState]
"""What tokens read and worked with, and the state after them."""


class Marks(NamedTuple):
    """Where documents and chunks begin.

    Attributes:
        starts: the token is the first of a document (B, N).
        turns: the token is the first of a chunk, and not of a document (B, N).
        real: False where the token is padding, behind the others of its row (B, N); nothing where none is.
        documents: number of the document of each token (B, N); nothing where none begins inside the call.
        lead: tokens before the first that may begin a chunk, the same in all rows; nothing where that is unknown or
            rows differ.
        turning: whether the first token of a row may begin a chunk that is not a document's first.
    """

    starts: Bool[Tensor, "b n"]
    turns: Bool[Tensor, "b n"]
    real: Bool[Tensor, "b n"] | None
    documents: Int[Tensor, "b n"] | None
    lead: int | None
    turning: bool

    def runs(self, chunk: int) -> list[slice]:
        """Return runs of up to C tokens: from boundary to boundary where those are known."""
        length = self.starts.shape[1]
        ends = [0, *range(self.lead or chunk, length, chunk), length]
        return [slice(*pair) for pair in pairwise(ends)]

    def piece(self, places: slice) -> Marks:
        """Return the marks of the tokens of a run."""
        real, documents = (None if part is None else part[:, places] for part in (self.real, self.documents))
        lead = None if self.lead is None else 0
        turning = self.turning or places.start > 0
        return Marks(self.starts[:, places], self.turns[:, places], real, documents, lead, turning)

    def before_turns(self) -> Marks:
        """Return the marks with all tokens from the first turn on as padding."""
        early = self.turns.long().cumsum(1) == 0
        real = early if self.real is None else early & self.real
        documents = _up_to(self.documents, ~early)
        return Marks(self.starts & early, torch.zeros_like(early), real, documents, self.lead, turning=False)


def mark(
    positions: Int[Tensor, "b n"],
    chunk: int,
    *,
    real: Bool[Tensor, "b n"] | None = None,
    documents: Int[Tensor, "b n"] | None = None,
    fresh: bool = False,
    looking: bool = True,
) -> Marks:
    """Return where documents and chunks begin.

    Args:
        positions: of each token in its document.
        chunk: C.
        real: False where a token is padding.
        documents: number of each token's document, that of the token before for padding.
        fresh: whether all rows begin with the call.
        looking: whether it is worth a wait to know which places of a chunk the rows begin at, if they are not fresh.
    """
    starts, turns = positions == 0, (positions > 0) & (positions % chunk == 0)
    if real is not None:
        starts, turns = starts & real, turns & real
    single = positions.shape[1] == 1
    lead, turning = 0 if single or (fresh and documents is None) else None, not fresh
    if looking and not fresh and (single or documents is None) and readable(positions, waiting=True):
        behind, first = torch.stack([positions[:, 0] % chunk, turns[:, 0]]).tolist()
        if len(set(behind)) == 1 and not single:
            lead = -behind[0] % chunk
        turning = any(first)
    return Marks(starts, turns, real, documents, lead, turning)


class ModulatedMemory(nn.Module):
    """A memory whose rates, strengths and modes depend on the state that enters a chunk.

    Args:
        hebbian: the memory; its rates come with every call.
        snr: judges noise; none for rates as they are.
        resonance: attenuates modes; none for states as they are.
        chunk: C, a power of two.
        adaptive_time_step: tokens have time steps of their own, equal to the memory's at the start on average.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        hebbian: DissipativeHebbianLayer,
        snr: SNRMemoryFilter | None = None,
        resonance: MemoryResonanceLayer | None = None,
        *,
        chunk: int = 128,
        adaptive_time_step: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hebbian, self.snr, self.resonance, self.chunk = hebbian, snr, resonance, chunk
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.time_step = nn.Linear(hebbian.d_model, hebbian.num_heads, **kind) if adaptive_time_step else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set time steps to one on average; the parts reset their own parameters."""
        if self.time_step is not None:
            nn.init.normal_(self.time_step.weight, std=0.1 * self.hebbian.d_model**-0.5)
            nn.init.constant_(self.time_step.bias, math.log(math.expm1(1.0)))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        gamma: Float[Tensor, "b n h"],
        state: MemoryState,
        marks: Marks,
        *,
        keyed: Float[Tensor, "b n d"] | None = None,
        monitored: bool = False,
    ) -> tuple[Float[Tensor, "b n d"], MemoryState, dict[str, Tensor]]:
        """Return the mixed tokens, the state after them, and what they worked with.

        Args:
            x: activations.
            gamma: decay rates per unit of time.
            state: zeros at the beginning.
            marks: of the tokens.
            keyed: what keys are made of; x without.
            monitored: whether the last part of what is returned has the books of the memory as well.

        Returns:
            Tokens; state; and detached (B, N, H): ``decay`` and ``eta`` as they acted, and, with ``monitored``,
            ``energy``, ``entering``, ``dissipation``, ``supply``, and ``bound`` of ‖S‖ for the rule "hebb".
        """
        tokens = self.tokens(x, gamma, marks, keyed=keyed)
        judges, found = self.snr is not None or self.resonance is not None, []
        run = (self._broken_run if marks.lead is None else self._aligned_run) if judges else self._plain_run
        runs = marks.runs(self.chunk) if judges else [slice(0, x.shape[1])]
        sizes = [places.stop - places.start for places in runs]
        # split and not cut out one by one: the gradients of pieces are joined once, not added as rows full of zeros
        pieces = zip(*(part.split(sizes, 1) for part in tokens), strict=True)
        for places, piece in zip(runs, pieces, strict=True):
            worked, state = run(Tokens(*piece), state, marks.piece(places), monitored)
            found.append(worked)
        worked = {name: _joined([part[name] for part in found]) for name in found[0]}
        return self.hebbian.output(worked.pop("read")), state, worked

    def tokens(
        self,
        x: Float[Tensor, "b n d"],
        gamma: Float[Tensor, "b n h"],
        marks: Marks,
        *,
        keyed: Float[Tensor, "b n d"] | None = None,
    ) -> Tokens:
        """Return what the memory would work with if nothing were judged; the arguments are those of ``forward``."""
        return self._stepped(x, marks.real, self.hebbian.tokens(x, marks.real, gamma, keyed))

    def judge(self, weights: Float[Tensor, "b h k v"]) -> MemoryState:
        """Return the state that a chunk begins with instead of this one, and its excesses."""
        excess = weights.new_zeros(*weights.shape[:2], 2)
        with without_autocast(weights.device):
            if self.snr is not None:
                one = weights.new_ones(len(weights), 1, weights.shape[1])
                found = self.snr(weights, one, one)
                weights, excess = found.state, torch.stack([found.decay[:, 0], found.eta[:, 0]], -1) - 1.0
            if self.resonance is not None:
                weights, _ = self.resonance(weights)
        return MemoryState(weights, excess)

    def _plain_run(self, tokens: Tokens, state: MemoryState, marks: Marks, monitored: bool) -> _Run:
        """Run without judgements, where only beginnings of documents matter."""
        weights = _where(marks.starts[:, 0], torch.zeros_like(state.weights), state.weights)
        worked, weights = self._recur(tokens, weights, marks.documents, monitored)
        return worked, state._replace(weights=weights)

    def _aligned_run(self, tokens: Tokens, state: MemoryState, marks: Marks, monitored: bool) -> _Run:
        """Run tokens of one chunk: the rows that turn do so at the first."""
        if marks.turning:
            state = _chosen(marks.turns[:, 0], self.judge(state.weights), state)
        worked, weights = self._recur(_modulated(tokens, state.excess[:, None]), state.weights, None, monitored)
        return worked, state._replace(weights=weights)

    def _broken_run(self, tokens: Tokens, state: MemoryState, marks: Marks, monitored: bool) -> _Run:
        """Run up to C tokens, among which each row turns once or not at all, and before any document begins."""
        state = _chosen(marks.starts[:, 0], MemoryState(*map(torch.zeros_like, state)), state)
        turned, begun = (part.long().cumsum(1) > 0 for part in (marks.turns, marks.starts))
        early = _kept(_modulated(tokens, _unless(begun, state.excess)), ~turned)
        worked, weights = self._recur(early, state.weights, _up_to(marks.documents, turned), monitored)
        if may_be_set(turned):
            judged = self.judge(weights)
            late = _kept(_modulated(tokens, _unless(begun, judged.excess)), turned)
            after, later = self._recur(late, judged.weights, marks.documents, monitored)
            worked = {name: _where(turned, after[name], part) for name, part in worked.items()}
            state = _chosen(turned[:, -1], judged._replace(weights=later), state._replace(weights=weights))
        else:
            state = state._replace(weights=weights)
        return worked, state._replace(excess=_unless(begun[:, -1], state.excess)[:, 0])

    def _recur(
        self, tokens: Tokens, weights: Tensor, documents: Tensor | None, monitored: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return what tokens read and worked with, and the state after them."""
        worked = {"decay": tokens.decay.detach(), "eta": tokens.eta.detach()}
        if monitored:
            worked |= self.hebbian.books(tokens, weights, documents)
        if tokens.v.shape[1] == 1:
            worked["read"], weights = self.hebbian.recur_step(tokens, weights)
        else:
            worked["read"], weights = self.hebbian.recur(tokens, weights, documents)
        return worked, weights

    def _stepped(self, x: Tensor, real: Tensor | None, tokens: Tokens) -> Tokens:
        """Return tokens with time steps of their own, whatever stands where padding is."""
        if self.time_step is None:
            return tokens
        if real is not None:
            x = torch.where(real[..., None], x, 0.0)
        with without_autocast(x.device):
            raw = self.time_step(x.to(self.time_step.weight.dtype)).to(accumulation_dtype(x.dtype))
        step = softplus(raw)
        return tokens._replace(decay=tokens.decay * step, eta=tokens.eta * step)


def _modulated(tokens: Tokens, excess: Tensor) -> Tokens:
    """Return tokens with rates and strengths that are higher by excesses (B, 1 or N, H, 2)."""
    factors = 1.0 + excess
    return tokens._replace(decay=tokens.decay * factors[..., 0], eta=tokens.eta * factors[..., 1])


def _kept(tokens: Tokens, where: Tensor) -> Tokens:
    """Return tokens of which only some have an effect."""
    decay, eta = (torch.where(where[..., None], part, 0.0) for part in (tokens.decay, tokens.eta))
    return tokens._replace(decay=decay, eta=eta)


def _unless(begun: Tensor, excess: Tensor) -> Tensor:
    """Return excesses (B, N, H, 2) of tokens (B, N) or of a row (B,): none once another document has begun."""
    marks = begun if begun.ndim == 2 else begun[:, None]
    return torch.where(marks[..., None, None], 0.0, excess[:, None])


def _up_to(documents: Tensor | None, turned: Tensor) -> Tensor | None:
    """Return the numbers of documents, without those that begin after a turn."""
    return None if documents is None else torch.where(turned, documents[:, :1], documents)


def _chosen(rows: Tensor, yes: MemoryState, no: MemoryState) -> MemoryState:
    """Return one state for some rows, and another one for the others."""
    return MemoryState(*(_where(rows, *pair) for pair in zip(yes, no, strict=True)))


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition.reshape(*condition.shape, *(1,) * (yes.ndim - condition.ndim)), yes, no)


def _joined(parts: Any) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def may_be_set(marks: Tensor) -> bool:
    """Return whether a mark of a run is set; off the CPU, where a wait in every run costs too much, that one may be."""
    return not readable(marks) or bool(marks.any())
