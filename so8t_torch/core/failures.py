"""Errors of a running model that list what would help: memory, numerics, settings, hardware.

The ``raise_`` functions turn what a caller knows about the moment into the remedies that apply to it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from so8t_torch.core.errors import SO8TError


def _listed(head: str, lines: Sequence[str]) -> str:
    return "\n".join([head, *(f"  - {line}" for line in lines)])


class VRAMExhaustedError(SO8TError, RuntimeError):
    """The GPU has less memory than the step needs.

    Args:
        current_mb: memory in use, MiB.
        limit_mb: memory there is, MiB.
        suggestions: what would fit, a sentence each.
    """

    def __init__(self, current_mb: float, limit_mb: float, suggestions: Sequence[str]) -> None:
        self.current_mb, self.limit_mb, self.suggestions = current_mb, limit_mb, list(suggestions)
        head = f"Out of GPU memory: {current_mb:,.0f} MiB in use of {limit_mb:,.0f} MiB. What helps:"
        super().__init__(_listed(head, self.suggestions))


class NumericalInstabilityError(SO8TError, RuntimeError):
    """Numbers of a component are not finite or left their range.

    Args:
        component: module path or name of what is concerned.
        diagnostics: what was measured, by name.
    """

    def __init__(self, component: str, diagnostics: dict[str, Any]) -> None:
        self.component, self.diagnostics = component, dict(diagnostics)
        seen = [f"{name}: {value}" for name, value in self.diagnostics.items()]
        help_ = ["lower the learning rate", "clip gradients to norm 1.0", "go back to the last healthy checkpoint"]
        super().__init__(_listed(f"Numerical instability in {component}.", [*seen, *(f"try: {x}" for x in help_)]))


class InvalidConfigError(SO8TError, ValueError):
    """A setting has a value that cannot be.

    Args:
        param_name: of the setting.
        param_value: what it was.
        reason: why not, with what is expected.
    """

    def __init__(self, param_name: str, param_value: Any, reason: str) -> None:
        self.param_name, self.param_value, self.reason = param_name, param_value, reason
        super().__init__(f"{param_name} = {param_value!r} is not valid.\n  - {reason}")


class HardwareCompatibilityError(SO8TError, RuntimeError):
    """The machine lacks what was asked for.

    Args:
        required: what is needed.
        available: what there is.
        fallback: what works instead, ``None`` for nothing.
    """

    def __init__(self, required: str, available: str, fallback: str | None = None) -> None:
        self.required, self.available, self.fallback = required, available, fallback
        instead = "there is no substitute on this machine" if fallback is None else f"instead: {fallback}"
        super().__init__(f"Required: {required}.\n  - available: {available}\n  - {instead}")


def raise_vram_exhausted(
    current: float,
    limit: float,
    batch_size: int,
    seq_len: int,
    ar_ssm_enabled: bool = False,
    lns_enabled: bool = False,
    gradient_checkpointing: bool = False,
) -> NoReturn:
    """Raise with the remedies that are left in this situation.

    Args:
        current: memory in use, MiB.
        limit: memory there is, MiB.
        batch_size: rows of a micro-batch.
        seq_len: tokens of a row.
        ar_ssm_enabled: whether layers of adaptive rank are in use.
        lns_enabled: whether logarithmic arithmetic is in use.
        gradient_checkpointing: whether activations are recomputed already.

    Raises:
        VRAMExhaustedError: always.
    """
    remedies = [
        (batch_size > 1, f"halve the batch: {batch_size} → {batch_size // 2}"),
        (seq_len > 512, f"halve the length: {seq_len} → {seq_len // 2} tokens"),
        (not gradient_checkpointing, "switch gradient checkpointing on"),
        (ar_ssm_enabled, "lower the largest rank of the AR-SSM layers"),
        (lns_enabled, "switch logarithmic arithmetic (LNS) off"),
        (True, "train in mixed precision (bfloat16)"),
        (True, "use a GPU with more memory"),
    ]
    raise VRAMExhaustedError(current, limit, [text for applies, text in remedies if applies])


def raise_numerical_instability(
    component: str,
    has_nan: bool = False,
    has_inf: bool = False,
    max_value: float | None = None,
    min_value: float | None = None,
    gradient_norm: float | None = None,
    det_condition: float | None = None,
    **extra: Any,
) -> NoReturn:
    """Raise with what was measured; what was not (``None``) is left out.

    Args:
        component: module path or name of what is concerned.
        has_nan: whether a NaN was seen.
        has_inf: whether an infinity was seen.
        max_value: largest value.
        min_value: smallest value.
        gradient_norm: norm of the gradient.
        det_condition: condition number or determinant of the resolvent.
        extra: further measurements by name.

    Raises:
        NumericalInstabilityError: always.
    """
    measured = {
        "has_nan": has_nan,
        "has_inf": has_inf,
        "max_value": max_value,
        "min_value": min_value,
        "gradient_norm": gradient_norm,
        "det_condition": det_condition,
        **extra,
    }
    raise NumericalInstabilityError(component, {name: value for name, value in measured.items() if value is not None})


def check_cuda_available(require_triton: bool = False) -> None:
    """Make sure that there is a CUDA device, and where asked, Triton.

    Args:
        require_triton: whether kernels have to run.

    Raises:
        HardwareCompatibilityError: naming what is missing.
    """
    if not torch.cuda.is_available():
        raise HardwareCompatibilityError(
            "a CUDA device", "none that torch can use", 'the CPU paths: leave backend="auto", expect them to be slow'
        )
    if require_triton and importlib.util.find_spec("triton") is None:
        raise HardwareCompatibilityError("Triton", "it cannot be imported", 'the PyTorch paths: backend="eager"')
