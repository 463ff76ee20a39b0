"""An embedding whose table is a tensor train, with the phase of the holographic original, and its tied head.

    E[i] = Σ_ρ f(θ_ρ) C_1[j_1, 1, ρ_1, :] ⊗ C_2[j_2, ρ_1, ρ_2, :] ⊗ …      j = π(i)      logits[i] = ⟨h, E[i]⟩
    real cores: f(θ) = cos θ      complex cores: f(θ) = exp(iθ)

Symbols: π a stored permutation of ids, θ the phase of the first rank, C_k cores (v_k, r_{k−1}, r_k, d_k).
Definition: so8t_jax/ops/tensor_train.py. Derivation: docs/math/tensor_train.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, Inexact, Int

from so8t_jax.nn.weights import Buffer
from so8t_jax.ops import tensor_train

__all__ = ["HolographicTTEmbedding", "golden_permutation", "nearly_equal_divisors", "nearly_equal_factors"]

NOWHERE = -(2**31)
"""Position of padding: outside every table, whatever the permutation."""


class HolographicTTEmbedding(nnx.Module):
    """Rows of a tensor train by id, and the logits of all ids from hidden states.

    Args:
        vocab_size: V.
        d_model: D, width of a row; complex numbers if the cores are complex.
        rank: of every bond, or one for each.
        num_cores: K.
        phase_encoding: whether θ is trained, from N(0, 0.1²).
        init_scale: standard deviation of the initial output.
        complex_cores: cores and output are complex; cores hold real and imaginary part as two more numbers.
        padding_idx: the id whose row is zero and sends no gradient.
        vocab_factors: v_1 … v_K with Π v_k ≥ V; nearly equal ones by default.
        feature_factors: d_1 … d_K with Π d_k ≥ D; the most equal divisors of D by default.
        id_permutation: ``"golden"`` or ``"identity"``.
        emit: with complex cores ``"pair"`` lets a call return [Re, Im], 2D real numbers.
        param_dtype: of the parameters.
        rngs: source of the initial weights.

    Raises:
        ValueError: an unknown permutation, or D has no K divisors.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        rank: int | Sequence[int] = 16,
        num_cores: int = 2,
        phase_encoding: bool = True,
        init_scale: float = 0.02,
        *,
        complex_cores: bool = False,
        padding_idx: int | None = None,
        vocab_factors: Sequence[int] | None = None,
        feature_factors: Sequence[int] | None = None,
        id_permutation: Literal["golden", "identity"] = "golden",
        emit: Literal["real", "pair"] = "real",
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if id_permutation not in ("golden", "identity"):
            raise ValueError(f"expected id_permutation 'golden' or 'identity', got {id_permutation!r}")
        self.vocab_size, self.d_model, self.num_cores = vocab_size, d_model, num_cores
        self.complex_cores, self.padding_idx, self.emit = complex_cores, padding_idx, emit
        vocab = tuple(vocab_factors or nearly_equal_factors(vocab_size, num_cores))
        feature = tuple(feature_factors or nearly_equal_divisors(d_model, num_cores))
        inner = (rank,) * (num_cores - 1) if isinstance(rank, int) else tuple(rank)
        phase = jnp.zeros(inner[0], param_dtype)
        if phase_encoding:
            phase = 0.1 * jax.random.normal(rngs.params(), phase.shape, param_dtype)
        self.phase_shift = (nnx.Param if phase_encoding else Buffer)(phase)
        carried = inner[0] if complex_cores else (jnp.cos(phase) ** 2).sum()
        scale = (init_scale**2 / (carried * math.prod(inner[1:]))) ** (0.5 / num_cores)
        scale = scale / math.sqrt(2.0) if complex_cores else scale
        parts, ranks = (2,) if complex_cores else (), (1, *inner, 1)
        for k in range(num_cores):
            shape = (vocab[k], ranks[k], ranks[k + 1], feature[k], *parts)
            noise = jax.random.normal(rngs.params(), shape, param_dtype)
            setattr(self, f"core{k + 1}", nnx.Param(noise * scale))
        ids = np.arange(vocab_size, dtype=np.int32)
        self.id_permutation = Buffer(jnp.asarray(golden_permutation(vocab_size) if id_permutation == "golden" else ids))

    def __call__(self, input_ids: Int[Array, " t"]) -> Float[Array, "t width"]:
        """Return the rows of ids, real: [Re, Im] if the cores are complex and ``emit`` is ``"pair"``.

        Args:
            input_ids: in [0, V); a row of NaN for any other (production refuses it).

        Raises:
            ValueError: the cores are complex and ``emit`` is ``"real"``.
        """
        found = self.rows(input_ids)
        if not self.complex_cores:
            return found
        if self.emit == "real":
            raise ValueError("the rows are complex: build the embedding with emit='pair', or call rows")
        return jnp.concatenate([found.real, found.imag], -1)

    def rows(self, input_ids: Int[Array, " t"]) -> Inexact[Array, "t d"]:
        """Return the rows of ids, complex if the cores are.

        Args:
            input_ids: in [0, V).
        """
        ids = input_ids.astype(jnp.int32)
        inside = (ids >= 0) & (ids < self.vocab_size)
        places = jnp.where(inside, self.id_permutation[...][jnp.where(inside, ids, 0)], self.vocab_size)
        padding = None if self.padding_idx is None else NOWHERE
        if padding is not None:
            places = jnp.where(ids == self.padding_idx, padding, places)
        cores, shape = self.cores(), {"vocab_size": self.vocab_size, "d_model": self.d_model}
        return jax.vmap(lambda place: tensor_train.rows(place, *cores, **shape, padding_idx=padding))(places)

    def logits(self, hidden: Float[Array, "t d"]) -> Float[Array, "t v"]:
        """Return ⟨h, E[i]⟩ for all ids: the tied head.

        Args:
            hidden: h of each token.

        Raises:
            ValueError: the cores are complex, or an id is padding, whose zero row is not part of the train.
        """
        if self.complex_cores or self.padding_idx is not None:
            raise ValueError("expected real cores and no padding_idx for a head")
        cores = self.cores()
        placed = jax.vmap(lambda h: tensor_train.logits(h, *cores, vocab_size=self.vocab_size))(hidden)
        return placed[:, self.id_permutation[...]]

    def cores(self) -> tuple[Inexact[Array, "_ _ _ _"], ...]:
        """Return the cores with the phase folded into the first."""
        stored = [getattr(self, f"core{k + 1}")[...] for k in range(self.num_cores)]
        phase = self.phase_shift[...]
        if not self.complex_cores:
            return (stored[0] * jnp.cos(phase)[None, None, :, None], *stored[1:])
        first, *others = (_joined(core) for core in stored)
        wave = jax.lax.complex(jnp.cos(phase), jnp.sin(phase))
        return (first * wave[None, None, :, None], *others)


