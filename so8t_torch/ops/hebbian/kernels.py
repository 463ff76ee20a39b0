"""Triton kernels of the dissipative fast weights: chunks of tokens by matrix products, states carried between chunks.

    S_t = a_t S_{t−1} + η_t k_t v_tᵀ,   y_t = S_tᵀ q_t           D_is = Π_{s<m≤i} a_m where s ≤ i, else nothing
    Λ_t = q_t ȳ_tᵀ + a_{t+1} Λ_{t+1}:   ∂k_t = η_t Λ_t v_t,   ∂v_t = η_t Λ_tᵀ k_t,   ∂log a_t = a_t ⟨Λ_t, S_{t−1}⟩

``walk_kernel`` carries the state from chunk to chunk, or its adjoint back; it is all that is serial, and stores what
enters each chunk. ``read_kernel`` then makes y, and with other arguments ∂q, ∂k, ∂v; ``gates_kernel`` makes the rest.
Every exponent is a sum of log decays, never a difference of two sums: log a = −∞ is exact, and nothing that lies
beyond a sum enters it. ∂log a_t is summed over the pairs s < t ≤ i that the decay lies between, so that nothing cancels
and a decay of zero has a gradient of exactly zero. What a token does not reach is selected, not multiplied by zero.
"""

# Triton reads a kernel's annotations itself: only ``tl.constexpr`` may stand there.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import Tile, launch
from so8t_torch.core.rounding import rounded

CHUNKS = (16, 32, 64)
"""Tokens per chunk for which there are kernels."""
PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32x3", torch.float32: "tf32x3", torch.float64: "ieee"}
"""How products of matrices are rounded: always finer than the stored dtype."""


def _tile(warps: int, bk: int, bv: int, **constants: int) -> Tile:
    return Tile(warps=warps, constants={**constants, "BK": bk, "BV": bv})


WALK_TILES = {
    "tf32": (_tile(4, 32, 32), _tile(8, 32, 64)),
    "tf32x3": (_tile(4, 32, 32), _tile(8, 32, 64)),
    "ieee": (_tile(8, 16, 32),),
}
"""How products are rounded → tiles."""
READ_TILES = {
    "tf32": (_tile(4, 32, 64, ROWS=32), _tile(4, 64, 64, ROWS=16)),
    "tf32x3": (_tile(8, 32, 64, ROWS=32), _tile(4, 32, 64, ROWS=16)),
    "ieee": (_tile(8, 16, 16, ROWS=16),),
}
GATES_TILES = {2: (_tile(8, 16, 32),), 4: (_tile(8, 16, 16),), 8: (_tile(8, 16, 16),)}
"""Bytes per element → tiles."""


@triton.jit
def _tokens(ptr, rows, columns, stride, inside, width, ACC: tl.constexpr):
    """Return [tokens, columns] of one chunk in the accumulation dtype, zeros outside."""
    at = ptr + rows[:, None] * stride + columns[None, :]
    return tl.load(at, mask=inside[:, None] & (columns < width)[None, :], other=0.0).to(ACC)


@triton.jit
def _state(ptr, a, b, stride_a, stride_b, wide_a, wide_b):
    """Return [a, b] of a state, or of its transpose, zeros outside."""
    at = ptr + a[:, None] * stride_a + b[None, :] * stride_b
    return tl.load(at, mask=(a < wide_a)[:, None] & (b < wide_b)[None, :], other=0.0)


@triton.jit
def _gates(log_ptr, eta_ptr, reset_ptr, rows, stride, inside, RESETS: tl.constexpr):
    """Return log decays, strengths, and where the state that enters is dropped (0 and 1) of one chunk."""
    log_decay = tl.load(log_ptr + rows * stride, mask=inside, other=0.0)
    eta = tl.load(eta_ptr + rows * stride, mask=inside, other=0.0)
    reset = rows * 0
    if RESETS:
        reset = tl.load(reset_ptr + rows, mask=inside, other=0).to(tl.int32)
    return log_decay, eta, reset


