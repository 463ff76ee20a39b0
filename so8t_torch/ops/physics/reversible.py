"""The damped leapfrog in PyTorch: stored by autograd, or run backwards so that only its last state is kept.

    force  F(q) = −κq − Σ_m s_m σ(a_m) w_m,  a = Wq + b       ∂F/∂q = −κI − Σ_m s_m σ′(a_m) w_m w_mᵀ  (symmetric)
    step   p ← cp + (h/2)F(q),  q ← q + h M⁻¹p,  p ← c(p + (h/2)F(q))

The adjoint of a step is exact for the step that was taken: it is the transpose of the formulas above, at states that
are recovered from the last one by the step of −h. What is run backwards is carried in float64 while forces are computed
in the working dtype: the same forces come back, and sums of float64 lose nothing that float32 would notice. The adjoint
consists of plain operations, so derivatives of higher order exist; they store what they need.
Derivation: docs/math/physics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from so8t_torch.core.precision import without_autocast

Gradients = tuple[Tensor, ...]


def force(q: Tensor, kappa: Tensor, scales: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Return −∇V(q)."""
    return -kappa * q - (scales * torch.sigmoid(q @ weights.mT + biases)) @ weights


def integrate(x: Tensor, parameters: Sequence[Tensor], step: float, kept: float, steps: int) -> Tensor:
    """Return the state after some steps, in the dtype of x.

    Args:
        x: the state (q, p).
        parameters: 1/M, κ, s, w, b in the dtype in which forces are computed.
        step: h.
        kept: c.
        steps: how many.
    """
    inverse_mass, *potential = parameters
    q, p = x.chunk(2, -1)
    if steps == 0:
        return x.clone()
    dtype = potential[0].dtype
    pull = force(q.to(dtype), *potential)
    for _ in range(steps):
        p = kept * p + step / 2 * pull
        q = q + step * inverse_mass * p
        pull = force(q.to(dtype), *potential)
        p = kept * (p + step / 2 * pull)
    return torch.cat([q, p], -1)


def integrate_reversibly(x: Tensor, parameters: Sequence[Tensor], step: float, kept: float, steps: int) -> Tensor:
    """Return the same in float64 with one saved state, whatever the number of steps."""
    y: Tensor = _Reversible.apply(x.double(), *parameters, step, kept, steps)
    return y


def plain(*tensors: Tensor) -> bool:
    """Whether no tensor carries a tangent or belongs to a vmap: what is made of them can be read as numbers."""
    if torch.compiler.is_compiling():
        return True
    return not any(_mapped(tensor) or forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


@torch.no_grad()
def recovery_error(x: Tensor, y: Tensor, parameters: Sequence[Tensor], step: float, kept: float, steps: int) -> Tensor:
    """Return max|x − x̂| / max|x| () for the x̂ that the steps of −h recover from y.

    Args:
        x: the state before the steps.
        y: what ``integrate_reversibly`` made of it.
        parameters: as in ``integrate``.
        step: h.
        kept: c.
        steps: how many.
    """
    back = integrate(y, parameters, -step, 1 / kept, steps)
    return (back - x).abs().max() / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)


class _Reversible(torch.autograd.Function):
    """The integrator whose backward pass runs the steps backwards."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *arguments: Any) -> Tensor:
        *parameters, step, kept, steps = arguments
        return integrate(x, parameters, step, kept, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *parameters, ctx.step, ctx.kept, ctx.steps = inputs
        ctx.dtype = parameters[0].dtype
        ctx.save_for_backward(output, *parameters)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        # Inside of autocast a backward pass runs outside of it, unless it is called from within.
        with without_autocast(g.device):
            totals: Gradients = tuple(torch.zeros_like(parameter) for parameter in parameters)
            g = g.to(ctx.dtype)
            for _ in range(ctx.steps):
                x = integrate(x, parameters, -ctx.step, 1 / ctx.kept, 1)
                g, found = _pull_step(g, x.to(ctx.dtype), parameters, ctx.step, ctx.kept)
                totals = tuple(total + part for total, part in zip(totals, found, strict=True))
        return g.to(x.dtype), *totals, None, None, None


def _pull_step(
    g: Tensor, x: Tensor, parameters: Sequence[Tensor], step: float, kept: float
) -> tuple[Tensor, Gradients]:
    """Return the cotangents of the state before a step and of the parameters, from g after it."""
    inverse_mass, *potential = parameters
    (q, p), (g_q, g_p) = x.chunk(2, -1), g.chunk(2, -1)
    p = kept * p + step / 2 * force(q, *potential)
    moved = q + step * inverse_mass * p
    g_p = kept * g_p
    along, second = _pull_force(step / 2 * g_p, moved, *potential)
    g_q = g_q + along
    g_mass = _over_batch(step * p * g_q)
    g_p = g_p + step * inverse_mass * g_q
    along, first = _pull_force(step / 2 * g_p, q, *potential)
    kicks = (a + b for a, b in zip(first, second, strict=True))
    return torch.cat([g_q + along, kept * g_p], -1), (g_mass, *kicks)


def _pull_force(
    g: Tensor, q: Tensor, kappa: Tensor, scales: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Gradients]:
    """Return the cotangents of q and of the parameters of F, from g of F(q)."""
    gate = torch.sigmoid(q @ weights.mT + biases)
    along = g @ weights.mT
    bend = scales * gate * (1 - gate) * along
    g_weights = _outer(scales * gate, g) + _outer(bend, q)
    parameters = ((g * q).sum(), _over_batch(gate * along), g_weights, _over_batch(bend))
    return -kappa * g - bend @ weights, tuple(-part for part in parameters)


def _mapped(tensor: Tensor) -> bool:
    """Whether a vmap, below other transformations or not, runs over the tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _over_batch(x: Tensor) -> Tensor:
    """Return the sum over all but the last axis."""
    return x.reshape(-1, x.shape[-1]).sum(0)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_batch left rightᵀ."""
    return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])
