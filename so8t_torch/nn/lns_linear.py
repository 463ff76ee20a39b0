"""The affine map y = x Wᵀ + b computed in sign–log numbers, and the conversion of dense layers to it.

    x_ik = s·exp(ℓ)     y_ij = Σ_k x_ik W_jk + 1·b_j     (mode "sum")
                        y_ij = the term of largest magnitude among x_ik W_jk and 1·b_j, the first of equals ("max")
    ∂y_ij/∂x_ik = W_jk   ∂y_ij/∂W_jk = x_ik   ∂y_ij/∂b_j = 1     ("max": for the chosen term alone, else 0)

Symbols: x activations (M, K), W weight (N, K), b bias (N,). Half precision is computed in float32. The derivative is
that of the map, also where a factor is exactly zero; a chain through the logarithms would give 0 there, because
∂ log|x|/∂x has no value at 0. Nothing is cached: logs are taken from the weights of the moment, and x and W are all
that is kept for the backward pass.
Cost: an exp and a log per entry of x, W and y, and one GEMM where their ranges suffice; two GEMMs backward. It buys
log-domain semantics for a small multiple of a dense layer's time (benchmarks/lns.py), and no energy. Mode "max" does
M·N·K additions forward and again backward.
Operation: so8t_torch/ops/lns. Derivation: docs/math/lns.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.ops import lns
from so8t_torch.ops.lns.autograd import search

__all__ = ["Conversion", "LNSLinear", "convert_linear_to_lns", "lns_matmul"]

Mode = Literal["sum", "max"]
Operands = tuple[Tensor, Tensor, Tensor | None]

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LNSLinear(nn.Linear):
    """A linear layer in sign–log numbers: parameters, initialisation and state dict are those of ``nn.Linear``.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        bias: whether b is one more term of every sum.
        mode: ``"sum"``, or ``"max"``: the term of largest magnitude stands for the sum (max-log arithmetic).
        cancellation_guard: τ in [0, 1); where |y_ij| < τ Σ_k|terms| that output passes no gradient. 0 means never.
            The value of y is not changed. Has no place in mode ``"max"``, which adds nothing up.
        backend: of ``ops.lns.matmul``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ConfigError: a width below 1, an unknown mode, or a guard out of range.
    """

    mode: Mode
    cancellation_guard: float
    backend: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mode: Mode = "sum",
        cancellation_guard: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if min(in_features, out_features) < 1:
            raise ConfigError(f"LNSLinear: expected widths of at least 1, got {in_features} and {out_features}.")
        _check_options("LNSLinear", mode, cancellation_guard)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.mode, self.cancellation_guard, self.backend = mode, cancellation_guard, backend

    def forward(self, x: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch n"]:
        """Return x Wᵀ + b through sign–log numbers, finite wherever the result has a place in the dtype.

        Args:
            x: activations of the dtype of the weight, any strides; any floating dtype under autocast.

        Returns:
            y in the dtype of x, or in autocast's dtype where ``nn.Linear`` would answer in it. A product of an
            infinite and a zero factor is a zero term.

        Raises:
            ShapeError: the last axis of x is not ``in_features``.
            DomainError: x is not real floating-point, or of another dtype than the weight without autocast.
            BackendError: the backend cannot run this call.
        """
        dtype = self._answer_dtype(x)
        device = x.device.type
        with torch.autocast(device, enabled=False):
            flat = x.reshape(-1, self.in_features)
            y = _affine(flat, self.weight, self.bias, self.mode, self.cancellation_guard, self.backend)
        return y.to(dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return the widths and the options that differ from their defaults."""
        parts = [super().extra_repr(), f"mode={self.mode!r}"]
        if self.cancellation_guard:
            parts.append(f"cancellation_guard={self.cancellation_guard:g}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)

    def _answer_dtype(self, x: Tensor) -> torch.dtype:
        """Return the dtype of y, or raise where x does not fit this layer."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ShapeError(
                f"LNSLinear: expected x (..., {self.in_features}), got {tuple(x.shape)}; its last axis is in_features."
            )
        if x.dtype not in FLOATING:
            raise DomainError(f"LNSLinear: expected real floating-point x, got {x.dtype}; convert it first.")
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(device)
        if x.dtype != self.weight.dtype:
            raise DomainError(
                f"LNSLinear: x is {x.dtype}, the weight {self.weight.dtype}; convert one of them or use autocast."
            )
        return x.dtype


class Conversion(NamedTuple):
    """What ``convert_linear_to_lns`` did.

    Attributes:
        module: the converted module.
        converted: names of the layers that compute in sign–log numbers since this call.
        kept: names of the dense layers that the predicate left alone.
    """

    module: Any
    converted: tuple[str, ...]
    kept: tuple[str, ...]


def convert_linear_to_lns(
    module: nn.Module,
    *,
    mode: Mode = "sum",
    predicate: Callable[[str, nn.Linear], bool] | None = None,
    inplace: bool = True,
) -> Conversion:
    """Let every chosen ``nn.Linear`` inside a module, or the module itself, compute in sign–log numbers.

    The layer objects stay: parameters, their ties, hooks, devices, frozen flags and optimisers that hold them are
    untouched. Only a plain ``nn.Linear`` with ordinary weights can be chosen; a quantised, lazy, parametrised or
    otherwise derived layer gives its weights another meaning.

    Args:
        module: root; it keeps its other layers.
        mode: as in ``LNSLinear``.
        predicate: called with the name and the layer of every ``nn.Linear`` found, derived classes included; without
            it all are chosen. A layer under several names is converted when one of them is chosen.
        inplace: convert this module, or a deep copy of it.

    Returns:
        The module and the names of the layers that were converted and kept; layers that are ``LNSLinear`` already
        are neither.

    Raises:
        ConfigError: an unknown mode, or a chosen layer that is not a plain ``nn.Linear``; nothing is converted then.
    """
    _check_options("convert_linear_to_lns", mode, 0.0)
    if not inplace:
        module = copy.deepcopy(module)
    chosen, kept = _split(module, predicate)
    problems = [f"  {name or '(root)'}: {reason}" for name, layer in chosen for reason in _refusals(layer)]
    if problems:
        raise ConfigError(
            "convert_linear_to_lns: these layers cannot be converted; leave them out with predicate=.\n"
            + "\n".join(problems)
        )
    for _, layer in chosen:
        layer.__class__ = LNSLinear
        layer.mode, layer.cancellation_guard, layer.backend = mode, 0.0, "auto"
    return Conversion(module, tuple(name for name, _ in chosen), kept)


def lns_matmul(
    a: Float[Tensor, "*batch m k"], b: Float[Tensor, "*batch k n"], *, mode: Mode = "sum", backend: str = "auto"
) -> Float[Tensor, "*batch m n"]:
    """Return log Σ_k exp(a_ik + b_kj) in float32: the product of positive matrices given by their logs.

    Tile sizes (``block_size_m``, ``block_size_n``, ``block_size_k``) are not arguments: they are data of the kernels,
    timed per device. Neither is a clip (``gradient_clip_value``): the gradient is a sum of cotangents with weights
    exp(a_ik + b_kj − c_ij) ≤ 1, and a clip would make it another function's.

    Args:
        a: logs of the left factor; −∞ is an exact zero.
        b: logs of the right factor.
        mode: ``"sum"``, or ``"max"`` for max_k (a_ik + b_kj).
        backend: of ``ops.lns.logmatmulexp``.

    Returns:
        The logs of the product, in float32 whatever the dtype of a and b; the sum is carried in float64 for float64.

    Raises:
        ShapeError, DomainError, ConfigError, BackendError: as ``ops.lns.logmatmulexp``.
    """
    wide = torch.promote_types(accumulation_dtype(a.dtype), accumulation_dtype(b.dtype))
    return lns.logmatmulexp(a.to(wide), b.to(wide), mode=mode, backend=backend).float()


def _affine(*arguments: Any) -> Tensor:
    """Return y (M, N) of x, W, b and the options, in the accumulation dtype, with derivatives in both directions."""
    # A compiled graph takes no function with a forward-mode rule.
    return (_Affine if torch.compiler.is_compiling() else _TransformableAffine).apply(*arguments)


class _Affine(torch.autograd.Function):
    """The value in sign–log numbers, the derivative of the map; both in the accumulation dtype."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, mode: Mode, _guard: float, backend: str) -> Tensor:
        # Without their tangents: the derivative is the business of the rules below, whatever the backend can do.
        rows, columns = (lns.encode(matrix.detach()) for matrix in _matrices((x, weight, bias)))
        return lns.decode(*lns.matmul(*rows, *columns, mode=mode, backend=backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.mode, *ctx.guard = inputs[3:]
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        operands = ctx.saved_tensors
        pull = _pull_sum if ctx.mode == "sum" else _pull_max
        with torch.autocast(g.device.type, enabled=False):
            return *pull(_guarded(g, operands, *ctx.guard), operands, ctx.needs_input_grad), None, None, None


class _TransformableAffine(_Affine):
    """The same with rules for forward mode and for ``torch.vmap``, which runs one example after the other."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Affine.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        operands = ctx.saved_tensors
        return _guarded(_push(operands, tangents[:3], ctx.mode), operands, *ctx.guard)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        def example(i: int) -> list[Any]:
            return [a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)]

        return torch.stack([_affine(*example(i)) for i in range(info.batch_size)]), 0


def _pull_sum(g: Tensor, operands: Operands, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return g W, gᵀ x and Σ_i g_i in the dtypes of x, W and b, as far as they are needed."""
    x, weight, bias = operands
    dx = (g @ weight.to(g.dtype)).to(x.dtype) if needed[0] else None
    dweight = (g.mT @ x.to(g.dtype)).to(weight.dtype) if needed[1] else None
    return dx, dweight, g.sum(0).to(bias.dtype) if needed[2] and bias is not None else None


def _pull_max(g: Tensor, operands: Operands, _needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Return what the chosen terms alone pass on, in the dtypes of x, W and b."""
    x, weight, bias = operands
    rows, columns = _matrices(operands)
    chosen = _first_largest(rows, columns)
    drows = torch.zeros_like(rows).scatter_add(1, chosen, g * columns.gather(0, chosen))
    dcolumns = torch.zeros_like(columns).scatter_add(0, chosen, g * rows.gather(1, chosen))
    width = x.shape[1]
    dbias = None if bias is None else dcolumns[width].to(bias.dtype)
    return drows[:, :width].to(x.dtype), dcolumns[:width].mT.to(weight.dtype), dbias


def _push(operands: Operands, tangents: tuple[Tensor | None, ...], mode: Mode) -> Tensor:
    """Return the tangent of y for tangents of x, W and b, where None stands for zero."""
    x, weight, bias = operands
    dx, dweight, dbias = tangents
    dx = torch.zeros_like(x) if dx is None else dx
    dweight = torch.zeros_like(weight) if dweight is None else dweight
    dbias = torch.zeros_like(bias) if bias is not None and dbias is None else dbias
    rows, columns = _matrices(operands)
    drows, dcolumns = _matrices((dx, dweight, dbias), one=0.0)
    if mode == "sum":
        return drows @ columns + rows @ dcolumns
    chosen = _first_largest(rows, columns)
    return drows.gather(1, chosen) * columns.gather(0, chosen) + rows.gather(1, chosen) * dcolumns.gather(0, chosen)


def _guarded(g: Tensor, operands: Operands, guard: float, backend: str) -> Tensor:
    """Return g with zeros where |y_ij| < τ Σ_k|terms|, that is τκ > 1."""
    if not guard:
        return g
    with torch.no_grad():
        rows, columns = (lns.encode(matrix) for matrix in _matrices(operands))
        cancels = guard * lns.condition_number(*rows, *columns, backend=backend) > 1
    return torch.where(cancels, 0.0, g)


def _matrices(operands: Operands, one: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return [x, 1] and [W, b]ᵀ, or x and Wᵀ without a bias, in the accumulation dtype of x."""
    x, weight, bias = operands
    dtype = accumulation_dtype(x.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    if bias is None:
        return x, weight.mT
    return pad(x, (0, 1), value=one), torch.cat([weight, bias.to(dtype)[:, None]], 1).mT


def _first_largest(rows: Tensor, columns: Tensor) -> Tensor:
    """Return argmax_k (log|rows_ik| + log|columns_kj|) (M, N), the first of equals, as the product chooses it."""
    _, a = lns.encode(rows.detach())
    _, b = lns.encode(columns.detach())
    return search(a[None], b[None])[0]


def _split(
    module: nn.Module, predicate: Callable[[str, nn.Linear], bool] | None
) -> tuple[list[tuple[str, Any]], tuple[str, ...]]:
    """Return the chosen layers, each once under its first chosen name, and the names of those left dense."""
    chosen: dict[int, tuple[str, Any]] = {}
    found = list(_linear_layers(module))
    for name, layer in found:
        if id(layer) not in chosen and (predicate is None or predicate(name, layer)):
            chosen[id(layer)] = (name, layer)
    return list(chosen.values()), tuple(name for name, layer in found if id(layer) not in chosen)


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield every dense linear layer under each of its names."""
    for name, layer in module.named_modules(remove_duplicate=False):
        if isinstance(layer, nn.Linear) and not isinstance(layer, LNSLinear):
            yield name, layer


def _refusals(layer: nn.Linear) -> Iterator[str]:
    """Yield why a layer's forward cannot be replaced without changing what it computes."""
    if type(layer) is not nn.Linear:
        yield f"it is a {type(layer).__module__}.{type(layer).__qualname__}, not a plain torch.nn.Linear"
        return
    if "forward" in vars(layer):
        yield "its forward method has been replaced on the object"
    if type(layer.weight) not in (nn.Parameter, Tensor) or layer.weight.dtype not in FLOATING:
        yield f"its weight is a {type(layer.weight).__name__} of {layer.weight.dtype}, not a plain floating-point one"
    elif 0 in layer.weight.shape:
        yield f"its weight is empty: {tuple(layer.weight.shape)}"


def _check_options(name: str, mode: str, guard: float) -> None:
    """Raise unless the mode is known and the guard is a share that the mode can use."""
    if mode not in ("sum", "max"):
        raise ConfigError(f"{name}: expected mode 'sum' or 'max', got {mode!r}.")
    if not 0.0 <= guard < 1.0:
        raise ConfigError(f"{name}: expected cancellation_guard in [0, 1) (0 means none), got {guard!r}.")
    if mode == "max" and guard:
        raise ConfigError(f"{name}: mode 'max' adds nothing up, so nothing cancels; leave cancellation_guard at 0.")