@triton.jit
def _arriving(log_decay, reset):
    """Return what is left at each token of the state that enters the chunk, and whether no reset lies before."""
    return tl.exp(tl.cumsum(log_decay, 0)), tl.cumsum(reset.to(tl.float32), 0) == 0.0


@triton.jit
def _leaving(log_ptr, rows, stride, inside, reset, C: tl.constexpr):
    """Return what is left of each token at the end of the chunk, and whether no reset lies behind."""
    behind = (rows + 1 < C) & inside
    later = tl.load(log_ptr + (rows + 1) * stride, mask=behind, other=0.0)
    return tl.exp(tl.cumsum(later, 0, reverse=True)), rows >= tl.max(reset * rows + reset - 1, 0)


@triton.jit
def _decays(log_ptr, reset_ptr, tokens, stride, left, C: tl.constexpr, ADJOINT: tl.constexpr, RESETS: tl.constexpr):
    """Return D between tokens and those behind them, or ahead of them where ADJOINT, and which of those are reached.

    What lies between is added up from the token outwards.
    """
    others = tl.arange(0, C)
    t = tokens[:, None]
    reset = others * 0
    if RESETS:
        reset = tl.load(reset_ptr + others, mask=others < left, other=0).to(tl.int32)
    if ADJOINT:
        between = tl.load(log_ptr + others * stride, mask=others < left, other=0.0)
        reached = others[None, :] >= t
        sums = tl.cumsum(tl.where(others[None, :] > t, between[None, :], 0.0), 1)
        if RESETS:
            cuts = tl.where(others[None, :] > t, reset[None, :], 0)
            reached = reached & (tl.cumsum(cuts.to(tl.float32), 1) == 0.0)
    else:
        between = tl.load(log_ptr + (others + 1) * stride, mask=others + 1 < left, other=0.0)
        reached = others[None, :] <= t
        sums = tl.cumsum(tl.where(others[None, :] < t, between[None, :], 0.0), 1, reverse=True)
        if RESETS:
            last = tl.max(tl.where((reset[None, :] > 0) & reached, others[None, :], -1), 1)
            reached = reached & (others[None, :] >= last[:, None])
    return tl.exp(tl.where(reached, sums, float("-inf"))), reached


