"""What must hold in a process before anything is judged: float64 in JAX, strict promotion, one thread in PyTorch."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, UnionType
from typing import Any, ForwardRef, Union, get_args, get_origin, get_type_hints

import jax
import jaxtyping
import torch
import typeguard

CHECKED_ROOMS = ("so8t_jax", "so8t_torch.ops")
UNCHECKED_FILES = ("kernels", ".autograd", ".reversible")
PLAIN = (torch.Tensor, bool, int, float, str, type(None))
VARIADIC = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


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
    (``"b t d"``) are none. What is plainly right is not shown to typeguard, which takes longer than most functions.
    """
    signature = inspect.signature(function)
    hints = {p.name: p.annotation for p in signature.parameters.values() if p.annotation is not p.empty}
    kinds = {p.name: p.kind for p in signature.parameters.values()}
    names, variadic = tuple(kinds), not VARIADIC.isdisjoint(kinds.values())

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        given: Mapping[str, Any] = {**dict(zip(names, arguments, strict=False)), **keywords}
        if variadic:
            given = signature.bind(*arguments, **keywords).arguments
        for name, value in given.items():
            for each in _values(value, kinds[name]) if name in hints else ():
                _check(each, hints[name])
        result = function(*arguments, **keywords)
        if signature.return_annotation is not signature.empty:
            _check(result, signature.return_annotation)
        return result

    return call


def _check(value: Any, hint: Any) -> None:
    if not _plainly(hint)(value):
        typeguard.check_type(value, _resolved(hint))


@functools.cache
def _plainly(hint: Any) -> Callable[[Any], bool]:
    """Return what says that a value is of a hint made of plain classes, arrays, unions and tuples.

    Its no means nothing: typeguard decides.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda _: True
    if hint in PLAIN or (isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)):
        return lambda value: isinstance(value, hint)
    if origin in (Union, UnionType):
        each = tuple(map(_plainly, parts))
        return lambda value: any(accepts(value) for accepts in each)
    if origin is tuple and Ellipsis not in parts:
        each = tuple(map(_plainly, parts))
        return lambda value: (
            type(value) is tuple
            and len(value) == len(each)
            and all(accepts(v) for accepts, v in zip(each, value, strict=True))
        )
    return lambda _: False


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