def nearly_equal_factors(n: int, parts: int) -> tuple[int, ...]:
    """Return v_1 ≥ … ≥ v_parts whose product covers n: ⌈n^(1/parts)⌉, then the rest of n likewise.

    Args:
        n: the number to cover.
        parts: how many factors.
    """
    if parts == 1:
        return (n,)
    first = next(root for root in range(max(1, int(n ** (1 / parts)) - 1), n + 1) if root**parts >= n)
    return (first, *nearly_equal_factors(-(-n // first), parts - 1))


def nearly_equal_divisors(n: int, parts: int) -> tuple[int, ...]:
    """Return divisors w_1 ≤ … ≤ w_parts of n above 1 with the least Σ (log w_k)², the first of equal splits.

    Args:
        n: the number to split.
        parts: how many divisors.

    Raises:
        ValueError: there are none.
    """
    divisors = [d for d in range(2, n + 1) if n % d == 0]
    splits = [s for s in itertools.combinations_with_replacement(divisors, parts) if math.prod(s) == n]
    if not splits:
        raise ValueError(f"expected a width with {parts} factors above 1, got {n}; give feature_factors")
    return min(splits, key=lambda split: sum(math.log(factor) ** 2 for factor in split))


def golden_permutation(size: int) -> np.ndarray:
    """Return π(i) = g i mod V, g the number coprime to V nearest V (√5 − 1)/2.

    Args:
        size: V.
    """
    near = round(size * (math.sqrt(5.0) - 1.0) / 2.0)
    factor = min((g for g in range(1, size + 1) if math.gcd(g, size) == 1), key=lambda g: abs(g - near))
    return (np.arange(size, dtype=np.int64) * factor % size).astype(np.int32)


def _joined(core: Array) -> Complex[Array, "_ _ _ _"]:
    """Return a core whose last axis holds real and imaginary part as complex numbers."""
    return jax.lax.complex(core[..., 0], core[..., 1])
