"""Triton kernels of the recurrence: each program walks along tokens for some channels, the state in registers.

    forward    h ← a_t h + b_t            adjoint    μ ← ā_t (ḡ_t + μ),  λ_t = ḡ_t + μ,  ∂a_t = λ_t conj(h_{t−1})

Groups of tokens are loaded before the first of them is computed, so that many loads are under way at a time. Where rows
and channels are too few to fill a device, the tokens are cut into parts: every part is reduced to the product A of its
multipliers and the state S that it reaches from zero; a second kernel carries the states that enter the parts,
h ← S + A h, and walks through a part where that gives no number; then all parts run from their own entering state.
Nothing else multiplies multipliers, so that every state is the loop's. Complex numbers are neighbouring real pairs.
"""

# Triton reads a kernel's annotations itself: only ``tl.constexpr`` may stand there; tuples of rows grow as they unroll.
# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from so8t_torch.core.backend import interpreting
from so8t_torch.core.launch import Tile, launch
from so8t_torch.ops.linear_recurrence.eager import accumulation

LANES = 1 << 15
"""Rows times channels that fill a device; with fewer the tokens are cut into parts."""
SHORTEST_PART = 64
"""Tokens below which a part costs more than it hides."""


def _tile(rows: int, warps: int, block: int) -> Tile:
    return Tile(warps=warps, constants={"ROWS": rows, "BLOCK": block})


NARROW_TILES = (_tile(16, 1, 32),)
"""One channel per thread: more programs where channels are few."""
TILES = {2: (_tile(8, 1, 256), *NARROW_TILES), 4: (_tile(8, 1, 128), *NARROW_TILES), 8: (_tile(8, 1, 64),)}
"""Bytes per element → tiles; in the first a thread holds sixteen bytes of a token: one load."""
COMPLEX_TILES = (_tile(8, 1, 32),)
CARRY_TILES = (Tile(warps=1, constants={"BLOCK": 32}),)


@triton.jit
def _row(ptr, t, stride, in_range, ACC: tl.constexpr, COMPLEX: tl.constexpr):
    """Return the channels of token t as (re, im) in the accumulation dtype; re twice where numbers are real."""
    at = ptr + t.to(tl.int64) * stride
    re = tl.load(at, mask=in_range, other=0.0).to(ACC)
    im = re
    if COMPLEX:
        im = tl.load(at + 1, mask=in_range, other=0.0).to(ACC)
    return re, im


@triton.jit
def _put(ptr, offsets, x, in_range, COMPLEX: tl.constexpr):
    tl.store(ptr + offsets, x[0].to(ptr.dtype.element_ty), mask=in_range)
    if COMPLEX:
        tl.store(ptr + offsets + 1, x[1].to(ptr.dtype.element_ty), mask=in_range)


@triton.jit
def _get(ptr, offsets, in_range, COMPLEX: tl.constexpr):
    re = tl.load(ptr + offsets, mask=in_range, other=0.0)
    im = re
    if COMPLEX:
        im = tl.load(ptr + offsets + 1, mask=in_range, other=0.0)
    return re, im


@triton.jit
def _add(x, y):
    return x[0] + y[0], x[1] + y[1]


@triton.jit
def _times(x, y, COMPLEX: tl.constexpr):
    """Return x y."""
    re = x[0] * y[0]
    im = re
    if COMPLEX:
        re = x[0] * y[0] - x[1] * y[1]
        im = x[0] * y[1] + x[1] * y[0]
    return re, im


@triton.jit
def _conj(x, COMPLEX: tl.constexpr):
    im = x[1]
    if COMPLEX:
        im = -im
    return x[0], im


@triton.jit
def _where(condition, x, y):
    return tl.where(condition, x[0], y[0]), tl.where(condition, x[1], y[1])


@triton.jit
def _zeros(BLOCK: tl.constexpr, ACC: tl.constexpr):
    zero = tl.zeros([BLOCK], ACC)
    return zero, zero


@triton.jit
def _advance(state, a, x, restart, inside, ADJOINT: tl.constexpr, RESTARTS: tl.constexpr, COMPLEX: tl.constexpr):
    """Return the state behind a token: a h + x, or ā (x + μ) in the adjoint."""
    if ADJOINT:
        after = _times(_conj(a, COMPLEX), _add(x, state), COMPLEX)
        if RESTARTS:
            zero = tl.zeros_like(after[0])
            after = _where(restart != 0, (zero, zero), after)
    else:
        after = _add(_times(a, state, COMPLEX), x)
        if RESTARTS:
            after = _where(restart != 0, x, after)
    return _where(inside, after, state)


