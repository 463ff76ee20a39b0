"""What a Phase 2 block tells about itself: potentials and rates, the books of its memory, signal, noise and modes.

    balance:  E_t − E_{t−1} = −dissipation + supply,  E = ½‖S‖²      stable: ‖S_t‖ within the bound that its inputs set

Everything is detached. ``"full"`` gives a tensor per token; ``"summary"`` one number for each of them, over the tokens
that are no padding: the root mean square of activations and potentials, the mean of all else, counts of violations.
The entries of ``snr_stats`` and ``resonance_info`` describe the state after the last token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.precision import without_autocast
from so8t_torch.nn.dissipative_bk import Mixed
from so8t_torch.nn.modulated_memory import ModulatedMemory

__all__ = ["TOKEN_DIAGNOSTICS", "block_report", "memory_findings", "resolvent_findings"]

_SQUARED = ("v_complex", "bk_features", "hebbian_output", "ffn_output", "potential_feedback")
"""Entries of which a summary is the root mean square."""
_BOOKS = ("energy", "dissipation", "supply", "balance_residual", "bound", "within_bound")
_RATES = ("gamma", "chain_gamma", "adjusted_gamma", "adjusted_eta", "dE_dt", "is_stable", "suggested_gamma_adjust")
TOKEN_DIAGNOSTICS = frozenset((*_SQUARED, *_BOOKS, *_RATES))
"""Entries that have an axis of tokens where they are full."""


def resolvent_findings(mixed: Mixed, shift: Tensor | None) -> dict[str, Tensor]:
    """Return what the resolvent found of each token.

    Args:
        mixed: what its layer returned.
        shift: what the memory added to the potentials (B, 1 or N, K), or nothing.
    """
    found = {
        "chain_gamma": mixed.potential.gamma.detach(),
        "v_complex": mixed.potential.values.detach(),
        "bk_features": mixed.features.detach(),
    }
    if shift is not None:
        found["potential_feedback"] = shift.detach().expand(*mixed.features.shape[:2], -1)
    return found


def memory_findings(rates: Tensor, read: Tensor, worked: dict[str, Tensor], dt: float) -> dict[str, Tensor]:
    """Return what the memory found of each token.

    Args:
        rates: Γ (B, N, H) as the token has them, per unit of time.
        read: what the tokens got from it (B, N, D).
        worked: rates and strengths as they acted, and the books.
        dt: time from token to token.
    """
    books = {name: part for name, part in worked.items() if name not in ("decay", "eta")}
    return {
        "gamma": rates.detach(),
        "hebbian_output": read.detach(),
        "adjusted_gamma": worked["decay"] / dt,
        "adjusted_eta": worked["eta"],
        "dE_dt": (books["energy"] - books.pop("entering")) / dt,
        **books,
    }


@torch.no_grad()
def block_report(
    memory: ModulatedMemory | None,
    found: dict[str, Tensor],
    state: dict[str, Tensor],
    real: Tensor | None,
    level: str,
) -> dict[str, Any]:
    """Return the diagnostics of a block under the names that users know.

    Args:
        memory: of the block.
        found: what was found of each token.
        state: after the last token.
        real: False where a token is padding (B, N).
        level: ``"full"`` or ``"summary"``.
    """
    report: dict[str, Any] = {"potential_feedback": None, **found}
    report.setdefault("gamma", found["chain_gamma"])
    stability: dict[str, Any] = {}
    if memory is not None:
        stability = {name: report.pop(name) for name in (*_BOOKS, "dE_dt") if name in report}
        report["stability"] = stability | _judgement(stability, real)
        report |= _of_the_state(memory, state["memory"])
    if level == "full":
        return report
    return {name: _summary(name, value, real) for name, value in report.items()}


def _judgement(books: dict[str, Tensor], real: Tensor | None) -> dict[str, Tensor]:
    """Return where the bound holds, how often it does not, and how much faster forgetting would keep it."""
    size = (2 * books["energy"]).clamp(min=0).sqrt()
    if "bound" not in books:
        stable, excess = torch.isfinite(size), torch.zeros_like(size)
    else:
        stable = books["within_bound"]
        excess = torch.where(stable, 0.0, torch.log(size / books["bound"]))
    broken = ~stable if real is None else ~stable & real[..., None]
    return {"is_stable": stable, "suggested_gamma_adjust": excess, "violation_count": broken.sum(1)}


def _of_the_state(memory: ModulatedMemory, weights: Tensor) -> dict[str, Any]:
    """Return energy, signal and modes of a state (B, H, K, V)."""
    found: dict[str, Any] = {"fast_weight_energy": weights.square().sum((-2, -1)) / 2}
    with without_autocast(weights.device):
        found["snr_stats"] = None if memory.snr is None else memory.snr.get_statistics(weights)
        found["resonance_info"] = None if memory.resonance is None else memory.resonance(weights)[1]
    return found


def _summary(name: str, value: Any, real: Tensor | None) -> Any:
    """Return one number instead of a tensor, in nested parts as well."""
    if isinstance(value, dict):
        return {key: _summary(key, part, real) for key, part in value.items()}
    if not isinstance(value, Tensor):
        return value
    if name == "violation_count":
        return value.sum()
    value = value.abs().square() if name in _SQUARED else value
    value = value.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
    if real is not None and name in TOKEN_DIAGNOSTICS:
        value = value[real]
    mean = value.mean()
    return mean.sqrt() if name in _SQUARED else mean