@triton.jit
def _dot(x, y, total, PRECISION: tl.constexpr):
    return tl.dot(x, y, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _mix(weights, reached, x, total, C: tl.constexpr, PRECISION: tl.constexpr):
    """Return total + weights x; what is not finite in x arrives at the tokens that it reaches and at no other."""
    others = tl.arange(0, C)
    bad = x - x != 0.0
    total = _dot(weights, tl.where(bad, 0.0, x), total, PRECISION)
    if tl.max(tl.max(bad.to(tl.int32), 1), 0) > 0:
        for j in range(C):
            own = others[None, :] == j
            weight = tl.sum(tl.where(own, weights, 0.0), 1)
            arrives = tl.sum((own & reached).to(tl.int32), 1) > 0
            row = tl.sum(tl.where(others[:, None] == j, x, 0.0), 0)
            bad_row = row - row != 0.0
            total += tl.where(arrives[:, None] & bad_row[None, :], weight[:, None] * row[None, :], 0.0)
    return total


@triton.jit
def walk_kernel(
    x_ptr, z_ptr, log_ptr, eta_ptr, reset_ptr, start_ptr, states_ptr, end_ptr, length, heads, dk, dv, chunks,
    FLOAT64: tl.constexpr, ADJOINT: tl.constexpr, STARTED: tl.constexpr, RESETS: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write the state that enters every chunk and the last one, from k and v; its adjoint, from q and dy."""
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    n = tl.program_id(0).to(tl.int64)
    a = tl.program_id(1) * BK + tl.arange(0, BK)
    b = tl.program_id(2) * BV + tl.arange(0, BV)
    within = (a < dk)[:, None] & (b < dv)[None, :]
    at = a[:, None] * dv + b[None, :]
    rows = tl.arange(0, C)
    size = dk * dv
    state = tl.zeros([BK, BV], ACC)
    if STARTED:
        state = tl.load(start_ptr + n * size + at, mask=within, other=0.0)
    for step in range(chunks):
        chunk = step
        if ADJOINT:
            chunk = chunks - 1 - step
        tl.store(states_ptr + ((n // heads * chunks + chunk) * heads + n % heads) * size + at, state, mask=within)
        token = ((n // heads) * length + chunk * C) * heads + n % heads
        inside = chunk * C + rows < length
        behind = chunk * C + rows + 1 < length
        resets = reset_ptr + (n // heads) * length + chunk * C
        log_decay, eta, reset = _gates(
            log_ptr + token, eta_ptr + token, resets, rows, heads, inside, RESETS
        )  # fmt: skip
        if ADJOINT:
            weight, kept = _arriving(log_decay, reset)
        else:
            weight, kept = _leaving(log_ptr + token, rows, heads, behind, reset, C)
            weight *= eta
        x = _tokens(x_ptr + token * dk, rows, a, heads * dk, inside, dk, ACC) * weight[:, None]
        z = _tokens(z_ptr + token * dv, rows, b, heads * dv, inside, dv, ACC)
        state *= tl.exp(tl.sum(log_decay, 0))
        if RESETS:
            x = tl.where(kept[:, None], x, 0.0)
            z = tl.where(kept[:, None], z, 0.0)
            state = tl.where(tl.max(reset, 0) > 0, 0.0, state)
        state = _dot(tl.trans(x), z, state, PRECISION)
    tl.store(end_ptr + n * size + at, state, mask=within)


@triton.jit
def read_kernel(
    own_ptr, other_ptr, x_ptr, log_ptr, eta_ptr, reset_ptr, states_ptr, y_ptr, length, heads, dk, dv, chunks,
    stride_a, stride_b, FLOAT64: tl.constexpr, ADJOINT: tl.constexpr, RESETS: tl.constexpr, INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write what tokens read of x: y and ∂q of what is behind them, ∂v and ∂k, where ADJOINT, of what is ahead.

        y_i = Σ_s D_is η_s (q_i·k_s) x_s + a_i… Sᵀq_i        ADJOINT: y_s = η_s (Σ_i D_is (q_i·k_s) x_i + a_s… Λᵀk_s)
    """  # fmt: skip
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    chunk = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    b = tl.program_id(1) * BV + tl.arange(0, BV)
    tokens = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    others = tl.arange(0, C)
    left = tl.minimum(length - chunk * C, C)
    first = ((n // heads) * length + chunk * C) * heads + n % heads
    reset_ptr += (n // heads) * length + chunk * C
    states_ptr += ((n // heads * chunks + chunk) * heads + n % heads) * dk * dv
    scores = tl.zeros([ROWS, C], ACC)
    y = tl.zeros([ROWS, BV], ACC)
    for start in range(0, dk, BK):
        a = start + tl.arange(0, BK)
        own = _tokens(own_ptr + first * dk, tokens, a, heads * dk, tokens < left, dk, ACC)
        other = _tokens(other_ptr + first * dk, others, a, heads * dk, others < left, dk, ACC)
        scores = _dot(own, tl.trans(other), scores, PRECISION)
        y = _dot(own, _state(states_ptr, a, b, stride_a, stride_b, dk, dv), y, PRECISION)
    decays, reached = _decays(log_ptr + first, reset_ptr, tokens, heads, left, C, ADJOINT, RESETS)
    scores *= decays
    log_decay, eta, reset = _gates(log_ptr + first, eta_ptr + first, reset_ptr, others, heads, others < left, RESETS)
    passed = others[None, :] <= tokens[:, None]
    if ADJOINT:
        passed = others[None, :] > tokens[:, None]
    else:
        scores *= eta[None, :]
    y *= tl.exp(tl.sum(tl.where(passed, log_decay[None, :], 0.0), 1))[:, None]
    if RESETS:
        y = tl.where((tl.max(tl.where(passed, reset[None, :], 0), 1) == 0)[:, None], y, 0.0)
    x = _tokens(x_ptr + first * dv, others, b, heads * dv, others < left, dv, ACC)
    y = _mix(tl.where(reached, scores, 0.0), reached, x, y, C, PRECISION)
    if ADJOINT:
        y *= tl.load(eta_ptr + first + tokens * heads, mask=tokens < left, other=0.0)[:, None]
    at = y_ptr + first * dv + tokens[:, None] * (heads * dv) + b[None, :]
    in_range = (tokens < left)[:, None] & (b < dv)[None, :]
    tl.store(at, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), mask=in_range)


@triton.jit
def _scores(x_ptr, z_ptr, rows, stride, inside, width, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Return x_i·z_s."""
    scores = tl.zeros([C, C], ACC)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _tokens(x_ptr, rows, columns, stride, inside, width, ACC)
        z = _tokens(z_ptr, rows, columns, stride, inside, width, ACC)
        scores = _dot(x, tl.trans(z), scores, PRECISION)
    return scores


@triton.jit
def gates_kernel(
    q_ptr, k_ptr, v_ptr, dy_ptr, log_ptr, eta_ptr, reset_ptr, states_ptr, adjoints_ptr, dlog_ptr, deta_ptr,
    length, heads, dk, dv, chunks, FLOAT64: tl.constexpr, RESETS: tl.constexpr,
    PRECISION: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write the gradients of log decays and strengths of one chunk.

        ∂η_s = Σ_i N_is + w_s,  N_is = D_is (q_i·k_s)(ȳ_i·v_s)    ∂log a_t = Σ_{s<t≤i} N_is η_s + Σ_{i≥t} r_i
        r_i = a_i… q_iᵀ S ȳ_i,  w_s = a_s… k_sᵀ Λ v_s                        + Σ_{s<t} w_s η_s + a… ⟨Λ, S⟩
    """  # fmt: skip
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    chunk = tl.program_id(0) % chunks
    n = (tl.program_id(0) // chunks).to(tl.int64)
    rows = tl.arange(0, C)
    inside = chunk * C + rows < length
    token = ((n // heads) * length + chunk * C) * heads + n % heads
    states_ptr += ((n // heads * chunks + chunk) * heads + n % heads) * dk * dv
    adjoints_ptr += ((n // heads * chunks + chunk) * heads + n % heads) * dk * dv
    resets = reset_ptr + (n // heads) * length + chunk * C
    log_decay, eta, reset = _gates(log_ptr + token, eta_ptr + token, resets, rows, heads, inside, RESETS)
    both = _scores(q_ptr + token * dk, k_ptr + token * dk, rows, heads * dk, inside, dk, C, BK, ACC, PRECISION)
    both *= _scores(dy_ptr + token * dv, v_ptr + token * dv, rows, heads * dv, inside, dv, C, BV, ACC, PRECISION)
    tokens = tl.minimum(length - chunk * C, C)
    decays, reached = _decays(log_ptr + token, resets, rows, heads, tokens, C, False, RESETS)
    both = tl.where(reached, both * decays, 0.0)
    deta = tl.sum(both, 0)
    t = rows[:, None]
    s = rows[None, :]
    behind = tl.cumsum(tl.where(t > s, both * eta[None, :], 0.0), 0, reverse=True)
    dlog = tl.sum(tl.where(t > s, behind, 0.0), 1)
    read = tl.zeros([C], ACC)
    written = tl.zeros([C], ACC)
    through = tl.zeros([BV], ACC)
    for first in range(0, dv, BV):
        b = first + tl.arange(0, BV)
        y = tl.zeros([C, BV], ACC)
        z = tl.zeros([C, BV], ACC)
        for start in range(0, dk, BK):
            a = start + tl.arange(0, BK)
            state = _state(states_ptr, a, b, dv, 1, dk, dv)
            adjoint = _state(adjoints_ptr, a, b, dv, 1, dk, dv)
            through += tl.sum(state * adjoint, 0)
            y = _dot(_tokens(q_ptr + token * dk, rows, a, heads * dk, inside, dk, ACC), state, y, PRECISION)
            z = _dot(_tokens(k_ptr + token * dk, rows, a, heads * dk, inside, dk, ACC), adjoint, z, PRECISION)
        read += tl.sum(y * _tokens(dy_ptr + token * dv, rows, b, heads * dv, inside, dv, ACC), 1)
        written += tl.sum(z * _tokens(v_ptr + token * dv, rows, b, heads * dv, inside, dv, ACC), 1)
    passed = tl.sum(through, 0) * tl.exp(tl.sum(log_decay, 0))
    arrived, kept = _arriving(log_decay, reset)
    read = tl.where(kept, read * arrived, 0.0)
    left, kept = _leaving(log_ptr + token, rows, heads, chunk * C + rows + 1 < length, reset, C)
    written = tl.where(kept, written * left, 0.0)
    if RESETS:
        passed = tl.where(tl.max(reset, 0) > 0, 0.0, passed)
    stored = tl.sum(tl.where(t > s, (written * eta)[None, :], 0.0), 1)
    dlog += tl.cumsum(read, 0, reverse=True) + stored + passed
    tl.store(deta_ptr + token + rows * heads, deta + written, mask=inside)
    tl.store(dlog_ptr + token + rows * heads, dlog, mask=inside)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    eta: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, T, H, Dv) in the dtype of v, the last state, and the state that enters each chunk.

    States are float32, or float64 for float64: (B, H, Dk, Dv) and (B, ⌈T / chunk⌉, H, Dk, Dv).

    Args:
        q: queries (B, T, H, Dk), of one dtype with k and v.
        k: keys (B, T, H, Dk).
        v: values (B, T, H, Dv).
        log_decay: log a_t ≤ 0 (B, T, H); −∞ where a_t = 0.
        eta: strengths of the writes (B, T, H).
        initial: the state that enters (B, H, Dk, Dv); zero by default.
        reset: where the state that enters a token is dropped (B, T).
        chunk: tokens per chunk, one of ``CHUNKS``.
    """
    run = _Run(k, v, log_decay, eta, reset, chunk)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    final, states = run.walk(k, v, initial, adjoint=False)
    y = torch.empty_like(v)
    run.read(q, k, v, states, y)
    return y, final.to(v.dtype if initial is None else initial.dtype), states


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    eta: Tensor,
    initial: Tensor | None,
    reset: Tensor | None,
    chunk_states: Tensor | None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v in their dtype, of log_decay, eta and initial in float32 or float64.

    Args:
        dy: gradient of y.
        dfinal: gradient of the last state; zero by default.
        q: as in ``forward``.
        k: as in ``forward``.
        v: as in ``forward``.
        log_decay: as in ``forward``.
        eta: as in ``forward``.
        initial: as in ``forward``; the gradient is returned without it too.
        reset: as in ``forward``.
        chunk_states: what ``forward`` returned; computed again without.
        chunk: as in ``forward``.
    """
    run = _Run(k, v, log_decay, eta, reset, chunk)
    q, k, v, dy = q.contiguous(), k.contiguous(), v.contiguous(), dy.to(v.dtype).contiguous()
    states = run.walk(k, v, initial, adjoint=False)[1] if chunk_states is None else chunk_states.contiguous()
    dinitial, adjoints = run.walk(q, dy, dfinal, adjoint=True)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    run.read(dy, v, k, states, dq, transposed=True)
    run.read(v, dy, q, adjoints, dk, adjoint=True, transposed=True)
    run.read(k, q, dy, adjoints, dv, adjoint=True)
    dlog, deta = (torch.empty_like(run.shared["log_ptr"]) for _ in range(2))
    launch(
        gates_kernel,
        GATES_TILES[v.dtype.itemsize],
        lambda _: (run.rows * run.chunks,),
        {
            **run.shared, "q_ptr": q, "k_ptr": k, "v_ptr": v, "dy_ptr": dy, "states_ptr": states,
            "adjoints_ptr": adjoints, "dlog_ptr": dlog, "deta_ptr": deta,
        },
        ("length", "dk", "dv"),
    )  # fmt: skip
    ends = (x.dtype for x in (initial, dfinal) if x is not None)
    return dq, dk, dv, dlog.to(log_decay.dtype), deta.to(eta.dtype), dinitial.to(next(ends, run.kind))


class _Run:
    """The sizes, gates and flags that all kernels of one call share."""

    def __init__(self, k: Tensor, v: Tensor, log_decay: Tensor, eta: Tensor, reset: Tensor | None, chunk: int) -> None:
        batch, length, heads, dk = k.shape
        self.kind = torch.float64 if v.dtype == torch.float64 else torch.float32
        self.precision, self.chunk = PRECISION[v.dtype], chunk
        self.batch, self.heads, self.dk, self.dv = batch, heads, dk, v.shape[-1]
        self.rows, self.chunks = batch * heads, triton.cdiv(length, chunk)
        gates = log_decay.to(self.kind).contiguous()
        self.shared: dict[str, Any] = {
            "log_ptr": gates, "eta_ptr": eta.to(self.kind).contiguous(),
            "reset_ptr": gates if reset is None else reset.contiguous().view(torch.uint8),
            "length": length, "heads": heads, "dk": dk, "dv": self.dv, "chunks": self.chunks,
            "FLOAT64": self.kind == torch.float64, "RESETS": reset is not None, "PRECISION": self.precision,
            "C": chunk,
        }  # fmt: skip

    def walk(self, x: Tensor, z: Tensor, start: Tensor | None, *, adjoint: bool) -> tuple[Tensor, Tensor]:
        """Return the state at the end and the one that enters each chunk."""
        end = torch.empty(self.batch, self.heads, self.dk, self.dv, dtype=self.kind, device=x.device)
        states = end.new_empty(self.batch, self.chunks, self.heads, self.dk, self.dv)
        launch(
            walk_kernel,
            WALK_TILES[self.precision],
            lambda tile: (self.rows, triton.cdiv(self.dk, tile["BK"]), triton.cdiv(self.dv, tile["BV"])),
            {
                **self.shared, "x_ptr": x, "z_ptr": z, "states_ptr": states, "end_ptr": end,
                "start_ptr": None if start is None else start.to(self.kind).contiguous(),
                "ADJOINT": adjoint, "STARTED": start is not None,
            },
            ("length", "dk", "dv"),
        )  # fmt: skip
        return end, states

    def read(
        self, own: Tensor, other: Tensor, x: Tensor, states: Tensor, y: Tensor, *, adjoint: bool = False,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        """Write into y what tokens read of x where their own numbers meet those of others."""
        width = x.shape[-1]
        stride_a, stride_b = (1, self.dv) if transposed else (self.dv, 1)
        launch(
            read_kernel,
            READ_TILES[self.precision],
            lambda tile: (
                self.rows * self.chunks, triton.cdiv(width, tile["BV"]), triton.cdiv(self.chunk, tile["ROWS"]),
            ),
            {
                **self.shared, "own_ptr": own, "other_ptr": other, "x_ptr": x, "states_ptr": states, "y_ptr": y,
                "dk": own.shape[-1], "dv": width, "stride_a": stride_a, "stride_b": stride_b,
                "ADJOINT": adjoint, "INTERPRETED": interpreting(),
            },
            ("length", "dk", "dv"),
        )  # fmt: skip
