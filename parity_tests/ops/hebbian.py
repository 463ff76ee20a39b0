"""Declarations of the room ``hebbian``: sums of writes, each carried on by a product of matrices, judge it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Carry, Example, Law, OpPair, Rejection, Size, Strategy
from parity_tests.ops.hebbian_inputs import (
    Array,
    balance_by_states,
    bound_by_sums,
    by_products,
    extreme,
    gentle,
    one_token,
    packed,
    per_head,
    plain,
    started,
    step_by_products,
    unread,
)
from so8t_jax.ops import hebbian as reference
from so8t_torch.core.errors import BackendError, ConfigError, DomainError, ShapeError
from so8t_torch.ops import hebbian as production

SIZES: tuple[Size, ...] = ({"T": 3, "H": 1, "K": 2, "V": 2}, {"T": 66, "H": 2, "K": 5, "V": 3})
FEW: tuple[Size, ...] = (SIZES[0], {"T": 9, "H": 2, "K": 4, "V": 3})
WIDE: tuple[Size, ...] = (SIZES[0], {"T": 36, "H": 2, "K": 16, "V": 3})
"""Room for as many keys as a chunk of the delta rule holds."""
SHORT: tuple[Size, ...] = ({"T": 1, "H": 1, "K": 2, "V": 1},)
WRT = (0, 1, 2, 3, 4, 5)


def superposition_law(f: Any, example: Example) -> Array:
    """Values and entering states add up."""
    q, k, v, rates, eta, initial, ids = example
    state = np.ones((k.shape[1], k.shape[2], v.shape[2])) if initial is None else initial
    pairs = (v, state), (v, 0 * state), (0 * v, state)
    whole, values, entered = (np.asarray(f(q, k, x, rates, eta, s, ids)[0]) for x, s in pairs)
    return (whole - values - entered) / max(1.0, np.abs(whole).max())


def recall_law(f: Any, example: Example) -> Array:
    """Written with strength one by the delta rule, a value is read exactly under its key."""
    _, k, v, rates, eta, initial, ids = example
    key = k / np.linalg.norm(k, axis=-1, keepdims=True)
    y = np.asarray(f(key, k, v, rates, np.ones_like(eta), initial, ids)[0])
    return (y - v) / np.abs(v).max()


def balance_law(f: Any, example: Example) -> Array:
    """The books balance, and what is dissipated is 1 − a² of what enters."""
    energy, entering, dissipation, supply = (np.asarray(x) for x in f(*example))
    lost = dissipation + np.expm1(-2 * example[2]) * entering
    return np.stack([energy - entering + dissipation - supply, lost]) / np.abs(energy).max()


def halves(example: Example) -> tuple[Example, Any]:
    """Cut inside a segment, where the second half is entered by what the first one left."""
    *tokens, initial, ids = example
    length = len(tokens[0])
    places = range(1, length)
    middle = next((t for t in places if ids is not None and t > 2 and ids[t] == ids[t - 1]), length // 2)
    alone = ids is not None and ids[middle] != ids[middle - 1]
    first, second = ([x[part] for x in tokens] for part in (slice(middle), slice(middle, None)))
    early, late = (None, None) if ids is None else (ids[:middle], ids[middle:])
    return (*first, initial, early), lambda state: (*second, None if alone else state, late)


def joined(first: Any, second: Any) -> Any:
    """Put two runs together: what is read, and the last state."""
    return np.concatenate([first[0], second[0]]), second[1]


def zeros(**changed: tuple[int, ...] | None) -> tuple[Any, ...]:
    """Return zeros for two rows of five tokens, three heads, keys of four and values of two channels."""
    shapes: dict[str, tuple[int, ...] | None] = {
        "q": (2, 5, 3, 4), "k": (2, 5, 3, 4), "v": (2, 5, 3, 2), "decay": (2, 5, 3), "eta": (2, 5, 3),
        "initial": None, "ids": None, **changed,
    }  # fmt: skip
    found = [None if shape is None else torch.zeros(shape) for shape in shapes.values()]
    found[-1] = None if found[-1] is None else found[-1].long()
    return tuple(found)


def changed(place: int, change: Any, **shapes: Any) -> tuple[Any, ...]:
    """Return zeros of which one argument is changed."""
    found = list(zeros(**shapes))
    found[place] = change(found[place])
    return tuple(found)


REJECTIONS = (
    Rejection("no_tokens", lambda: zeros(q=(2, 0, 3, 4), k=(2, 0, 3, 4), v=(2, 0, 3, 2), decay=(3,), eta=(3,)),
              ShapeError, "at least one token"),
    Rejection("keys", lambda: zeros(q=(2, 5, 2, 4), k=(2, 5, 2, 4)), ShapeError, "heads of values"),
    Rejection("queries", lambda: zeros(q=(2, 5, 3, 3)), ShapeError, "of the shape of keys"),
    Rejection("rates", lambda: zeros(decay=(2, 4, 3)), ShapeError, "decay of shape"),
    Rejection("strengths", lambda: zeros(eta=(5, 2)), ShapeError, "eta of shape"),
    Rejection("state", lambda: zeros(initial=(2, 3, 4, 1)), ShapeError, "an initial state of shape"),
    Rejection("flat_state", lambda: zeros(initial=(4, 2)), ShapeError, "an initial state of shape"),
    Rejection("ids", lambda: zeros(ids=(2, 4)), ShapeError, "segment_ids of shape"),
    Rejection("one_id", lambda: zeros(ids=(2, 1)), ShapeError, "one number per token"),
    Rejection("real_ids", lambda: changed(6, torch.Tensor.double, ids=(2, 5)), DomainError, "whole numbers"),
    Rejection("integers", lambda: changed(1, torch.Tensor.long), DomainError, "k of a real floating dtype"),
    Rejection("two_dtypes", lambda: changed(2, torch.Tensor.double), DomainError, "of one dtype"),
    Rejection("negative", lambda: changed(3, lambda x: x - 1e-3), DomainError, "Γ ≥ 0, got -0.001"),
    Rejection("rule", zeros, ConfigError, "expected rule to be one of", {"rule": "oja"}),
    Rejection("discretization", zeros, ConfigError, "discretization to be one of", {"discretization": "tustin"}),
    Rejection("key_norm", zeros, ConfigError, "key_norm to be one of", {"key_norm": "l1"}),
    Rejection("backend", zeros, BackendError, "chunked", {"backend": "fast"}),
)  # fmt: skip


def token(state: tuple[int, ...] = (3, 4, 2), query: tuple[int, ...] = (3, 4), rate: float = 0.0) -> tuple[Any, ...]:
    """Return a state and one token."""
    return *map(torch.zeros, (state, query, (3, 4), (3, 2))), torch.full((3,), rate), torch.ones(3)


STEP_REJECTIONS = (
    Rejection("state", lambda: token(state=(3, 4)), ShapeError, "H, K, V"),
    Rejection("query", lambda: token(query=(3, 5)), ShapeError, "a query of shape"),
    Rejection("negative", lambda: token(rate=-1.0), DomainError, "Γ ≥ 0"),
)
NEGATIVE = (Rejection("negative", lambda: changed(3, lambda x: x - 1)[1:], DomainError, "Γ ≥ 0"),)

# What is read is a sum of writes of both signs, each weighed by a product of two vectors; a rate's gradient is a sum of
# everything that crosses its token.
BUDGET = Budget(forward=16.0, gradient=64.0, floor=0.5, gradient_floor=1.0)
BACKENDS: tuple[str, ...] = ("eager", "triton")


def memory_pair(variant: str, inputs: dict[str, Strategy], **options: Any) -> OpPair:
    """Declare the fast weights on some inputs."""
    usual: dict[str, Any] = {"sizes": SIZES, "wrt": WRT, "edge_sizes": SHORT, "backends": BACKENDS}
    return OpPair(
        name=f"hebbian.hebbian{variant}",
        reference=reference.hebbian,
        production=production.hebbian,
        oracle=by_products,
        inputs=inputs,
        budget=BUDGET,
        **{**usual, **options},
    )


def step_pair(variant: str, **options: Any) -> OpPair:
    """Declare one step."""
    return OpPair(
        name=f"hebbian.step{variant}",
        reference=reference.step,
        production=production.step,
        oracle=step_by_products,
        inputs={"one_token": one_token},
        sizes=({"H": 2, "K": 3, "V": 2},),
        wrt=WRT,
        budget=BUDGET,
        rejections=STEP_REJECTIONS,
        **options,
    )


def monitor_pair(name: str, **options: Any) -> OpPair:
    """Declare a function that keeps the books."""
    return OpPair(
        name=f"hebbian.{name}",
        reference=getattr(reference, name.partition(":")[0]),
        production=getattr(production, name.partition(":")[0]),
        wrt=(0, 1, 2, 3, 4),
        edge_sizes=SHORT,
        returns="accumulation",
        budget=BUDGET,
        **options,
    )


NOT_HALF = ("float64", "float32")
WITHOUT_NORM = {"discretization": "zoh", "key_norm": "none"}
DELTA = {"rule": "delta", "discretization": "zoh"}
PAIRS: tuple[OpPair, ...] = (
    memory_pair(
        "",
        {"started": started, "plain": plain, "packed": packed, "extreme": extreme},
        laws=(Law("superposition", superposition_law, 64.0),),
        rejections=REJECTIONS,
        carry=Carry(halves, joined),
    ),
    memory_pair(":zoh", {"packed": packed, "extreme": extreme}, keywords=WITHOUT_NORM, dtypes=NOT_HALF),
    memory_pair(":per_head", {"per_head": per_head}, sizes=FEW, shared=(3, 4), dtypes=NOT_HALF),
    memory_pair(
        ":delta",
        {"started": started, "packed": packed},
        sizes=WIDE,
        keywords={"rule": "delta"},
        dtypes=(*NOT_HALF, "bfloat16"),
        laws=(Law("recall", recall_law, 256.0),),
        carry=Carry(halves, joined),
        backends=(),
    ),
    memory_pair(
        ":delta_zoh",
        {"packed": gentle(packed)},
        keywords={"rule": "delta", **WITHOUT_NORM},
        sizes=FEW,
        dtypes=NOT_HALF,
        backends=(),
    ),
    step_pair(""),
    step_pair(":delta", keywords={**DELTA, "key_norm": "none"}, dtypes=NOT_HALF),
    monitor_pair(
        "energy_balance",
        oracle=balance_by_states,
        inputs={"started": unread(started), "packed": unread(packed)},
        sizes=SIZES,
        laws=(Law("balance", balance_law, 256.0),),
        rejections=NEGATIVE,
    ),
    monitor_pair(
        "energy_balance:delta",
        oracle=balance_by_states,
        inputs={"packed": unread(gentle(packed))},
        sizes=FEW,
        keywords={**DELTA, "key_norm": "none"},
        dtypes=NOT_HALF,
    ),
    monitor_pair(
        "state_bound",
        oracle=bound_by_sums,
        inputs={"packed": unread(packed), "extreme": unread(extreme)},
        sizes=SIZES,
        keywords=WITHOUT_NORM,
        dtypes=NOT_HALF,
        rejections=NEGATIVE,
    ),
)
