"""The books of fast weights: their energy token by token, what takes from it and brings it, and how far it can go.

    E_t = ½‖S_t‖²,    E_t − E_{t−1} = −(1 − a_t²) E_{t−1} + a_t ⟨S_{t−1}, k_t w_tᵀ⟩ + ½|k_t|²|w_t|²,    w_t = η_t u_t
    2 E_t = e_t²‖S‖² + 2 e_t Σ_s D_ts ⟨S, k_s w_sᵀ⟩ + Σ_{r,s} D_tr D_ts (k_r·k_s)(w_r·w_s)
    B_t = a_t B_{t−1} + |η_t||k_t||v_t| ≥ ‖S_t‖

Symbols as in the room; S the state that enters a chunk, e and D the decays in it. The energies come from the second
line, which knows nothing of the first, so that the residual of the first says something. No state of a token is formed
and no number goes back to the host.
Cost: as the recurrence, and one more product of C × C matrices per chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from so8t_torch.core.precision import accumulation_dtype, without_autocast
from so8t_torch.ops.hebbian import arguments, eager
from so8t_torch.ops.hebbian.arguments import Discretization, KeyNorm, Rule
from so8t_torch.ops.hebbian.eager import Part, Weights
from so8t_torch.ops.linear_recurrence import linear_recurrence

__all__ = ["Balance", "energy_balance", "state_bound"]


class Balance(NamedTuple):
    """The energy E_t = ½‖S_t‖² of every token and head (..., T, H), and where it came from.

    Attributes:
        energy: E_t.
        entering: E_{t−1}, of the state that enters; 0 where it is dropped.
        dissipation: (1 − a_t²) E_{t−1}, what forgetting took.
        supply: a_t η_t ⟨S_{t−1}, k_t u_tᵀ⟩ + ½ η_t² |k_t|² |u_t|², what writing brought.
    """

    energy: Tensor
    entering: Tensor
    dissipation: Tensor
    supply: Tensor

    @property
    def residual(self) -> Tensor:
        """E_t − E_{t−1} + dissipation − supply: rounding errors."""
        return self.energy - self.entering + self.dissipation - self.supply


def energy_balance(
    k: Float[Tensor, "*batch t h k"],
    v: Float[Tensor, "*batch t h v"],
    decay: Float[Tensor, "*#tokens"],
    eta: Float[Tensor, "*#tokens"],
    initial: Float[Tensor, "*#batch h k v"] | None = None,
    segment_ids: Int[Tensor, "*#batch t"] | None = None,
    *,
    rule: Rule = "hebb",
    discretization: Discretization = "euler",
    key_norm: KeyNorm = "l2",
) -> Balance:
    """Return the energy of the state after every token, what took from it, and what brought it.

    Args:
        k: keys.
        v: values.
        decay: Γ ≥ 0 per token.
        eta: η.
        initial: the state that enters the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment; a state that is dropped belongs to no balance.
        rule: as for ``hebbian``.
        discretization: as for ``hebbian``.
        key_norm: as for ``hebbian``.

    Returns:
        (..., T, H) each, in float32 (float64 for float64), made of plain operations.

    Raises:
        ShapeError, DomainError, ConfigError: as ``hebbian``.

    Numerics:
        A number that is not finite spoils the figures of its whole chunk of 64 tokens. Under the rule "delta", whose
        triangular systems amplify rounding, the books are kept in float64 and rounded once.
    """
    arguments.check_options("energy_balance", rule=rule, discretization=discretization, key_norm=key_norm)
    given = arguments.prepare("energy_balance", k, v, decay, eta, initial, segment_ids, discretization)
    kind = torch.float64 if rule == "delta" else accumulation_dtype(v.dtype)
    keys = arguments.unit(given.k) if key_norm == "l2" else given.k.to(kind)
    values = given.v.to(kind)
    heads = v.shape[-2]
    state = v.new_zeros(len(keys) * heads, k.shape[-1], v.shape[-1], dtype=kind)
    state = state if given.initial is None else given.initial.to(kind).flatten(0, 1)
    found, cuts, whole = [], eager.chunks(v.shape[-3], rule == "delta"), slice(None)
    with without_autocast(v.device):
        columns = eager.heads_first(whole, keys, keys, values, given.log_decay, given.eta)
        for t in cuts:
            restart = eager.lanes(given.restart, whole, t, heads)
            balance, state = _of_chunk(eager.part_of(columns, t), state, restart, rule == "delta")
            found.append(balance)
    totals = (torch.cat(rows, -1).unflatten(0, (-1, heads)).mT for rows in zip(*found, strict=True))
    return Balance(*(x.reshape(v.shape[:-1]).to(accumulation_dtype(v.dtype)) for x in totals))


def state_bound(
    k: Float[Tensor, "*batch t h k"],
    v: Float[Tensor, "*batch t h v"],
    decay: Float[Tensor, "*#tokens"],
    eta: Float[Tensor, "*#tokens"],
    initial: Float[Tensor, "*#batch h k v"] | None = None,
    segment_ids: Int[Tensor, "*#batch t"] | None = None,
    *,
    discretization: Discretization = "euler",
    key_norm: KeyNorm = "l2",
) -> Float[Tensor, "*batch t h"]:
    """Return B_t = a_t B_{t−1} + |η_t| |k_t| |v_t|, B_{−1} = ‖initial‖: no state of the rule "hebb" has a larger norm.

    Args:
        k: keys.
        v: values.
        decay: Γ ≥ 0 per token.
        eta: η.
        initial: the state that enters the first token; zero by default.
        segment_ids: equal numbers for the tokens of one segment.
        discretization: as for ``hebbian``.
        key_norm: as for ``hebbian``.

    Returns:
        Bounds of ‖S_t‖ (Frobenius), in float32 (float64 for float64).

    Raises:
        ShapeError, DomainError, ConfigError: as ``hebbian``.
    """
    arguments.check_options("state_bound", discretization=discretization, key_norm=key_norm)
    given = arguments.prepare("state_bound", k, v, decay, eta, initial, segment_ids, discretization)
    kind = accumulation_dtype(v.dtype)
    lengths = _norm(given.k.to(kind))
    if key_norm == "l2":
        lengths = torch.where(lengths.detach() == 0, 0.0, torch.ones_like(lengths))
    write = given.eta.abs() * lengths * _norm(given.v.to(kind))
    start = None if given.initial is None else _norm(given.initial.to(kind).flatten(-2))
    ids = None if given.restart is None else given.restart.cumsum(-1)
    bound, _ = linear_recurrence(given.log_decay.exp(), write, start, ids)
    return bound.reshape(v.shape[:-1])


def _of_chunk(part: Part, state: Tensor, restart: Tensor | None, delta: bool) -> tuple[Balance, Tensor]:
    """Return the balance of a chunk, (b, c) each, and the state that leaves it."""
    weights = _decays(part.log_decay, restart)
    pair, keys, retention = weights.pair.mT, part.k, part.log_decay.exp()
    values = eager.innovations(part, state, weights) if delta else part.v
    written = part.eta[..., None] * values
    alike, under = keys @ keys.mT, keys @ state
    entered = eager.of_state(weights, torch.ones_like(part.eta)[..., None])[..., 0]
    first = state.square().sum((-2, -1))[..., None]
    pairs = ((pair @ (alike * (written @ written.mT))) * pair).sum(-1)
    mixed = (pair @ (under * written).sum(-1, keepdim=True))[..., 0]
    energy = (entered.square() * first + 2 * entered * mixed + pairs) / 2
    before = torch.cat([first / 2, energy[..., :-1]], -1)
    if restart is not None:
        before = torch.where(restart, 0.0, before)
    read = (alike * pair).tril(-1) @ written + eager.of_state(weights, under)
    supply = (written * read).sum(-1) + keys.square().sum(-1) * written.square().sum(-1) / 2
    dissipation = (1 - retention.square()) * before
    after = eager.through(weights, state) + (keys * eager.leave(weights)).mT @ written
    return Balance(energy, before, dissipation, supply), after


def _decays(log_decay: Tensor, restart: Tensor | None) -> Weights:
    """Return the decays between the tokens of a chunk from sums of logarithms: their derivative needs no host.

    The one of a product looks for zeros first.
    """
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    logs = torch.where(ones.triu(1), log_decay[..., None, :], 0.0).cumsum(-1)
    segment = torch.zeros_like(log_decay) if restart is None else restart.cumsum(-1)
    reached = (segment[:, None, :] == segment[:, :, None]).triu()
    pair = torch.where(reached, logs, -torch.inf).exp()
    dropped = None if restart is None else (segment > 0)[..., None]
    return Weights(pair, log_decay.cumsum(-1).exp()[..., None], dropped)


def _norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm along the last axis, 0 with gradient 0 for zeros."""
    length, empty = arguments.norms(x)
    return torch.where(empty, 0.0, length)
