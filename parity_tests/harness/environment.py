"""What must hold in a process before anything is judged: float64 in JAX, strict promotion, one thread in PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import jax
import jaxtyping
import torch

CHECKED_ROOMS = ("so8t_jax", "so8t_torch.ops")
UNCHECKED_FILES = (".kernels", ".autograd")


def prepare() -> None:
    """Set JAX to float64 with strict dtype and rank promotion, and PyTorch to one thread."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    torch.set_num_threads(1)


class _Unchecked(MetaPathFinder):
    """Finds kernel and registration files the plain way: Triton and torch.library read their source and signature."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(CHECKED_ROOMS) and fullname.endswith(UNCHECKED_FILES):
            return PathFinder.find_spec(fullname, path, target)
        return None


def check_shapes() -> None:
    """Let jaxtyping and typeguard check every annotated call of the rooms imported from now on.

    The checks start switched off; ``shape_checks`` switches them on for a stretch of code.

    Raises:
        RuntimeError: a room was imported before, so that its functions would stay unchecked.
    """
    early = sorted(name for name in sys.modules if name.startswith(CHECKED_ROOMS))
    early = [name for name in early if name not in ("so8t_jax", "so8t_torch.ops")]
    if early:
        raise RuntimeError(f"expected no room imported before the shape checks, found {', '.join(early)}")
    jaxtyping.install_import_hook(list(CHECKED_ROOMS), "typeguard.typechecked")
    sys.meta_path.insert(0, _Unchecked())
    jaxtyping.config.update("jaxtyping_disable", True)


class shape_checks:  # noqa: N801 - used like contextlib's own lower-case managers
    """Switch the shape checks on or off inside a ``with`` block (``torch.compile`` cannot trace checked functions)."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        self.before = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", not self.enabled)

    def __exit__(self, *_: Any) -> None:
        jaxtyping.config.update("jaxtyping_disable", self.before)
