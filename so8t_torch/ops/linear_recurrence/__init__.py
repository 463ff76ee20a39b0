"""First-order linear recurrences along tokens, and sums of everything so far as their simplest case.

    h_t = a_t ⊙ h_{t−1} + b_t,   h_{−1} = initial        reverse:  h_t = a_t ⊙ h_{t+1} + b_t,   h_T = initial
    ∂b_t = λ_t = ḡ_t + ā_{t+1} λ_{t+1}        ∂a_t = λ_t conj(h_{t−1})        ∂initial = ā_0 λ_0

Symbols: t = 0 … T−1 counts tokens, ⊙ multiplies channel by channel, a_t multipliers (decays have |a| ≤ 1, nothing
requires it), b_t inputs, real or complex, ḡ_t the gradient that arrives. Where the segment of a token differs from that
of the token before it, the state that would enter is dropped: h_t = b_t. Carried in float32, or float64 for float64.
Cost: O(T C); one read of a and b and one write of h where channels are many, one more read of a and b where they are
few. Saved for the backward pass: a and h.
Twin: so8t_jax/ops/linear_recurrence.py. Derivation: docs/math/linear_recurrence.md.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Inexact, Int
from torch import Tensor

from so8t_torch.core import forward_mode
from so8t_torch.core.backend import Candidate, choose, explain, triton_reasons
from so8t_torch.core.errors import DomainError, ShapeError
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none
from so8t_torch.ops.linear_recurrence import autograd, eager

__all__ = ["cumulative_sum", "linear_recurrence"]

_KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


def linear_recurrence(
    a: Inexact[Tensor, "*#shape"],
    b: Inexact[Tensor, "*batch t c"],
    initial: Inexact[Tensor, "*#batch c"] | None = None,
    segment_ids: Int[Tensor, "*#batch t"] | None = None,
    *,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Inexact[Tensor, "*batch t c"], Inexact[Tensor, "*batch c"]]:
    """Return every state of h_t = a_t h_{t−1} + b_t, and the last one.

    Args:
        a: multipliers of a shape that broadcasts to that of b: (..., T, C), (C,), (T, 1); real, or complex where b is;
            float32 multipliers keep their precision beside inputs of a half dtype.
        b: inputs, any strides.
        initial: the state that enters the segment of the first token of the run; zero by default.
        segment_ids: equal numbers for the tokens of one segment; the state does not cross from one to another.
        reverse: run from the last token to the first.
        backend: ``"triton"``, ``"blocked"`` (CPU), ``"eager"`` (one step per token in plain operations, the only one
            with forward-mode derivatives and those of ``torch.func``), or ``"auto"``.

    Returns:
        h in the dtype of b, and the state after the last token of the run, in the dtype of initial, or of b without:
        a float32 initial state keeps the carried state of a half-precision stream in float32.

    Raises:
        ShapeError: the shapes do not fit, or there is no token or no channel.
        DomainError: a dtype or a device does not fit.
        BackendError: the backend cannot run this call.

    Numerics:
        Editing token t changes no bit of the states before it. Nothing is exponentiated and no product of multipliers
        is divided by, so that a = 0, |a| > 1 and overflow mean what they mean in the loop. What entered a block of
        tokens whose product of multipliers falls below the range of the dtype is forgotten there, though the loop
        would remember it if it is huge, or if multipliers above 1 follow in the block.
    """
    _check(a, b, initial, segment_ids)
    if b.is_complex() and not a.is_complex():
        return _of_real_parts(a, b, initial, segment_ids, reverse, backend)
    *batch, length, width = b.shape
    rows = math.prod(batch)
    if a.shape != b.shape:
        # few numbers stand for many: their gradient is a sum, which is not taken over rounded terms
        a = a.to(eager.accumulation(b.dtype)).expand(b.shape)
    state = initial
    if state is not None:
        if state.shape != (*batch, width):
            state = state.to(eager.accumulation(state.dtype)).expand(*batch, width)
        state = state.reshape(rows, width)
    flat = (a.reshape(rows, length, width), b.reshape(rows, length, width), state)
    restart = None
    if segment_ids is not None:
        restart = _restarts(segment_ids, reverse).expand(*batch, length).reshape(rows, length)
    chosen = choose("linear_recurrence", backend, _candidates(a, b, *(() if state is None else (state,))))
    if chosen == "eager":
        h, final = eager.recurrence(*flat, restart, reverse)
    else:
        h, final = autograd.recurrence(*flat, restart, reverse, chosen)
    return h.reshape(b.shape), final.reshape(*batch, width).to(b.dtype if initial is None else initial.dtype)


def cumulative_sum(
    x: Inexact[Tensor, "*batch t c"], *, reverse: bool = False, backend: str = "auto"
) -> Inexact[Tensor, "*batch t c"]:
    """Return Σ_{s≤t} x_s, or Σ_{s≥t} x_s where reverse: the recurrence with a = 1.

    Args:
        x: terms, any strides; summed in float32, or float64 for float64.
        reverse: sum from the last token.
        backend: as in ``linear_recurrence``.

    Raises:
        ShapeError, DomainError, BackendError: as in ``linear_recurrence``.
    """
    expect_tensors("cumulative_sum", x=x)
    one = torch.ones((), dtype=eager.accumulation(x.dtype) if x.is_floating_point() else torch.float32, device=x.device)
    _check(one, x, None, None)
    kernel, blocked, plain = _candidates(one, x)
    # one channel leaves a program one lane and a block no neighbours in memory
    order = [plain, kernel, blocked] if x.shape[-1] == 1 else [kernel, blocked, plain]
    chosen = choose("cumulative_sum", backend, order)
    if chosen == "eager":
        return eager.cumulative_sum(x, reverse)
    return linear_recurrence(one, x, reverse=reverse, backend=chosen)[0]


def explain_backend(a: Tensor, b: Tensor) -> str:
    """Return one line per backend: that it can run with a and b, or every reason why not."""
    return explain(_candidates(a, b))


def _of_real_parts(
    a: Tensor, b: Tensor, initial: Tensor | None, segment_ids: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Run real multipliers on complex inputs: real and imaginary parts are two channels that do not meet."""
    doubled = a.repeat_interleave(2, -1) if a.ndim and a.shape[-1] > 1 else a
    start = None if initial is None else _as_channels(initial)
    h, final = linear_recurrence(doubled, _as_channels(b), start, segment_ids, reverse=reverse, backend=backend)
    return _as_complex(h), _as_complex(final)


