"""A mixer of tokens by the resolvent of a lossy tridiagonal operator (the BK layer).

    v, Γ, Γ^mem = affine in x_t,  the rates through γ + softplus(·)      V_t = v_t − iΓ_t
    H = V + hopping b between neighbours      y_t = [Re g_t, Im g_t],  g = causal or full diagonal of (H − z)⁻¹

Symbols: x activations (N, D) of one example; K channels, each a chain of its own over the tokens; z (K,) in the upper
half-plane, Im z = 0.01 + softplus(·); b = softplus(·) couples a token to the one before it.
Definition: so8t_jax/ops/tridiagonal.py. Derivation: docs/math/tridiagonal.md.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Complex, Float, Int

from so8t_jax.nn.non_hermitian_potential import NonHermitianPotential, Potential, softplus_inverse
from so8t_jax.ops import tridiagonal

__all__ = ["DissipativeBKLayer", "Mixed"]

LEAST_IMAGINARY = 1e-2
"""Least Im z."""


class Mixed(NamedTuple):
    """What the layer gives.

    Attributes:
        features: Re g of all channels, then Im g (N, 2K).
        state: g at the last token (K,), to be handed back with the next tokens; ``None`` in mode ``"full"``.
        potential: what entered, for a memory that decays with it.
    """

    features: Float[Array, "n c"]
    state: Complex[Array, " k"] | None
    potential: Potential


class DissipativeBKLayer(nnx.Module):
    """Features of each token from the resolvent of a lossy chain over the tokens up to it.

    Args:
        d_model: D.
        channels: K.
        mode: ``"causal"``, or ``"full"``, in which later tokens enter: for encoders only.
        hermitian: the coupling back is b too; without it a number of either sign per channel.
        adaptive_hopping: b is softplus(raw + w·x_t) instead of one number per channel.
        include_gamma_in_h: whether chains have rates, which enter the resolvent.
        memory_heads: as for ``NonHermitianPotential``, like the following ones.
        base_decay: see there.
        memory_base_decay: see there.
        adaptive_decay: see there.
        dt: see there.
        param_dtype: of the parameters.
        rngs: source of the initial weights.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        d_model: int,
        *,
        channels: int = 1,
        mode: Literal["causal", "full"] = "causal",
        hermitian: bool = True,
        adaptive_hopping: bool = False,
        include_gamma_in_h: bool = True,
        memory_heads: int = 0,
        base_decay: float = 1e-3,
        memory_base_decay: float = 1e-4,
        adaptive_decay: bool = True,
        dt: float = 1.0,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if mode not in ("causal", "full"):
            raise ValueError(f"expected mode 'causal' or 'full', got {mode!r}")
        self.mode, self.hermitian = mode, hermitian
        self.potential = NonHermitianPotential(
            d_model,
            channels=channels,
            memory_heads=memory_heads,
            base_decay=base_decay,
            memory_base_decay=memory_base_decay,
            chain_decay=include_gamma_in_h,
            adaptive_decay=adaptive_decay,
            dt=dt,
            param_dtype=param_dtype,
            rngs=rngs,
        )

        def constant(value: float) -> nnx.Param:
            return nnx.Param(jnp.full(channels, value, param_dtype))

        self.hopping, self.z_real = constant(softplus_inverse(0.5)), constant(0.1)
        self.z_imaginary = constant(softplus_inverse(0.1 - LEAST_IMAGINARY))
        self.backward_hopping = nnx.data(None) if hermitian else constant(0.5)
        self.hopping_weight = nnx.data(None)
        if adaptive_hopping:
            noise = jax.random.normal(rngs.params(), (channels, d_model), param_dtype)
            self.hopping_weight = nnx.Param(noise * (0.1 * d_model**-0.5))

    def __call__(
        self,
        x: Float[Array, "n d"],
        state: Complex[Array, " k"] | None = None,
        segment_ids: Int[Array, " n"] | None = None,
        *,
        shift: Float[Array, "n k"] | None = None,
    ) -> Mixed:
        """Return features, state and potential.

        Args:
            x: activations.
            state: what the call on the tokens before returned; ``None`` or zeros at the start of a document.
            segment_ids: chains restart where the number changes.
            shift: is added to v, by a memory of the tokens before.

        Raises:
            ValueError: a state in mode ``"full"``, where the past cannot be summed up.
        """
        potential = self.potential(x)
        if shift is not None:
            potential = potential._replace(v=potential.v + shift)
        d = (potential.values - self.z()[None]).T
        beta = self._couplings(x, segment_ids)
        if self.mode == "full":
            if state is not None:
                raise ValueError("expected no state in mode 'full', which reads the whole chain")
            g, last = jax.vmap(_full)(d, beta[:, 1:]), None
        else:
            start = jnp.zeros_like(d[:, 0]) if state is None else state
            g, last = jax.vmap(tridiagonal.advance)(start, d, beta)
        return Mixed(jnp.concatenate([g.real, g.imag]).T, last, potential)

    def z(self) -> Complex[Array, " k"]:
        """Return where the resolvent is taken, in the upper half-plane."""
        return jax.lax.complex(self.z_real[...], LEAST_IMAGINARY + jax.nn.softplus(self.z_imaginary[...]))

    def _couplings(self, x: Array, segment_ids: Array | None) -> Array:
        """Return β (K, N) of each token to the one before it, 0 where a segment begins inside."""
        raw = jnp.broadcast_to(self.hopping[...][:, None], (len(self.hopping[...]), len(x)))
        if self.hopping_weight is not None:
            raw = raw + self.hopping_weight[...] @ x.T
        b = jax.nn.softplus(raw)
        beta = b * (b if self.backward_hopping is None else self.backward_hopping[...][:, None])
        if segment_ids is None:
            return beta
        continues = jnp.concatenate([jnp.ones(1, bool), segment_ids[1:] == segment_ids[:-1]])
        return jnp.where(continues[None], beta, 0.0)


def _full(d: Array, beta: Array) -> Array:
    """Return G_ii of d = h − z."""
    origin = jnp.zeros((), d.dtype)
    return tridiagonal.green(d, beta, jnp.ones_like(beta), origin, mode="full", require_dissipation=False)
