"""The resolvent of a tridiagonal matrix along a chain: diagonal, causal part, neighbours, determinant (BK-core).

    G = (H − z)⁻¹,  H_ii = h_i, H_{i,i+1} = b_i, H_{i+1,i} = c_i        d_i = h_i − z,  β_i = b_i c_i
    L_i = d_i − β_{i−1}/L_{i−1}    R_i = d_i − β_i/R_{i+1}              (L_0 = d_0, R_{N−1} = d_{N−1})
    full: G_ii = 1/(L_i + R_i − d_i)    causal: g_i = 1/L_i, the last diagonal entry of (H_{0…i} − z)⁻¹
    log det(H − z) = Σ_i log L_i    G_{i,i+1} = −(b_i/R_{i+1}) G_ii    G_{i+1,i} = −(c_i/R_{i+1}) G_ii

Symbols: h diagonals (…, N), real or v − iΓ with decay rates Γ; b upper and c lower couplings (…, N−1); z complex
numbers (…); leading axes broadcast. β_i = 0 parts a chain between i and i + 1, whatever stands beyond, finite or not.
If β ≥ 0, Γ ≥ 0 and Im z > 0 then Im L_i, Im R_i ≤ −(Γ_i + Im z), so that |g_i|, |G_ii| ≤ 1/(Γ_i + Im z): nothing is
clamped. Real numbers are float32 or float64, complex ones complex64 or complex128, all of one precision, in whose range
the products β_i have to lie: in float32 |b| and |c| from 10⁻¹⁹ to 10¹⁹. Above, the segment is NaN from there on; below,
β = 0 parts it. Other units of energy bring a chain into the range.
Cost: O(N) operations in about 3 √(N/2) steps on a CPU, in blocks of 1,024 sites on a GPU; the exact gradient of
everything is a linear scan in each direction. The ratios, β and the result are saved.
Twin: so8t_jax/ops/tridiagonal.py. Derivation: docs/math/tridiagonal.md.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Inexact, Int
from torch import Tensor
from torch.nn.functional import pad

from so8t_torch.core import forward_mode
from so8t_torch.core.backend import Candidate, choose, explain, triton_reasons
from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.tensors import expect_tensors, expect_tensors_or_none
from so8t_torch.ops.tridiagonal import autograd, eager

__all__ = ["advance", "green", "log_det", "off_diagonals", "ratios", "step"]

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
LEFT, BOTH = (False,), (False, True)


def ratios(
    diagonal: Inexact[Tensor, "*#batch n"],
    upper: Inexact[Tensor, "*#batch n-1"],
    lower: Inexact[Tensor, "*#batch n-1"],
    z: Inexact[Tensor, "*#batch"],
    segment_ids: Int[Tensor, "*#batch n"] | None = None,
    *,
    require_dissipation: bool = True,
    backend: str = "auto",
) -> tuple[Complex[Tensor, "... n"], Complex[Tensor, "... n"]]:
    """Return the left and the right ratios L, R of leading and trailing minors.

    Args:
        diagonal: h, in units of energy like all else; complex for v − iΓ.
        upper: b_i = H_{i,i+1}.
        lower: c_i = H_{i+1,i}.
        z: where the resolvent is taken.
        segment_ids: couplings between sites of different numbers count as zero.
        require_dissipation: refuse Im z ≤ 0 and Im h_i > 0, for which |G_ii| has no bound. Off the CPU and in compiled
            graphs, which do not wait for values, NaN takes the place of the error.
        backend: ``"triton"``, ``"blocked"``, ``"eager"`` (plain operations site by site, the only one with forward-mode
            derivatives and those of ``torch.func``), or ``"auto"``.

    Returns:
        L and R (…, N), complex.

    Raises:
        ShapeError: no sites, couplings that are not N − 1, or axes that do not broadcast.
        DomainError: half precision, dtypes or devices that disagree, or a site without dissipation.
        BackendError: the backend cannot run this call.
    """
    chain = _chain("ratios", diagonal, upper, lower, z, segment_ids, require_dissipation)
    left, right = _ratios(chain, BOTH, backend)
    return left, right


def green(
    diagonal: Inexact[Tensor, "*#batch n"],
    upper: Inexact[Tensor, "*#batch n-1"],
    lower: Inexact[Tensor, "*#batch n-1"],
    z: Inexact[Tensor, "*#batch"],
    segment_ids: Int[Tensor, "*#batch n"] | None = None,
    *,
    mode: Literal["causal", "full"] = "causal",
    require_dissipation: bool = True,
    backend: str = "auto",
) -> Complex[Tensor, "... n"]:
    """Return the diagonal of the resolvent, or its causal part, which depends on sites 0 … i alone.

    Args:
        diagonal: h, real or v − iΓ.
        upper: b_i = H_{i,i+1}.
        lower: c_i = H_{i+1,i}.
        z: where the resolvent is taken.
        segment_ids: couplings between sites of different numbers count as zero.
        mode: ``"causal"`` for 1/L_i, ``"full"`` for G_ii, in which later sites enter.
        require_dissipation: as for ``ratios``.
        backend: as for ``ratios``.

    Returns:
        g or G_ii (…, N), complex.

    Raises:
        ShapeError, DomainError, BackendError: as for ``ratios``.
        ConfigError: the mode is unknown.
    """
    if mode not in ("causal", "full"):
        raise ConfigError(f"tridiagonal.green: expected mode 'causal' or 'full', got {mode!r}.")
    chain = _chain("green", diagonal, upper, lower, z, segment_ids, require_dissipation)
    if mode == "causal":
        return _ratios(chain, LEFT, backend)[0].reciprocal()
    return _diagonal(chain, _ratios(chain, BOTH, backend))


def log_det(
    diagonal: Inexact[Tensor, "*#batch n"],
    upper: Inexact[Tensor, "*#batch n-1"],
    lower: Inexact[Tensor, "*#batch n-1"],
    z: Inexact[Tensor, "*#batch"],
    segment_ids: Int[Tensor, "*#batch n"] | None = None,
    *,
    require_dissipation: bool = True,
    backend: str = "auto",
) -> Complex[Tensor, "*chains"]:
    """Return log det(H − z) as the sum of the principal logarithms of L_i; exp of it is the determinant.

    Args:
        diagonal: h, real or v − iΓ.
        upper: b_i = H_{i,i+1}.
        lower: c_i = H_{i+1,i}.
        z: where the determinant is taken.
        segment_ids: couplings between sites of different numbers count as zero; all segments are summed. For some of
            them, sum log L of ``ratios`` over their sites.
        require_dissipation: as for ``ratios``.
        backend: as for ``ratios``.

    Raises:
        ShapeError, DomainError, BackendError: as for ``ratios``.
    """
    chain = _chain("log_det", diagonal, upper, lower, z, segment_ids, require_dissipation)
    return _ratios(chain, LEFT, backend)[0].to(eager.WIDE).log().sum(-1).to(chain.beta.dtype)


def off_diagonals(
    diagonal: Inexact[Tensor, "*#batch n"],
    upper: Inexact[Tensor, "*#batch n-1"],
    lower: Inexact[Tensor, "*#batch n-1"],
    z: Inexact[Tensor, "*#batch"],
    segment_ids: Int[Tensor, "*#batch n"] | None = None,
    *,
    require_dissipation: bool = True,
    backend: str = "auto",
) -> tuple[Complex[Tensor, "... n-1"], Complex[Tensor, "... n-1"]]:
    """Return G_{i,i+1} and G_{i+1,i} of the resolvent (…, N−1); zero between segments.

    Args:
        diagonal: h, real or v − iΓ.
        upper: b_i = H_{i,i+1}.
        lower: c_i = H_{i+1,i}.
        z: where the resolvent is taken.
        segment_ids: couplings between sites of different numbers count as zero.
        require_dissipation: as for ``ratios``.
        backend: as for ``ratios``.

    Raises:
        ShapeError, DomainError, BackendError: as for ``ratios``.
    """
    chain = _chain("off_diagonals", diagonal, upper, lower, z, segment_ids, require_dissipation)
    sides = _ratios(chain, BOTH, backend)
    here, beyond = _diagonal(chain, sides)[..., :-1], sides[1][..., 1:]
    if segment_ids is not None:
        joined = _joined(segment_ids)
        here, beyond = torch.where(joined, here, 0.0), torch.where(joined, beyond, 1.0)
    return -(chain.upper / beyond) * here, -(chain.lower / beyond) * here


def advance(
    state: Complex[Tensor, "*batch"],
    d: Complex[Tensor, "*batch t"],
    beta: Inexact[Tensor, "*batch t"],
    *,
    backend: str = "auto",
) -> tuple[Complex[Tensor, "*batch t"], Complex[Tensor, "*batch"]]:
    """Return the causal g of t more sites, and the state after them; pieces of any length give what one run gives.

    Args:
        state: g of the site before, 0 at the start of a chain.
        d: h_t − z of each site.
        beta: coupling of each site to the one before it; 0 starts a segment.
        backend: as for ``ratios``.

    Returns:
        g, and its last entry as the state.

    Raises:
        ShapeError: no sites, or shapes that disagree.
        DomainError: d or the state is not complex, or dtypes or devices disagree.
        BackendError: the backend cannot run this call.
    """
    expect_tensors("tridiagonal.advance", state=state, d=d, beta=beta)
    _check_stream("advance", state, d, beta)
    if d.ndim == 0 or d.shape[-1] == 0 or not (d.shape == beta.shape and state.shape == d.shape[:-1]):
        raise ShapeError(
            "tridiagonal.advance: expected a state (...), d (..., T) and beta (..., T) with T > 0, got "
            f"{tuple(state.shape)}, {tuple(d.shape)} and {tuple(beta.shape)}."
        )
    beta = beta.to(d.dtype)
    first = d[..., :1] - _self_energy(state[..., None], beta[..., :1])
    chain = _Chain(torch.cat([first, d[..., 1:]], -1), pad(beta[..., 1:], (0, 1)), beta, beta)
    g = _ratios(chain, LEFT, backend)[0].reciprocal()
    return g, g[..., -1]


def step(
    state: Complex[Tensor, "*batch"], d_t: Complex[Tensor, "*batch"], beta_t: Inexact[Tensor, "*batch"]
) -> tuple[Complex[Tensor, "*batch"], Complex[Tensor, "*batch"]]:
    """Return g_t = 1/(d_t − β_t g_{t−1}) and the next state, which is g_t again: one complex number per chain.

    Args:
        state: g_{t−1}, 0 at the start of a chain.
        d_t: h_t − z of this site.
        beta_t: coupling of this site to the one before; 0 starts a segment.

    Raises:
        ShapeError: shapes that disagree.
        DomainError: d_t or the state is not complex, or dtypes or devices disagree.
    """
    expect_tensors("tridiagonal.step", state=state, d_t=d_t, beta_t=beta_t)
    _check_stream("step", state, d_t, beta_t)
    if not state.shape == d_t.shape == beta_t.shape:
        raise ShapeError(
            "tridiagonal.step: expected a state, d_t and beta_t of one shape, got "
            f"{tuple(state.shape)}, {tuple(d_t.shape)} and {tuple(beta_t.shape)}."
        )
    g = (d_t - _self_energy(state, beta_t)).reciprocal()
    return g, g


def explain_backend(diagonal: Tensor) -> str:
    """Return one line per backend: that it can run on this diagonal, or every reason why not."""
    return explain(_candidates(diagonal))


class _Chain(NamedTuple):
    """What a sweep needs: d, β with a zero at its end, and the couplings that are not cut; complex.

    The difference d = h − z is kept in double precision, because its rounding is the largest error near a resonance.
    """

    d: Tensor
    beta: Tensor
    upper: Tensor
    lower: Tensor


def _chain(
    op: str,
    diagonal: Tensor,
    upper: Tensor,
    lower: Tensor,
    z: Tensor,
    segment_ids: Tensor | None,
    require_dissipation: bool,
) -> _Chain:
    """Return the checked operator with every batch axis written out and no coupling between segments."""
    expect_tensors(f"tridiagonal.{op}", diagonal=diagonal, upper=upper, lower=lower, z=z)
    expect_tensors_or_none(f"tridiagonal.{op}", segment_ids=segment_ids)
    batch = _check_shapes(op, diagonal, upper, lower, z, segment_ids)
    _check_kinds(op, (diagonal, upper, lower, z), segment_ids)
    dtype = COMPLEX.get(diagonal.dtype, diagonal.dtype)
    upper, lower = upper.to(dtype), lower.to(dtype)
    if segment_ids is not None:
        joined = _joined(segment_ids)
        upper, lower = torch.where(joined, upper, 0.0), torch.where(joined, lower, 0.0)
    d = diagonal.to(eager.WIDE) - z[..., None]
    if require_dissipation:
        d = _dissipating(op, d, diagonal, z)
    beta = pad(upper * lower, (0, 1))
    return _Chain(d.expand(*batch, -1), beta.expand(*batch, -1), upper, lower)


def _ratios(chain: _Chain, reverse: tuple[bool, ...], backend: str) -> Tensor:
    """Return the ratios (S, …, N) of the given sweeps by the chosen implementation."""
    shape = chain.d.shape
    d, beta = (x.reshape(math.prod(shape[:-1]), shape[-1]) for x in (chain.d, chain.beta))
    chosen = choose("tridiagonal", backend, _candidates(d, beta))
    found = eager.ratios(d, beta, reverse) if chosen == "eager" else autograd.ratios(d, beta, reverse, chosen)
    return found.reshape(len(reverse), *shape)


def _diagonal(chain: _Chain, sides: Tensor) -> Tensor:
    """Return G_ii = 1/(L_i + R_i − d_i)."""
    return (sides[0] + sides[1] - chain.d).reciprocal().to(chain.beta.dtype)


def _self_energy(state: Tensor, beta: Tensor) -> Tensor:
    """Return β g of what came before, 0 where β = 0 stands over no finite number."""
    return beta * torch.where((beta != 0) | torch.isfinite(state), state, 0.0)


def _joined(segment_ids: Tensor) -> Tensor:
    """Return where a site and the next belong to one segment (…, N−1)."""
    return segment_ids[..., 1:] == segment_ids[..., :-1]


def _dissipating(op: str, d: Tensor, diagonal: Tensor, z: Tensor) -> Tensor:
    """Return d if every Im z > 0 and no Im h > 0; where values are not waited for, NaN in the places that are not."""
    outside = (z.imag <= 0 if z.is_complex() else torch.ones_like(z, dtype=torch.bool))[..., None]
    if diagonal.is_complex():
        outside = outside | (diagonal.imag > 0)
    if d.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(outside, torch.nan, d)
    if outside.any():
        raise DomainError(
            f"tridiagonal.{op}: expected Im z > 0 and diagonals v − iΓ with Γ ≥ 0, without which the resolvent has no "
            "bound; change them, or pass require_dissipation=False."
        )
    return d


def _candidates(*tensors: Tensor) -> list[Candidate]:
    """Return the implementations in order of preference, each with the reasons why it cannot run."""
    one_way = forward_mode.reasons(*tensors)
    return [
        Candidate("triton", (*triton_reasons(tensors[0]), *one_way)),
        Candidate("blocked", one_way),
        Candidate("eager"),
    ]


def _check_shapes(
    op: str, diagonal: Tensor, upper: Tensor, lower: Tensor, z: Tensor, segment_ids: Tensor | None
) -> torch.Size:
    """Return the batch axes of a chain of at least one site and N − 1 couplings, or raise."""
    n = diagonal.shape[-1] if diagonal.ndim else 0
    if n == 0:
        raise ShapeError(f"tridiagonal.{op}: expected a diagonal (..., N) with N > 0, got {tuple(diagonal.shape)}.")
    sizes = [("upper", upper, n - 1), ("lower", lower, n - 1)]
    if segment_ids is not None:
        sizes.append(("segment_ids", segment_ids, n))
    for name, tensor, size in sizes:
        if tensor.ndim == 0 or tensor.shape[-1] != size:
            raise ShapeError(
                f"tridiagonal.{op}: expected {name} (..., {size}) for {n} sites, got {tuple(tensor.shape)}."
            )
    leading = [diagonal.shape[:-1], *(tensor.shape[:-1] for _, tensor, _ in sizes), z.shape]
    try:
        return torch.broadcast_shapes(*leading)
    except RuntimeError as error:
        raise ShapeError(
            f"tridiagonal.{op}: expected leading axes that broadcast, got {', '.join(str(tuple(s)) for s in leading)} "
            "for the chain and z; z has one number per chain."
        ) from error


def _check_kinds(op: str, numbers: tuple[Tensor, ...], segment_ids: Tensor | None) -> None:
    """Raise unless all numbers have one precision, float32 or float64, and everything is on one device."""
    kinds = {COMPLEX.get(x.dtype, x.dtype) for x in numbers}
    if len(kinds) > 1 or not kinds <= set(COMPLEX.values()):
        raise DomainError(
            f"tridiagonal.{op}: expected real or complex numbers of one precision, float32 or float64, got "
            f"{', '.join(str(x.dtype) for x in numbers)}; convert them (half precision to float32)."
        )
    if segment_ids is not None and (segment_ids.is_floating_point() or segment_ids.is_complex()):
        raise DomainError(f"tridiagonal.{op}: expected integer segment_ids, got {segment_ids.dtype}; convert them.")
    tensors = (*numbers, segment_ids) if segment_ids is not None else numbers
    if len({x.device for x in tensors}) > 1:
        raise DomainError(
            f"tridiagonal.{op}: expected everything on one device, got {', '.join(str(x.device) for x in tensors)}."
        )


def _check_stream(op: str, state: Tensor, d: Tensor, beta: Tensor) -> None:
    """Raise unless state and d are complex and everything has one precision and one device."""
    if not (state.is_complex() and d.is_complex()):
        raise DomainError(
            f"tridiagonal.{op}: expected a complex state and complex d, got {state.dtype} and {d.dtype}; convert them."
        )
    _check_kinds(op, (state, d, beta), None)
