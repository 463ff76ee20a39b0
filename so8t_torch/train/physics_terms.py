"""The table of physics terms that a run can be asked to observe, by the name under which a configuration asks.

A term is a function of arrays. Its positional parameters name what it looks at (see ``observation.KINDS``), its
keyword-only parameters are its options, and it returns (value, diagnostics): a value c ≥ 0 without unit, small where
the physics holds. Terms of the trajectory use H(x) = ½|p|² + (κ/2)|q|², which nothing trained can change: an energy
that is learned along could lower its penalty by becoming flat. A closed system is assumed, supply 0.
``register_term`` adds one; the formulas are those of the room ``physics``.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_torch.core.errors import ConfigError
from so8t_torch.ops import physics
from so8t_torch.train.observation import KINDS, Place

Found = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Term:
    """A function, the kind of quantity it looks at, and the names of its arguments and options."""

    name: str
    function: Callable[..., Found]
    kind: str
    looks_at: tuple[str, ...]
    options: tuple[str, ...]

    def value(self, places: Sequence[Place], options: Mapping[str, float]) -> Float[Tensor, ""]:
        """Return the mean over places, and over whatever problems stand side by side in one."""
        found = [self.function(**{name: place[name] for name in self.looks_at}, **options)[0] for place in places]
        return torch.stack([value.mean() for value in found]).mean()


_TERMS: dict[str, Term] = {}


def register_term(function: Callable[..., Found], name: str | None = None) -> Callable[..., Found]:
    """Make a term known under its name; usable as a decorator.

    Args:
        function: positional parameters among the names of one kind, options keyword-only with defaults.
        name: for configurations; the function's own by default.

    Returns:
        The function.

    Raises:
        ConfigError: the parameters are of no kind, or the name is taken by another function.
    """
    name = function.__name__ if name is None else name
    parameters = inspect.signature(function).parameters.values()
    looks_at = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
    options = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    kinds = [kind for kind, names in KINDS.items() if looks_at and set(looks_at) <= set(names)]
    if not kinds:
        offered = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in KINDS.items())
        raise ConfigError(f"Term {name!r} looks at {', '.join(looks_at) or 'nothing'}; one kind can be had: {offered}.")
    known = _TERMS.get(name)
    if known is not None and known.function is not function:
        raise ConfigError(f"A term {name!r} exists already; give yours another name.")
    _TERMS[name] = Term(name, function, kinds[0], looks_at, options)
    return function


def term_names() -> list[str]:
    """Return the names of all terms, in order of registration."""
    return list(_TERMS)


def find_term(name: str, options: Mapping[str, float]) -> Term:
    """Return the term of a name.

    Args:
        name: as in a configuration.
        options: that it will be called with.

    Raises:
        ConfigError: no such term or option; the nearest is named.
    """
    if name not in _TERMS:
        raise ConfigError(f"physics.terms: no term is called {name!r:.80}; {_nearest(name, _TERMS)}.")
    term = _TERMS[name]
    for option in options:
        if option not in term.options:
            raise ConfigError(f"physics.terms.{name}: no option {option!r:.80}; {_nearest(option, term.options)}.")
    return term


def import_terms(module: str) -> None:
    """Import a module that registers terms.

    Args:
        module: dotted name, installed or on PYTHONPATH.

    Raises:
        ConfigError: there is no such module.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise ConfigError(f"There is no module {module!r:.80} to take terms from; install it, or set PYTHONPATH.")
    importlib.import_module(module)


def _nearest(name: str, names: Any) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}"


def _quadratic(states: Tensor, kappa: float) -> list[Tensor]:
    """Return the parameters of H(x) = ½|p|² + (κ/2)|q|², as the room takes them."""
    half = states.shape[-1] // 2
    one, none = states.new_ones(half), states.new_zeros(1)
    return [one, states.new_tensor(kappa), none, states.new_zeros(1, half), none]


@register_term
def energy_drift(states: Tensor, *, kappa: float = 1.0) -> Found:
    """Return the drift of H from layer to layer."""
    return physics.energy_drift(physics.energy(states, *_quadratic(states, kappa)))


@register_term
def energy_balance(states: Tensor, *, kappa: float = 1.0, resistance: float = 0.01, step: float = 1.0) -> Found:
    """Return how far every layer is from losing h ḡᵀRḡ, with R = ``resistance`` for all channels."""
    # ΔE − g·Δx cancels where a layer changes little
    states = states.double()
    energies = physics.energy(states, *_quadratic(states, kappa))
    middle = physics.energy_gradient((states[1:] + states[:-1]) / 2, *_quadratic(states, kappa))
    slopes = physics.discrete_gradient(middle, states.diff(dim=0), energies.diff(dim=0))
    losses = torch.full_like(states[0, 0], resistance)
    return physics.energy_balance(energies, slopes, losses, step=step)


@register_term
def hamiltonian_residual(states: Tensor, *, kappa: float = 1.0, resistance: float = 0.0, step: float = 1.0) -> Found:
    """Return how far the layers' increments are from h(J − R)∇H."""
    slopes = physics.energy_gradient(states[:-1], *_quadratic(states, kappa))
    losses = torch.full_like(states[0, 0], resistance)
    return physics.hamiltonian_residual(states.diff(dim=0), slopes, losses, step=step)


@register_term
def lyapunov_hinge(states: Tensor, *, kappa: float = 1.0, rate: float = 0.0, step: float = 1.0) -> Found:
    """Return by how much energy exceeds what a decay at ``rate`` leaves of it."""
    return physics.lyapunov_hinge(physics.energy(states, *_quadratic(states, kappa)), rate=rate, step=step)


@register_term
def memory_balance(
    memory_states: Tensor, keys: Tensor, values: Tensor, retention: Tensor, eta: Tensor, *, norm: float | None = None
) -> Found:
    """Return the residual of a memory's books, and by how much its energy exceeds ½ ``norm``²."""
    bound = None if norm is None else torch.full_like(retention, norm)
    return physics.memory_balance(memory_states, keys, values, retention, eta, bound)


@register_term
def decay_budget(decay: Tensor, *, shortest: float = 4.0, longest: float = 4096.0) -> Found:
    """Return how far the mean rate of every head is from that of half-lives spread evenly in their logarithm."""
    heads = decay.shape[-1]
    share = torch.linspace(0, 1, heads, dtype=decay.dtype, device=decay.device)
    lives = math.log(shortest) + share * math.log(longest / shortest)
    return physics.decay_budget(decay, math.log(2) * (-lives).exp())


register_term(physics.half_life_divergence)
register_term(physics.symplectic_defect)
register_term(physics.ward_residual)
