"""Which implementation runs, and why.

An op offers candidates in order of preference. Each carries the reasons why it cannot run this call; an
empty tuple means that it can. ``auto`` takes the first that can. Asking for one by name and not getting it
is an error that lists every reason: there is no silent fallback, and no environment variable changes numbers.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from so8t_torch.core.errors import BackendError


@dataclass(frozen=True)
class Candidate:
    """One implementation of an op and the reasons (if any) why it cannot run this call."""

    name: str
    reasons: tuple[str, ...] = ()


def choose(op: str, requested: str, candidates: Sequence[Candidate]) -> str:
    """Return the name of the implementation that runs.

    Args:
        op: name used in the error text.
        requested: ``"auto"`` or the name of a candidate.
        candidates: in order of preference.

    Raises:
        BackendError: the requested one is unknown or cannot run, or none can.
    """
    if requested == "auto":
        for candidate in candidates:
            if not candidate.reasons:
                return candidate.name
        raise BackendError(f"{op}: no backend can run this call.\n{explain(candidates)}")
    for candidate in candidates:
        if candidate.name == requested:
            if not candidate.reasons:
                return candidate.name
            raise BackendError(f"{op}: backend {requested!r} cannot run this call.\n{explain(candidates)}")
    names = ", ".join(["auto", *(candidate.name for candidate in candidates)])
    raise BackendError(f"{op}: unknown backend {requested!r}; expected one of {names}.")


def explain(candidates: Sequence[Candidate]) -> str:
    """Return one line per candidate: that it can run, or every reason why not."""
    return "\n".join(f"  {c.name}: " + ("can run" if not c.reasons else "; ".join(c.reasons)) for c in candidates)


_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_installed() -> bool:
    """Whether Triton can be imported here."""
    return _TRITON_INSTALLED


def interpreting() -> bool:
    """Whether kernels decorated in this process run in Triton's interpreter (read once, before decoration)."""
    return _INTERPRETING


def triton_reasons(*tensors: torch.Tensor) -> tuple[str, ...]:
    """Return why Triton cannot run on these tensors; empty when it can."""
    if not triton_installed():
        return ("triton is not installed (it has Linux wheels only)",)
    device = tensors[0].device
    if device.type != "cuda" and not interpreting():
        return (f"tensors are on {device}, Triton needs a CUDA device (or a process started with TRITON_INTERPRET=1)",)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return ("the CUDA device is older than compute capability 8.0",)
    return ()
