"""A small language model to try regularisers on: chains, fast weights and perceptrons, all of it observed.

    x ← x + W₁[Re g, Im g]      g the causal resolvent of a lossy chain with hopping b upwards and c downwards
    x ← x + W₂ y                y read from fast weights that forget
    x ← x + W₄ tanh(W₃ x̂)       every part reads x̂, x with unit mean square

The task is recall: keys and values alternate, then one key comes again, and its value is asked for.
Symbols as in the rooms ``tridiagonal`` and ``hebbian``. Cost: step by step; it is a place to try things.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from so8t_jax.ops import hebbian, tridiagonal

Place = dict[str, Any]
Observation = dict[str, list[Place]]

Z = 0.1 + 0.1j
"""Where resolvents are taken."""
HALF_LIVES = (4.0, 64.0)
"""Shortest and longest half-life of the memory's heads at the start, in tokens."""


class Block(nnx.Module):
    """One layer; every row of tokens is mapped to a row, and what happened is told beside it.

    Args:
        width: D, even.
        channels: K chains.
        heads: H memories.
        head: channels of a key and a value.
        hidden: of the perceptron.
        rngs: draws the parameters.
    """

    def __init__(self, width: int, channels: int, heads: int, head: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.channels, self.heads, self.head = channels, heads, head
        self.chain_in = nnx.Linear(width, 2 * channels, rngs=rngs)
        self.hopping = nnx.Param(jnp.linspace(0.3, 0.6, channels))
        self.backward_hopping = nnx.Param(jnp.linspace(0.5, 0.2, channels))
        self.chain_out = nnx.Linear(2 * channels, width, rngs=rngs)
        self.memory_in = nnx.Linear(width, 3 * heads * head, use_bias=False, rngs=rngs)
        self.decay = nnx.Linear(width, heads, rngs=rngs)
        lives = np.geomspace(*HALF_LIVES, heads)
        self.decay.bias = nnx.Param(jnp.asarray(np.log(np.expm1(np.log(2) / lives)), jnp.float32))
        self.memory_out = nnx.Linear(heads * head, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, hidden, rngs=rngs), nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Place]]:
        """Return the rows after the layer, and what is observed of each kind.

        Args:
            x: rows of tokens.
        """
        features, chains = self._chain(_level(x))
        x = x + self.chain_out(features)
        read, memories, rates = self._memory(_level(x))
        x = x + self.memory_out(read)
        x = x + self.down(jnp.tanh(self.up(_level(x))))
        return x, {"chains": chains, "memories": memories, "rates": {"decay": rates}}

    def _chain(self, x: Array) -> tuple[Array, Place]:
        v, raw = jnp.split(self.chain_in(x), 2, axis=-1)
        gamma = 0.02 + jax.nn.softplus(raw - 2.0)
        rows, length = x.shape[:2]
        shape = rows, self.channels, length - 1
        upper, lower = (
            jnp.broadcast_to(part[None, :, None], shape) for part in (self.hopping[...], self.backward_hopping[...])
        )
        along = jax.vmap(jax.vmap(_resolvent))
        causal, green, left, right = along(jnp.moveaxis(v - 1j * gamma, 1, -1), upper, lower)
        features = jnp.moveaxis(jnp.concatenate([causal.real, causal.imag], 1), 1, -1)
        width = jnp.moveaxis(gamma, 1, -1) + Z.imag
        names = ("green", "left", "right", "upper", "lower", "width")
        return features, dict(zip(names, (green, left, right, upper, lower, width), strict=True))

    def _memory(self, x: Array) -> tuple[Array, Place, Array]:
        rows, length = x.shape[:2]
        q, k, v = jnp.split(jnp.reshape(self.memory_in(x), (rows, length, self.heads, -1)), 3, axis=-1)
        rate, eta = jax.nn.softplus(self.decay(x)), jnp.ones((rows, length, self.heads))
        read, _ = jax.vmap(hebbian.hebbian)(q, k, v, rate, eta)
        keys = k / (jnp.linalg.norm(k, axis=-1, keepdims=True) + 1e-6)
        parts = [jnp.moveaxis(part, 2, 1) for part in (keys, v, jnp.exp(-rate), eta)]
        states = jax.vmap(jax.vmap(_fast_weights))(*parts)
        names = ("memory_states", "keys", "values", "retention", "eta")
        memories = dict(zip(names, (states, *parts), strict=True))
        return jnp.reshape(read, (rows, length, -1)), memories, jnp.reshape(rate, (-1, self.heads))


