"""Declarations of the room ``linear_recurrence``: products of multipliers, one pair of tokens at a time, judge it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Carry, Example, Law, OpPair, Rejection, Size
from so8t_jax.ops import linear_recurrence as reference
from so8t_torch.core.errors import BackendError, DomainError, ShapeError
from so8t_torch.ops import linear_recurrence as production

BACKENDS = ("eager", "triton")
SIZES = ({"T": 6, "C": 3}, {"T": 45, "C": 5})
SHORT = ({"T": 1, "C": 2}, {"T": 2, "C": 1})
COMPLEX_DTYPES = ("float64", "float32")


def inputs_of(generator: np.random.Generator, size: Size, *shape: int, imaginary: bool = False) -> np.ndarray:
    """Draw normal numbers, complex on demand."""
    found = generator.standard_normal(shape or (size["T"], size["C"]))
    return found + 1j * generator.standard_normal(found.shape) if imaginary else found


def decays(generator: np.random.Generator, *shape: int, imaginary: bool = False) -> np.ndarray:
    """Draw multipliers from 0.2 to 1, times a phase on demand."""
    found = generator.uniform(0.2, 1.0, shape)
    return found * np.exp(1j * generator.uniform(-3.0, 3.0, shape)) if imaginary else found


def plain(generator: np.random.Generator, size: Size, imaginary: bool = False) -> Example:
    """Draw decays and inputs; nothing enters."""
    shape = size["T"], size["C"]
    return decays(generator, *shape, imaginary=imaginary), inputs_of(generator, size, imaginary=imaginary), None, None


def started(generator: np.random.Generator, size: Size, imaginary: bool = False) -> Example:
    """Draw a state that enters, and multipliers of which some are exactly zero, some negative, some beyond one."""
    shape = size["T"], size["C"]
    kinds = generator.integers(0, 8, shape)
    a = np.select([kinds == 0, kinds == 1, kinds == 2], [0.0, -0.75, 1.25], decays(generator, *shape))
    a = a * np.exp(1j * generator.uniform(-3.0, 3.0, shape)) if imaginary else a
    b, h = (inputs_of(generator, size, *s, imaginary=imaginary) for s in (shape, shape[1:]))
    return a, b, h, None


def packed(generator: np.random.Generator, size: Size, imaginary: bool = False) -> Example:
    """Draw segments of random lengths, and a state that enters the first."""
    a, b, h, _ = started(generator, size, imaginary)
    return a, b, h, np.cumsum(generator.random(size["T"]) < 0.25)


def alternating(generator: np.random.Generator, size: Size, imaginary: bool = False) -> Example:
    """Draw segments of one token, whose numbers return: 0, 1, 0, 1, …"""
    a, b, _, _ = plain(generator, size, imaginary)
    return a, b, None, np.arange(size["T"]) % 2


INPUTS = {"plain": plain, "started": started, "packed": packed, "alternating": alternating}
IMAGINARY = {name: lambda g, size, draw=draw: draw(g, size, True) for name, draw in INPUTS.items()}


def by_products(
    a: np.ndarray,
    b: np.ndarray,
    initial: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
    *,
    reverse: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return h = L b + …, each entry of L the product of the multipliers between two tokens of one segment."""
    length = b.shape[0]
    a = np.broadcast_to(a, b.shape)
    run = list(range(length))[:: -1 if reverse else 1]
    ids = np.zeros(length, int) if segment_ids is None else segment_ids
    breaks = [place > 0 and ids[t] != ids[run[place - 1]] for place, t in enumerate(run)]
    h = np.zeros(b.shape, np.result_type(a, b))
    for place, t in enumerate(run):
        for earlier in range(place + 1):
            if not any(breaks[earlier + 1 : place + 1]):
                between = [a[q] for q in run[earlier + 1 : place + 1]]
                h[t] += np.prod(between, axis=0) * b[run[earlier]] if between else b[run[earlier]]
        if initial is not None and not any(breaks[: place + 1]):
            h[t] += np.prod([a[q] for q in run[: place + 1]], axis=0) * initial
    return h, h[run[-1]]


