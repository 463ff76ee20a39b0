"""What must hold in a process before anything is judged: float64 in JAX, strict promotion, one thread in PyTorch."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, ForwardRef, get_args, get_type_hints

import jax
import jaxtyping
import torch
import typeguard

CHECKED_ROOMS = ("so8t_jax", "so8t_torch.ops")
UNCHECKED_FILES = ("kernels", ".autograd", ".reversible")


def prepare() -> None:
    """Set JAX to float64 with strict dtype and rank promotion, and PyTorch to one thread."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # a definition is compiled once and run a few times: compiling is what takes the time
    jax.config.update("jax_disable_most_optimizations", True)
    torch.set_num_threads(1)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check arguments and result of every call against the annotations, by typeguard's check of single values.

    typeguard's own decorator parses every string inside an annotation as an expression, and the axes of a shape
    (``"b t d"``) are none.
    """
    signature = inspect.signature(function)
    hints = {p.name: p.annotation for p in signature.parameters.values() if p.annotation is not p.empty}
    kinds = {p.name: p.kind for p in signature.parameters.values()}

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        for name, value in signature.bind(*arguments, **keywords).arguments.items():
            for each in _values(value, kinds[name]) if name in hints else ():
                typeguard.check_type(each, _resolved(hints[name]))
        result = function(*arguments, **keywords)
        if signature.return_annotation is not signature.empty:
            typeguard.check_type(result, _resolved(signature.return_annotation))
        return result

    return call


def _resolved(hint: Any) -> Any:
    """Return the annotation after the fields of the named tuples in it, which are strings, were evaluated.

    typeguard looks their names up where it was called, which is not where the tuple was defined.
    """
    for part in (hint, *get_args(hint)):
        fields = getattr(part, "__annotations__", {}) if hasattr(part, "_fields") else {}
        if any(isinstance(field, (str, ForwardRef)) for field in fields.values()):
            fields.update(get_type_hints(part))
    return hint


def _values(value: Any, kind: inspect._ParameterKind) -> Iterable[Any]:
    """Return what one annotation speaks of: every item of ``*arguments`` and ``**keywords``, else the value."""
    if kind is inspect.Parameter.VAR_KEYWORD:
        return value.values()
    return value if kind is inspect.Parameter.VAR_POSITIONAL else (value,)


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
    jaxtyping.install_import_hook(list(CHECKED_ROOMS), f"{__name__}.checked")
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
