"""The sequence operations of all rooms under one signature, for tests of what must hold for every one of them.

    run(path, tokens, state, segment_ids) -> (y, state)        on one example, in numpy

A path is a backend of the production side or ``"jax"``, the definition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from so8t_jax.ops import hebbian as hebbian_definition
from so8t_jax.ops import linear_recurrence as recurrence_definition
from so8t_jax.ops import semiseparable as semiseparable_definition
from so8t_jax.ops import tridiagonal as tridiagonal_definition
from so8t_torch.ops import hebbian, linear_recurrence, semiseparable, tridiagonal

Tokens = Mapping[str, np.ndarray]
Output = tuple[np.ndarray, np.ndarray]
Z = 0.1 + 0.1j
DEFINITION = "jax"


@dataclass(frozen=True, eq=False)
class Mixer:
    """A sequence operation.

    Attributes:
        name: of the operation.
        call: ``(operations, tokens, state, segment_ids, options) -> (y, state)``, the same for both sides.
        definition: module of the definition.
        production: module of the production side.
        draw: numbers of T tokens by name.
        values: tokens that may hold any number; the others are checked against a range.
        paths: backends of production.
        chunk: length whose multiples leave the order of all additions as it is, where there is one.
    """

    name: str
    call: Callable[..., Any]
    definition: Any
    production: Any
    draw: Callable[[np.random.Generator, int], dict[str, np.ndarray]]
    values: tuple[str, ...]
    paths: tuple[str, ...]
    chunk: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self, path: str, tokens: Tokens, state: np.ndarray | None = None, segment_ids: np.ndarray | None = None
    ) -> Output:
        """Return the outputs of all tokens, and the last state."""
        defined = path == DEFINITION
        convert: Callable[[np.ndarray], Any] = jnp.asarray if defined else _batch_of_one
        numbers = {name: convert(value) for name, value in tokens.items()}
        start, ids = (None if x is None else convert(x) for x in (state, segment_ids))
        if defined:
            found = _compiled(self)(numbers, start, ids)
        else:
            found = self.call(self.production, numbers, start, ids, {**self.options, "backend": path})
        y, final = (np.asarray(x) if defined else x[0].numpy() for x in found)
        return y, final


@functools.cache
def _compiled(mixer: Mixer) -> Callable[..., Any]:
    """Compile the definition, once for every length."""
    return jax.jit(lambda tokens, state, ids: mixer.call(mixer.definition, tokens, state, ids, mixer.options))


def _batch_of_one(x: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.array(x))[None]


def _recurrence(side: Any, tokens: Any, state: Any, ids: Any, options: Any) -> Any:
    return side.linear_recurrence(tokens["a"], tokens["b"], state, ids, **options)


def _elementwise(side: Any, tokens: Any, state: Any, ids: Any, options: Any) -> Any:
    assert set(options) <= {"backend"}, "it is made of one recurrence, which chooses for itself"
    return side.compat(tokens["u"], tokens["v"], tokens["decay"], state, ids)


def _operator(side: Any, tokens: Any, state: Any, ids: Any, options: Any) -> Any:
    return side.operator(tokens["x"], tokens["u"], tokens["v"], tokens["decay"], state, ids, **options)


def _memory(side: Any, tokens: Any, state: Any, ids: Any, options: Any) -> Any:
    given = (tokens[name] for name in ("q", "k", "v", "decay", "eta"))
    return side.hebbian(*given, state, ids, **options)


def _resolvent(side: Any, tokens: Any, state: Any, ids: Any, options: Any) -> Any:
    """Return the causal g: of a chain from its start, or of more sites of a stream."""
    diagonal, coupling = tokens["diagonal"], tokens["coupling"]
    if state is not None:
        return side.advance(state, diagonal - Z, coupling * coupling, **options)
    array: Any = torch.tensor if isinstance(diagonal, torch.Tensor) else jnp.asarray
    z = array(Z, dtype=diagonal.dtype)
    between = coupling[..., 1:]
    g = side.green(diagonal, between, between, z, ids, **options)
    return g, g[..., -1]


def _decays(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw decays, of which some forget all and some nothing."""
    a = generator.uniform(0.3, 1.0, shape)
    draw = generator.random(shape)
    return np.where(draw < 0.03, 0.0, np.where(draw > 0.9, 1.0, a))


def _real(generator: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    return {"a": _decays(generator, length, 3), "b": generator.standard_normal((length, 3))}


def _imaginary(generator: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    turn = np.exp(1j * generator.uniform(-3, 3, (length, 3)))
    return {"a": _decays(generator, length, 3) * turn, "b": generator.standard_normal((length, 3)) * turn}


def _chain(generator: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    rates = generator.uniform(0.0, 0.2, length)
    return {
        "diagonal": generator.standard_normal(length) - 1j * rates,
        "coupling": generator.uniform(0.2, 0.9, length),
    }


def _ranks(generator: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    """Draw values of three channels, and writes and reads of rank four, of which some are closed."""
    u, v = (generator.standard_normal((length, 4)) * (generator.random((length, 4)) > 0.2) for _ in range(2))
    return {"x": generator.standard_normal((length, 3)), "u": u, "v": v, "decay": _decays(generator, length, 4)}


def _heads(generator: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    """Draw queries, keys and values of two heads, rates of forgetting and write strengths."""
    q, k = (generator.standard_normal((length, 2, 4)) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": generator.standard_normal((length, 2, 3)),
        "decay": generator.choice([0.0, 1e-3, 0.1, 2.0], (length, 2)),
        "eta": generator.uniform(0.1, 1.0, (length, 2)),
    }


def _memory_mixer(name: str, *paths: str, **options: Any) -> Mixer:
    values = ("q", "k", "v")
    chunk = None if "rule" in options else 64
    return Mixer(f"hebbian {name}", _memory, hebbian_definition, hebbian, _heads, values, paths, chunk, options)


MIXERS: tuple[Mixer, ...] = (
    Mixer(
        "linear_recurrence",
        _recurrence,
        recurrence_definition,
        linear_recurrence,
        _real,
        ("a", "b"),
        ("eager", "blocked", "triton"),
    ),
    Mixer(
        "linear_recurrence complex",
        _recurrence,
        recurrence_definition,
        linear_recurrence,
        _imaginary,
        ("a", "b"),
        ("eager", "blocked", "triton"),
    ),
    Mixer(
        "tridiagonal causal",
        _resolvent,
        tridiagonal_definition,
        tridiagonal,
        _chain,
        ("diagonal", "coupling"),
        ("eager", "blocked", "triton"),
    ),
    Mixer(
        "semiseparable elementwise",
        _elementwise,
        semiseparable_definition,
        semiseparable,
        _ranks,
        ("u", "v"),
        ("auto",),
    ),
    Mixer(
        "semiseparable operator",
        _operator,
        semiseparable_definition,
        semiseparable,
        _ranks,
        ("x", "u", "v"),
        ("eager", "chunked"),
        64,
    ),
    _memory_mixer("euler", "eager", "chunked", "triton"),
    _memory_mixer("held", "eager", "chunked", discretization="zoh", key_norm="none"),
    _memory_mixer("delta", "eager", "chunked", rule="delta"),
)