def sum_by_loops(x: np.ndarray, *, reverse: bool = False) -> np.ndarray:
    """Return the sum of all terms up to each token, added anew for each."""
    length = len(x)
    return np.stack([(x[t:] if reverse else x[: t + 1]).sum(0) for t in range(length)])


def superposition_law(f: Any, example: Example) -> np.ndarray:
    """Inputs and entering states add up."""
    a, b, initial, ids = example
    h = np.ones(b.shape[-1], b.dtype) if initial is None else initial
    whole, inputs, state = (np.asarray(f(a, x, y, ids)[0]) for x, y in ((b, h), (b, 0 * h), (0 * b, h)))
    return (whole - inputs - state) / max(1.0, np.abs(whole).max())


def constant_law(f: Any, example: Example) -> np.ndarray:
    """With b_t = (1 − a_t) c every state is c, the state that enters too."""
    a, b, *_ = example
    c = b[0]
    h, final = (np.asarray(x) for x in f(a, (1.0 - a) * c, c, None))
    return np.concatenate([h - c, (final - c)[None]]) / np.abs(c).max()


def halves(example: Example) -> tuple[Example, Any]:
    """Cut inside a segment, where the second half is entered by what the first one left."""
    a, b, initial, ids = example
    places = range(1, b.shape[0])
    middle = next((t for t in places if ids is not None and t > 3 and ids[t] == ids[t - 1]), b.shape[0] // 2)
    if ids is not None and ids[middle] != ids[middle - 1]:
        # every token is a segment: nothing may enter the second half
        return (a[:middle], b[:middle], initial, ids[:middle]), lambda _: (a[middle:], b[middle:], None, ids[middle:])
    first, second = (None if ids is None else ids[part] for part in (slice(middle), slice(middle, None)))
    return (a[:middle], b[:middle], initial, first), lambda state: (a[middle:], b[middle:], state, second)


def joined(first: Any, second: Any) -> Any:
    """Put two runs together: all states, and the last one."""
    return np.concatenate([first[0], second[0]]), second[1]


def zeros(*shapes: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Return zeros of the given shapes."""
    return tuple(None if shape is None else torch.zeros(shape, dtype=dtype) for shape in shapes)


def with_ids(*shape: int, dtype: torch.dtype = torch.int64) -> tuple[Any, ...]:
    """Return zeros for two rows of five tokens, and segment ids of some shape."""
    return *zeros((2, 5, 3), (2, 5, 3), None), torch.zeros(shape, dtype=dtype)


REJECTIONS = (
    Rejection("no_tokens", lambda: zeros((2, 0, 3), (2, 0, 3)), ShapeError, "at least one token"),
    Rejection("no_channels", lambda: zeros((5, 0), (5, 0)), ShapeError, "at least one token and one channel"),
    Rejection("one_axis", lambda: zeros((5,), (5,)), ShapeError, r"\(\.\.\., T, C\)"),
    Rejection("multipliers", lambda: zeros((2, 4, 3), (2, 5, 3)), ShapeError, "multipliers a of shape"),
    Rejection("wider_multipliers", lambda: zeros((2, 5, 3), (5, 3)), ShapeError, r"broadcasts to it, got \(2, 5, 3\)"),
    Rejection("state", lambda: zeros((2, 5, 3), (2, 5, 3), (2, 4)), ShapeError, "initial state"),
    Rejection("ids", lambda: with_ids(2, 4), ShapeError, "segment_ids of shape"),
    Rejection("one_id", lambda: with_ids(2, 1), ShapeError, "one number per token"),
    Rejection("real_ids", lambda: with_ids(2, 5, dtype=torch.float32), DomainError, "whole numbers in segment_ids"),
    Rejection("integers", lambda: zeros((5, 3), (5, 3), dtype=torch.int64), DomainError, "floating-point or complex"),
    Rejection(
        "complex_multipliers",
        lambda: (torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(5, 3)),
        DomainError,
        "need complex inputs",
    ),
    Rejection(
        "real_state",
        lambda: (torch.zeros(5, 3), torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(3)),
        DomainError,
        "complex exactly where b is",
    ),
    Rejection("backend", lambda: zeros((5, 3), (5, 3)), BackendError, "blocked", {"backend": "fast"}),
)
LAWS = (Law("superposition", superposition_law, 64.0), Law("constant", constant_law, 64.0))

# A state is a sum of decayed inputs of both signs; where multipliers reach 1.25 it grows, and with it the error of the
# rounded multipliers' product. The gradient of a is a product of two such sums. Two terms of one size may cancel.
BUDGET = Budget(forward=16.0, gradient=32.0, floor=0.5)


def recurrence_pair(variant: str, inputs: dict[str, Any], **options: Any) -> OpPair:
    """Declare the recurrence on some inputs."""
    usual: dict[str, Any] = {
        "sizes": SIZES,
        "wrt": (0, 1, 2),
        "edge_sizes": SHORT,
        "backends": BACKENDS,
        "bitwise_batch": True,
    }
    return OpPair(
        name=f"linear_recurrence.linear_recurrence{variant}",
        reference=reference.linear_recurrence,
        production=production.linear_recurrence,
        oracle=by_products,
        inputs=inputs,
        budget=BUDGET,
        **{**usual, **options},
    )


def expanded(generator: np.random.Generator, size: Size) -> Example:
    """Draw one decay per channel, and one state, for all tokens and rows."""
    return decays(generator, size["C"]), inputs_of(generator, size), inputs_of(generator, size, size["C"]), None


def per_token(generator: np.random.Generator, size: Size) -> Example:
    """Draw one decay per token for all channels."""
    return decays(generator, size["T"], 1), inputs_of(generator, size), None, None


def real_on_complex(generator: np.random.Generator, size: Size) -> Example:
    """Draw real decays for complex inputs."""
    a, b, h, _ = started(generator, size)
    return a, b + 1j * inputs_of(generator, size), h + 1j * h[::-1], None


def sum_pair(variant: str, draw: Any, dtypes: tuple[str, ...], reverse: bool) -> OpPair:
    """Declare the cumulative sum of real or complex terms."""
    return OpPair(
        name=f"linear_recurrence.cumulative_sum{variant}",
        reference=reference.cumulative_sum,
        production=production.cumulative_sum,
        oracle=sum_by_loops,
        inputs={"terms": draw},
        sizes=({"T": 6, "C": 3}, {"T": 150, "C": 2}),
        edge_sizes=({"T": 1, "C": 2}, {"T": 5, "C": 1}),
        wrt=(0,),
        keywords={"reverse": reverse},
        dtypes=dtypes,
        backends=BACKENDS,
        budget=BUDGET,
        bitwise_batch=True,
        rejections=(Rejection("no_tokens", lambda: zeros((0, 3)), ShapeError, "at least one token"),),
    )


ALL_DTYPES = ("float64", "float32", "bfloat16", "float16")
PAIRS: tuple[OpPair, ...] = (
    recurrence_pair("", INPUTS, laws=LAWS, rejections=REJECTIONS, carry=Carry(halves, joined)),
    recurrence_pair(":reverse", INPUTS, keywords={"reverse": True}),
    # PyTorch's complex product rounds otherwise in full vectors than in what is left at a loop's end
    recurrence_pair(
        ":complex",
        IMAGINARY,
        dtypes=COMPLEX_DTYPES,
        bitwise_batch=False,
        laws=(Law("superposition", superposition_law, 64.0),),
        carry=Carry(halves, joined),
    ),
    recurrence_pair(
        ":complex_reverse",
        {"packed": IMAGINARY["packed"]},
        dtypes=COMPLEX_DTYPES,
        bitwise_batch=False,
        keywords={"reverse": True},
    ),
    recurrence_pair(":per_channel", {"expanded": expanded}, shared=(0, 2)),
    recurrence_pair(":per_token", {"per_token": per_token}),
    recurrence_pair(":real_on_complex", {"real_on_complex": real_on_complex}, dtypes=COMPLEX_DTYPES),
    sum_pair("", lambda generator, size: (inputs_of(generator, size),), ALL_DTYPES, False),
    sum_pair(
        ":reverse_complex", lambda generator, size: (inputs_of(generator, size, imaginary=True),), COMPLEX_DTYPES, True
    ),
)