class SmallModel(nnx.Module):
    """Token embedding, blocks, and a linear head.

    Args:
        vocabulary: number of tokens.
        width: D, even.
        layers: number of blocks.
        channels: chains of a block.
        heads: memories of a block.
        head: channels of a key.
        hidden: of the perceptrons.
        rngs: draws the parameters.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 16,
        layers: int = 2,
        channels: int = 2,
        heads: int = 2,
        head: int = 8,
        hidden: int = 32,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed = nnx.Embed(vocabulary, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.blocks = nnx.List([Block(width, channels, heads, head, hidden, rngs=rngs) for _ in range(layers)])
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: Int[Array, "b t"]) -> tuple[Float[Array, "b t v"], Observation]:
        """Return logits and the observation: for each kind its places.

        Args:
            tokens: rows of ids.
        """
        x = self.embed(tokens)
        stream, seen = [x], []
        for block in self.blocks:
            x, found = block(x)
            stream.append(x)
            seen.append(found)
        states = jnp.stack([jnp.reshape(h, (-1, jnp.shape(h)[-1])) for h in stream])
        observation: Observation = {kind: [found[kind] for found in seen] for kind in seen[0]}
        observation["trajectory"] = [{"states": states}]
        observation["maps"] = [
            {"layer": _map_of(block), "x": before} for block, before in zip(self.blocks, stream[:-1], strict=True)
        ]
        return self.head(_level(x)), observation


def recall(seed: int, steps: int, *, rows: int = 32, pairs: int = 3, symbols: int = 6) -> Iterator[Array]:
    """Yield batches (rows, 2·pairs + 2) of the recall task; the last token is the answer.

    Args:
        seed: of the draws.
        steps: number of batches.
        rows: of a batch.
        pairs: keys and values before the question.
        symbols: different keys, and different values; ids are below twice as many.
    """
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        keys = np.stack([generator.permutation(symbols)[:pairs] for _ in range(rows)])
        values = symbols + generator.integers(0, symbols, (rows, pairs))
        asked = generator.integers(0, pairs, (rows, 1))
        told = np.stack([keys, values], -1).reshape(rows, -1)
        question, answer = (np.take_along_axis(part, asked, 1) for part in (keys, values))
        yield jnp.asarray(np.concatenate([told, question, answer], 1))


def recall_loss(model: Any, batch: Int[Array, "b t"]) -> tuple[Float[Array, ""], Observation]:
    """Return the cross-entropy of the answer in nats, and what was observed.

    Args:
        model: from ids to logits and an observation.
        batch: of ``recall``.
    """
    logits, observation = model(batch[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[:, -1], batch[:, -1])), observation


def _level(x: Array) -> Array:
    """Return x with a mean square of one for every token."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _map_of(block: Block) -> Any:
    return lambda x: block(x)[0]


def _resolvent(diagonal: Array, upper: Array, lower: Array) -> tuple[Array, Array, Array, Array]:
    """Return the causal and the whole diagonal of the resolvent of one chain, and its ratios."""
    z = jnp.asarray(Z, diagonal.dtype)
    left, right = tridiagonal.ratios(diagonal, upper, lower, z)
    return 1 / left, 1 / (left + right - (diagonal - z)), left, right


def _fast_weights(keys: Array, values: Array, retention: Array, eta: Array) -> Array:
    """Return S_0 … S_T of one head."""

    def write(state: Array, row: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        k, v, a, strength = row
        state = a * state + strength * jnp.outer(k, v)
        return state, state

    start = jnp.zeros((keys.shape[-1], values.shape[-1]), values.dtype)
    _, rest = jax.lax.scan(write, start, (keys, values, retention, eta))
    return jnp.concatenate([start[None], rest])