@triton.jit
def _token(i, length, DESCENDING: tl.constexpr):
    """Return the token that a run visits i-th."""
    t = i
    if DESCENDING:
        t = length - 1 - i
    return t


@triton.jit
def _flag(restart_ptr, t, inside, RESTARTS: tl.constexpr):
    flag = t
    if RESTARTS:
        flag = tl.load(restart_ptr + t, mask=inside, other=0)
    return flag


@triton.jit
def _walk(
    state, a_ptr, x_ptr, restart_ptr, first, count, length, a_stride_t, x_stride_t, in_range,
    ACC: tl.constexpr, COMPLEX: tl.constexpr, ADJOINT: tl.constexpr, DESCENDING: tl.constexpr, RESTARTS: tl.constexpr,
):  # fmt: skip
    """Return the state behind the tokens visited first … first + count − 1, one after the other."""
    for step in range(count):
        t = _token(first + step, length, DESCENDING)
        inside = t >= 0
        a = _row(a_ptr, t, a_stride_t, in_range, ACC, COMPLEX)
        x = _row(x_ptr, t, x_stride_t, in_range, ACC, COMPLEX)
        state = _advance(state, a, x, _flag(restart_ptr, t, inside, RESTARTS), inside, ADJOINT, RESTARTS, COMPLEX)
    return state