def _as_channels(x: Tensor) -> Tensor:
    """Return complex x (..., C) as real (..., 2C): real part, imaginary part, real part, ..."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2)


def _as_complex(x: Tensor) -> Tensor:
    """Return real (..., 2C) as complex (..., C)."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _restarts(segment_ids: Tensor, reverse: bool) -> Tensor:
    """Return where a token (..., T) does not continue the segment of the token that the run visited before it."""
    change = segment_ids[..., 1:] != segment_ids[..., :-1]
    first = torch.zeros_like(segment_ids[..., :1], dtype=torch.bool)
    return torch.cat([change, first] if reverse else [first, change], -1)


def _candidates(*tensors: Tensor) -> list[Candidate]:
    """Return the implementations in order of preference, each with the reasons why it cannot run."""
    device = tensors[1].device
    on_host = () if device.type == "cpu" else (f"b is on {device}, this one runs on the CPU",)
    one_way = forward_mode.reasons(*tensors)
    return [
        Candidate("triton", (*triton_reasons(tensors[1]), *one_way)),
        Candidate("blocked", (*on_host, *one_way)),
        Candidate("eager"),
    ]


def _check(a: Tensor, b: Tensor, initial: Tensor | None, segment_ids: Tensor | None) -> None:
    """Raise unless shapes, dtypes and devices fit together."""
    expect_tensors("linear_recurrence", a=a, b=b)
    expect_tensors_or_none("linear_recurrence", initial=initial, segment_ids=segment_ids)
    if b.ndim < 2 or 0 in b.shape[-2:]:
        raise ShapeError(
            f"linear_recurrence: expected inputs (..., T, C) with at least one token and one channel, "
            f"got {tuple(b.shape)}."
        )
    *batch, length, width = b.shape
    _fits("multipliers a", a, tuple(b.shape), "give one per token and channel, (C,) or (T, 1)")
    given: list[tuple[str, Tensor]] = [("a", a)]
    if initial is not None:
        _fits("an initial state", initial, (*batch, width), "give one number per channel of every row")
        given.append(("initial", initial))
    if segment_ids is not None:
        _check_segments(segment_ids, (*batch, length))
    for name, x in (("b", b), *given):
        if x.dtype not in _KINDS:
            raise DomainError(
                f"linear_recurrence: expected {name} to be floating-point or complex of 16 bits or more, "
                f"got {x.dtype}; convert it."
            )
    if a.is_complex() and not b.is_complex():
        raise DomainError(f"linear_recurrence: complex multipliers need complex inputs, got {b.dtype}; convert b.")
    if initial is not None and initial.is_complex() != b.is_complex():
        raise DomainError(
            f"linear_recurrence: expected an initial state that is complex exactly where b is, got {initial.dtype} "
            f"and {b.dtype}; convert one."
        )
    for name, x in (*given, *(() if segment_ids is None else (("segment_ids", segment_ids),))):
        if x.device != b.device:
            raise DomainError(f"linear_recurrence: b is on {b.device}, {name} on {x.device}; move one.")


def _check_segments(segment_ids: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless there is one whole number per token."""
    _fits("segment_ids", segment_ids, shape, "give one number per token")
    if segment_ids.shape[-1:] != shape[-1:]:
        raise ShapeError(
            f"linear_recurrence: expected segment_ids of shape {shape}, one number per token, "
            f"got {tuple(segment_ids.shape)}."
        )
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise DomainError(f"linear_recurrence: expected whole numbers in segment_ids, got {segment_ids.dtype}.")


def _fits(what: str, x: Tensor, shape: tuple[int, ...], advice: str) -> None:
    """Raise unless x broadcasts to a shape."""
    sizes = tuple(x.shape)
    if len(sizes) > len(shape) or any(n not in (1, m) for n, m in zip(sizes[::-1], shape[::-1], strict=False)):
        raise ShapeError(
            f"linear_recurrence: expected {what} of shape {shape} or one that broadcasts to it, got {sizes}; {advice}."
        )