@triton.jit
def reduce_kernel(
    a_ptr, x_ptr, restart_ptr, product_ptr, sum_ptr, length, width, parts, span,
    a_stride_n, a_stride_t, a_stride_c, x_stride_n, x_stride_t, x_stride_c,
    FLOAT64: tl.constexpr, COMPLEX: tl.constexpr, ADJOINT: tl.constexpr, DESCENDING: tl.constexpr,
    RESTARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the product of the multipliers of one part (never the last), and the state it reaches from zero."""
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    COMPONENTS: tl.constexpr = 2 if COMPLEX else 1
    n = (tl.program_id(0) // (parts - 1)).to(tl.int64)
    first = (tl.program_id(0) % (parts - 1)) * span
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = columns < width
    a_ptr += n * a_stride_n + columns * a_stride_c
    x_ptr += n * x_stride_n + columns * x_stride_c
    restart_ptr += n * length
    state = _zeros(BLOCK, ACC)
    product = tl.full([BLOCK], 1.0, ACC), tl.zeros([BLOCK], ACC)
    for step in range(0, span, ROWS):
        rows = ()
        for i in tl.static_range(ROWS):
            t = _token(first + step + i, length, DESCENDING)
            inside = step + i < span
            a = _row(a_ptr, t, a_stride_t, in_range & inside, ACC, COMPLEX)
            x = _row(x_ptr, t, x_stride_t, in_range & inside, ACC, COMPLEX)
            rows += ((a, x, _flag(restart_ptr, t, inside, RESTARTS)),)
        for i in tl.static_range(ROWS):
            a, x, restart = rows[i]
            inside = step + i < span
            state = _advance(state, a, x, restart, inside, ADJOINT, RESTARTS, COMPLEX)
            if ADJOINT:
                a = _conj(a, COMPLEX)
            longer = _times(a, product, COMPLEX)
            if RESTARTS:
                longer = _where(restart != 0, _zeros(BLOCK, ACC), longer)
            product = _where(inside, longer, product)
    offsets = (tl.program_id(0).to(tl.int64) * width + columns) * COMPONENTS
    _put(product_ptr, offsets, product, in_range, COMPLEX)
    _put(sum_ptr, offsets, state, in_range, COMPLEX)


@triton.jit
def carry_kernel(
    a_ptr, x_ptr, initial_ptr, restart_ptr, product_ptr, sum_ptr, enter_ptr, length, width, parts, span,
    a_stride_n, a_stride_t, a_stride_c, x_stride_n, x_stride_t, x_stride_c,
    FLOAT64: tl.constexpr, COMPLEX: tl.constexpr, ADJOINT: tl.constexpr, DESCENDING: tl.constexpr,
    STARTED: tl.constexpr, RESTARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the states that enter the parts of one row."""
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    COMPONENTS: tl.constexpr = 2 if COMPLEX else 1
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = columns < width
    a_ptr += n * a_stride_n + columns * a_stride_c
    x_ptr += n * x_stride_n + columns * x_stride_c
    restart_ptr += n * length
    state = _zeros(BLOCK, ACC)
    if STARTED:
        state = _get(initial_ptr, (n * width + columns) * COMPONENTS, in_range, COMPLEX)
    _put(enter_ptr, (n * parts * width + columns) * COMPONENTS, state, in_range, COMPLEX)
    for k in range(parts - 1):
        offsets = ((n * (parts - 1) + k) * width + columns) * COMPONENTS
        product = _get(product_ptr, offsets, in_range, COMPLEX)
        reached = _get(sum_ptr, offsets, in_range, COMPLEX)
        after = _add(_times(product, state, COMPLEX), reached)
        doubt = (after[0] - after[0] != 0.0) | (after[1] - after[1] != 0.0)
        if tl.max(doubt.to(tl.int32), 0) > 0:
            walked = _walk(
                state, a_ptr, x_ptr, restart_ptr, tl.program_id(0) * 0 + k * span, span, length, a_stride_t, x_stride_t,
                in_range, ACC, COMPLEX, ADJOINT, DESCENDING, RESTARTS,
            )  # fmt: skip
            after = _where(doubt, walked, after)
        state = after
        _put(enter_ptr, ((n * parts + k + 1) * width + columns) * COMPONENTS, state, in_range, COMPLEX)


@triton.jit
def forward_kernel(
    a_ptr, x_ptr, enter_ptr, restart_ptr, h_ptr, final_ptr, length, width, parts, span,
    a_stride_n, a_stride_t, a_stride_c, x_stride_n, x_stride_t, x_stride_c,
    FLOAT64: tl.constexpr, COMPLEX: tl.constexpr, DESCENDING: tl.constexpr, ENTERED: tl.constexpr,
    RESTARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write every state of one part, and behind the last part the last one."""
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    COMPONENTS: tl.constexpr = 2 if COMPLEX else 1
    n = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts) * span
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = columns < width
    a_ptr += n * a_stride_n + columns * a_stride_c
    x_ptr += n * x_stride_n + columns * x_stride_c
    restart_ptr += n * length
    h_ptr += n * length * width * COMPONENTS
    state = _zeros(BLOCK, ACC)
    if ENTERED:
        state = _get(enter_ptr, (tl.program_id(0).to(tl.int64) * width + columns) * COMPONENTS, in_range, COMPLEX)
    for step in range(0, span, ROWS):
        rows = ()
        for i in tl.static_range(ROWS):
            t = _token(first + step + i, length, DESCENDING)
            inside = (step + i < span) & (first + step + i < length)
            a = _row(a_ptr, t, a_stride_t, in_range & inside, ACC, COMPLEX)
            x = _row(x_ptr, t, x_stride_t, in_range & inside, ACC, COMPLEX)
            rows += ((a, x, _flag(restart_ptr, t, inside, RESTARTS)),)
        for i in tl.static_range(ROWS):
            a, x, restart = rows[i]
            t = _token(first + step + i, length, DESCENDING)
            inside = (step + i < span) & (first + step + i < length)
            state = _advance(state, a, x, restart, inside, False, RESTARTS, COMPLEX)
            _put(h_ptr, (t.to(tl.int64) * width + columns) * COMPONENTS, state, in_range & inside, COMPLEX)
    ends = tl.program_id(0) % parts == parts - 1
    _put(final_ptr, (n * width + columns) * COMPONENTS, state, in_range & ends, COMPLEX)


@triton.jit
def adjoint_kernel(
    a_ptr, x_ptr, h_ptr, initial_ptr, enter_ptr, restart_ptr, da_ptr, dx_ptr, dinitial_ptr, length, width, parts, span,
    a_stride_n, a_stride_t, a_stride_c, x_stride_n, x_stride_t, x_stride_c,
    FLOAT64: tl.constexpr, COMPLEX: tl.constexpr, DESCENDING: tl.constexpr, STARTED: tl.constexpr,
    RESTARTS: tl.constexpr, NEED_A: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of multipliers and inputs of one part, and behind the last that of the initial state."""
    ACC: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    COMPONENTS: tl.constexpr = 2 if COMPLEX else 1
    BEFORE: tl.constexpr = -1 if DESCENDING else 1
    n = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts) * span
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_range = columns < width
    a_ptr += n * a_stride_n + columns * a_stride_c
    x_ptr += n * x_stride_n + columns * x_stride_c
    restart_ptr += n * length
    own = n * length * width * COMPONENTS
    stride = width * COMPONENTS
    start = _zeros(BLOCK, ACC)
    if STARTED:
        start = _get(initial_ptr, (n * width + columns) * COMPONENTS, in_range, COMPLEX)
    state = _get(enter_ptr, (tl.program_id(0).to(tl.int64) * width + columns) * COMPONENTS, in_range, COMPLEX)
    for step in range(0, span, ROWS):
        rows = ()
        for i in tl.static_range(ROWS):
            t = _token(first + step + i, length, DESCENDING)
            inside = (step + i < span) & (first + step + i < length)
            a = _row(a_ptr, t, a_stride_t, in_range & inside, ACC, COMPLEX)
            x = _row(x_ptr, t, x_stride_t, in_range & inside, ACC, COMPLEX)
            h = x
            if NEED_A:
                earlier = inside & (first + step + i + 1 < length)
                h = _row(h_ptr + own + columns * COMPONENTS, t + BEFORE, stride, in_range & earlier, ACC, COMPLEX)
            rows += ((a, x, h, _flag(restart_ptr, t, inside, RESTARTS)),)
        for i in tl.static_range(ROWS):
            a, x, h, restart = rows[i]
            t = _token(first + step + i, length, DESCENDING)
            inside = (step + i < span) & (first + step + i < length)
            offsets = own + (t.to(tl.int64) * width + columns) * COMPONENTS
            dx = _add(x, state)
            _put(dx_ptr, offsets, dx, in_range & inside, COMPLEX)
            if NEED_A:
                h = _where(first + step + i + 1 < length, h, start)
                da = _times(dx, _conj(h, COMPLEX), COMPLEX)
                if RESTARTS:
                    da = _where(restart != 0, _zeros(BLOCK, ACC), da)
                _put(da_ptr, offsets, da, in_range & inside, COMPLEX)
            state = _advance(state, a, x, restart, inside, True, RESTARTS, COMPLEX)
    ends = tl.program_id(0) % parts == parts - 1
    _put(dinitial_ptr, (n * width + columns) * COMPONENTS, state, in_range & ends, COMPLEX)


def recurrence(
    a: Tensor, b: Tensor, initial: Tensor | None, restart: Tensor | None, reverse: bool, parts: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return h (N, T, C) and the last state (N, C).

    Args:
        a: multipliers, any strides.
        b: inputs, any strides.
        initial: the state that enters.
        restart: where the state that enters a token is dropped (N, T).
        reverse: run from the last token to the first.
        parts: into how many parts the tokens are cut; as many as fill the device by default.
    """
    kind = accumulation(b.dtype)
    final = b.new_empty((b.shape[0], b.shape[2]), dtype=kind)
    h = torch.empty(b.shape, dtype=_stored(b.dtype, kind), device=b.device)
    if h.numel():
        walk = _Walk(a, b, restart, kind, reverse, adjoint=False, parts=parts)
        entering = walk.entering(initial)
        walk.launch(
            forward_kernel,
            {"enter_ptr": entering, "h_ptr": _real(h), "final_ptr": _real(final), "ENTERED": entering is not None},
        )  # fmt: skip
    return h.to(b.dtype), final.to(b.dtype if initial is None else initial.dtype)


def gradient(
    grad: Tensor,
    grad_final: Tensor,
    a: Tensor,
    h: Tensor | None,
    initial: Tensor | None,
    restart: Tensor | None,
    reverse: bool,
    parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a (nothing without h), b and initial.

    Args:
        grad: gradient of h, any strides.
        grad_final: gradient of the last state.
        a: multipliers, any strides.
        h: states, contiguous or nothing.
        initial: the state that entered.
        restart: as in ``recurrence``.
        reverse: as in ``recurrence``.
        parts: as in ``recurrence``.
    """
    kind = accumulation(grad.dtype)
    da = torch.empty(0 if h is None else a.shape, dtype=_stored(a.dtype, kind), device=a.device)
    db = torch.empty(grad.shape, dtype=_stored(grad.dtype, kind), device=grad.device)
    dinitial = torch.empty(grad_final.shape, dtype=kind, device=grad.device)
    if db.numel():
        walk = _Walk(a, grad, restart, kind, not reverse, adjoint=True, parts=parts)
        walk.launch(
            adjoint_kernel,
            {
                "h_ptr": None if h is None else _real(h.contiguous()),
                "initial_ptr": None if initial is None else _real(initial.to(kind).contiguous()),
                "enter_ptr": walk.entering(grad_final), "da_ptr": _real(da), "dx_ptr": _real(db),
                "dinitial_ptr": _real(dinitial), "STARTED": initial is not None, "NEED_A": h is not None,
            },
        )  # fmt: skip
    return da.to(a.dtype), db.to(grad.dtype), dinitial.to(grad_final.dtype)


class _Walk:
    """The tensors, strides and flags that all kernels of one run share."""

    def __init__(
        self, a: Tensor, x: Tensor, restart: Tensor | None, kind: torch.dtype, descending: bool, *, adjoint: bool,
        parts: int | None,
    ) -> None:  # fmt: skip
        rows, length, width = x.shape
        wanted = parts or max(1, min(-(-LANES // (rows * width)), length // SHORTEST_PART))
        self.rows, self.width, self.span = rows, width, -(-length // wanted)
        self.parts = -(-length // self.span)
        self.complex, self.kind, self.adjoint = x.is_complex(), kind, adjoint
        real_a, real_x = (torch.view_as_real(y.resolve_conj()) if self.complex else y for y in (a, x))
        self.shared: dict[str, Any] = {
            "a_ptr": real_a, "x_ptr": real_x,
            "restart_ptr": real_x if restart is None else restart.contiguous().view(torch.uint8),
            "length": length, "width": width, "parts": self.parts, "span": self.span,
            **dict(zip(("a_stride_n", "a_stride_t", "a_stride_c"), real_a.stride()[:3], strict=True)),
            **dict(zip(("x_stride_n", "x_stride_t", "x_stride_c"), real_x.stride()[:3], strict=True)),
            "FLOAT64": kind in (torch.float64, torch.complex128), "COMPLEX": self.complex, "DESCENDING": descending,
            "RESTARTS": restart is not None,
        }  # fmt: skip

    def entering(self, initial: Tensor | None) -> Tensor | None:
        """Return the states (N, parts, C) that enter the parts; nothing where zero enters the only one."""
        start = None if initial is None else _real(initial.to(self.kind).contiguous())
        if self.parts == 1:
            return start
        shape = (self.rows, self.parts - 1, self.width)
        product, total, enter = (
            _real(torch.empty(size, dtype=self.kind, device=self.shared["x_ptr"].device))
            for size in (shape, shape, (self.rows, self.parts, self.width))
        )
        partial = {"product_ptr": product, "sum_ptr": total, "ADJOINT": self.adjoint}
        self.launch(reduce_kernel, partial, self.parts - 1)
        carried = {**partial, "initial_ptr": start, "enter_ptr": enter, "STARTED": initial is not None}
        grid = (self.rows, triton.cdiv(self.width, CARRY_TILES[0].constants["BLOCK"]))
        launch(carry_kernel, CARRY_TILES, lambda _: grid, {**self.shared, **carried})
        return enter

    def launch(self, kernel: Any, given: Mapping[str, Any], parts: int | None = None) -> None:
        """Start a kernel with one program per row, part and block of channels."""
        count = self.rows * (self.parts if parts is None else parts)
        tiles = COMPLEX_TILES if self.complex else TILES[self.shared["x_ptr"].element_size()]
        launch(
            kernel,
            tiles,
            lambda tile: (count, triton.cdiv(self.width, tile["BLOCK"])),
            {**self.shared, **given},
            tune_on=("length", "width", "parts"),
        )


def _real(x: Tensor) -> Tensor:
    """Return complex numbers as pairs of real ones, others as they are."""
    return torch.view_as_real(x) if x.is_complex() else x


def _stored(dtype: torch.dtype, kind: torch.dtype) -> torch.dtype:
    """Return what a kernel stores: the interpreter truncates when it stores bfloat16, so that PyTorch rounds there."""
    return kind if interpreting() else dtype
