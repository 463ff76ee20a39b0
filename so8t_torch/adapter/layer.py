"""A linear layer with a rotation gate on its output, a low-rank update, or both.

    y = R(W x + b + s B A x),   R = R_cmd R_safe,   R_• = chart(A_•)

x: (…, in); y: (…, out); A_safe, A_cmd: (out/8, 28) coordinates in so(8), or (1, 28) when one serves all blocks;
A: (r, in), B: (out, r), s = lora_alpha / r. A_• = 0 and B = 0 at the start, so that y is the wrapped layer's output bit
for bit. R is computed anew in every forward pass, in float64, and kept in float32: optimisers move weights without a
trace that a cache could watch. Cost of the gate: 64 multiply-adds per eight channels. Derivation: docs/math/rotation.md
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from so8t_torch.adapter.config import CHARTS, SO8TConfig
from so8t_torch.adapter.quantized import quantization
from so8t_torch.adapter.routing import GateRoutes, send
from so8t_torch.core.errors import AdapterError
from so8t_torch.ops import rotation

_CHART_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": rotation.exponential,
    "cayley": rotation.cayley,
}
_GENERATOR_DTYPES = (torch.float32, torch.float64)
_FROZEN = {"safe": ("so8t_cmd",), "cmd": ("so8t_safe",), "routed": ()}

if set(_CHART_FUNCTIONS) != set(CHARTS):
    raise AssertionError("config.CHARTS and the chart functions disagree")


class GeneratorCastWarning(UserWarning):
    """Something cast a gate's generator below float32 before training began; it was put back."""


class GeneratorDict(nn.ParameterDict):
    """Generators by adapter name; ``module.to(dtype)`` and ``half()`` move but never narrow them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GeneratorDict:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.dtype in _GENERATOR_DTYPES and moved.dtype not in _GENERATOR_DTYPES
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(keep_precision, recurse)


@dataclass(frozen=True)
class _Merged:
    """What a merge has put into the weight, kept so that unmerging takes out the same."""

    rotation: Tensor | None
    update: Tensor | None


class SO8TLayer(nn.Module, BaseTunerLayer):
    """Wraps one linear layer, quantised or not; holds any number of named adapters, of which one is active.

    Args:
        base_layer: the layer whose output is rotated.
        routes: the object through which a trainer says which rows train which factor.
    """

    adapter_layer_names = ("so8t_safe", "so8t_cmd", "so8t_lora_A", "so8t_lora_B")
    other_param_names = ("so8t_chart", "train_gates", "charts", "scaling", "so8t_dropout")

    # PEFT's mixin is untyped; these are its members as used here
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _get_base_layer_device_and_dtype: Callable[[nn.Module], tuple[torch.device | None, torch.dtype | None]]

    def __init__(self, base_layer: nn.Module, routes: GateRoutes) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.so8t_safe = GeneratorDict()
        self.so8t_cmd = GeneratorDict()
        self.so8t_lora_A = nn.ParameterDict()
        self.so8t_lora_B = nn.ParameterDict()
        self.so8t_dropout = nn.ModuleDict()
        self.so8t_chart = BufferDict(persistent=True)
        self.charts: dict[str, str] = {}
        self.train_gates: dict[str, str] = {}
        self.scaling: dict[str, float] = {}
        self.routes = routes
        self.merged_adapters: list[str] = []
        self._merged: _Merged | None = None
        self._verified: dict[str, tuple[Tensor | None, int]] = {}
        self._active_adapter: str | list[str] = []
        self._disable_adapters = False

    def add_adapter(self, name: str, config: SO8TConfig, *, gated: bool, rank: int) -> None:
        """Add the parameters of one adapter: zero generators, LoRA's A random and its B zero.

        Args:
            name: of the adapter.
            config: gives chart, sharing, factor to train, LoRA scale and dropout.
            gated: whether this module gets a gate.
            rank: of LoRA on this module; 0 for none.
        """
        device = self._device()
        if gated:
            blocks = 1 if config.shared else self.out_features // 8
            for factor in (self.so8t_safe, self.so8t_cmd):
                factor[name] = nn.Parameter(torch.zeros(blocks, 28, dtype=torch.float32, device=device))
            self.so8t_chart[name] = torch.tensor([CHARTS.index(config.chart)], dtype=torch.uint8, device=device)
            self.charts[name] = config.chart
            self.train_gates[name] = config.train_gates
        if rank:
            down = nn.Parameter(torch.empty(rank, self.in_features, dtype=torch.float32, device=device))
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            self.so8t_lora_A[name] = down
            self.so8t_lora_B[name] = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
            self.so8t_dropout[name] = nn.Dropout(config.lora_dropout)
            self.scaling[name] = config.lora_alpha / rank
        self._verified.pop(name, None)
        self._freeze_factors([name])

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one adapter active and trainable, its frozen factor excepted.

        Args:
            adapter_names: one name, or a list of at most one.
            inference_mode: leave the parameters frozen.

        Raises:
            AdapterError: more than one name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        refuse_several(names)
        super().set_adapter(names, inference_mode)
        self._freeze_factors(names)

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Switch gradients of the given adapters; the frozen factor stays frozen.

        Args:
            adapter_names: one name or several.
            requires_grad: what to set.
        """
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_factors([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def coordinates(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the generators (A_safe, A_cmd) of one adapter, (blocks, 28) coordinates in so(8)."""
        return self.so8t_safe[name], self.so8t_cmd[name]

    def factors(self, name: str) -> tuple[Float[Tensor, "blocks 8 8"], Float[Tensor, "blocks 8 8"]]:
        """Return (R_safe, R_cmd) of one adapter, computed in one batch."""
        chart = _CHART_FUNCTIONS[self.charts[name]]
        safe, cmd = chart(torch.stack(self.coordinates(name))).unbind(0)
        return safe, cmd

    def gate_rotation(self, name: str) -> Float[Tensor, "blocks 8 8"]:
        """Return R = R_cmd R_safe of one adapter."""
        return rotation.compose(*self.factors(name))

    def forward(self, x: Float[Tensor, "*batch in_features"], *args: Any, **kwargs: Any) -> Tensor:
        """Return R(W x + b + s B A x) for the active adapter; further arguments go to the wrapped layer."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return y
        for name in self.active_adapters:
            if not torch.compiler.is_compiling():
                self._verify(name)
            if name in self.so8t_lora_A:
                y = y + self._low_rank(name, x).to(y.dtype)
            if name in self.so8t_safe:
                y = self._rotate(name, y)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the wrapped layer's weight and bias by R(W + s B A) and R b, computed in float64, rounded once.

        Args:
            safe_merge: refuse to write weights that are not finite.
            adapter_names: at most one; None means the active one.

        Raises:
            AdapterError: the layer is quantised, several adapters are asked for, or the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self._has(name)]
        if not names:
            return
        refuse_several([*self.merged_adapters, *names])
        refuse_quantized(self.get_base_layer())
        self._verify(names[0])
        parts = self._parts(names[0])
        weight, bias = self._folded(parts)
        if safe_merge and not all(t.isfinite().all() for t in (weight, bias) if t is not None):
            raise AdapterError(f"merge: adapter {names[0]!r} gives weights that are not finite; nothing was changed.")
        self._write(weight, bias)
        self._merged = parts
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Take the merged adapter out of the weight again: W = Rᵀ W' − s B A, up to one rounding."""
        if self._merged is None:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        parts, self._merged = self._merged, None
        self.merged_adapters.clear()
        weight, bias = self._plain_weight()
        if parts.rotation is not None:
            weight, bias = rotation.unfold_output(weight, bias, parts.rotation.double())
        if parts.update is not None:
            weight = weight - parts.update
        self._write(weight, bias)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a sum W + ΔW with ΔW independent of W: a rotation is not."""
        return not self._has(adapter_name) or adapter_name not in self.so8t_safe

    def _rotate(self, name: str, y: Tensor) -> Tensor:
        self._check_generators(name)
        # autocast would round the products that build R
        with torch.autocast(device_type="cpu" if y.is_meta else y.device.type, enabled=False):
            safe, cmd = self.factors(name)
            if self.train_gates[name] != "routed" or not torch.is_grad_enabled():
                return rotation.apply(rotation.compose(safe, cmd), y)
            if not self.training and self.routes.rows_to_safe is None:
                # without routes no factor may learn from these rows
                return rotation.apply(rotation.compose(safe, cmd).detach(), y)
            return send(
                rotation.apply(rotation.compose(safe, cmd.detach()), y),
                rotation.apply(rotation.compose(safe.detach(), cmd), y),
                self.routes.for_output(y.shape),
            )

    def _low_rank(self, name: str, x: Tensor) -> Tensor:
        down, up = self.so8t_lora_A[name], self.so8t_lora_B[name]
        x = self._cast_input_dtype(self.so8t_dropout[name](x), down.dtype)
        return functional.linear(functional.linear(x, down), up) * self.scaling[name]

    def _check_generators(self, name: str) -> None:
        """Refuse generators below float32 that have learned, and both factors training without routes."""
        generators = self.coordinates(name)
        for factor, generator in zip(("so8t_safe", "so8t_cmd"), generators, strict=True):
            if generator.dtype not in _GENERATOR_DTYPES:
                _promote(f"{factor}.{name}", generator)
        both = all(generator.requires_grad for generator in generators) and torch.is_grad_enabled()
        if both and self.train_gates[name] != "routed":
            raise AdapterError(
                f"adapter {name!r}: expected only the factor train_gates={self.train_gates[name]!r} to require a "
                "gradient, but both do. The loss sees only their product, so together they learn the same thing twice; "
                "freeze one or use train_gates='routed'."
            )

    def _verify(self, name: str) -> None:
        """Check the stored chart and the finiteness of the weights, once after each load."""
        if not self._has(name):
            return
        chart = self.so8t_chart[name] if name in self.charts else None
        version = -1 if chart is None or chart.is_inference() else chart._version
        seen = self._verified.get(name)
        if (seen is not None and seen[0] is chart and seen[1] == version) or (chart is not None and chart.is_meta):
            return
        if chart is not None and int(chart) != CHARTS.index(self.charts[name]):
            raise AdapterError(chart_mismatch(f"adapter {name!r}", self.charts[name], int(chart)))
        for attribute in self.adapter_layer_names:
            values = getattr(self, attribute)
            # detached: a check that left tensors in the graph would make recomputation keep fewer than the first pass
            if name in values and not (values[name].is_meta or bool(values[name].detach().isfinite().all())):
                raise AdapterError(f"adapter {name!r}: expected finite numbers in {attribute}, found NaN or infinity.")
        self._verified[name] = (chart, version)

    def _freeze_factors(self, names: list[str]) -> None:
        for name in names:
            for attribute in _FROZEN[self.train_gates[name]] if name in self.train_gates else ():
                getattr(self, attribute)[name].requires_grad_(False)

    def _has(self, name: str) -> bool:
        return name in self.so8t_safe or name in self.so8t_lora_A

    def _device(self) -> torch.device:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return torch.device("cpu") if device is None else device

    def _parts(self, name: str) -> _Merged:
        """Return copies of R and s B A, in the orientation (out, in)."""
        with torch.no_grad():
            gate = self.gate_rotation(name).clone() if name in self.so8t_safe else None
            update = None
            if name in self.so8t_lora_A:
                update = self.so8t_lora_B[name].double() @ self.so8t_lora_A[name].double() * self.scaling[name]
        return _Merged(gate, update)

    def _folded(self, parts: _Merged) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._plain_weight()
        if parts.update is not None:
            weight = weight + parts.update
        if parts.rotation is not None:
            weight, bias = rotation.fold_output(weight, bias, parts.rotation.double())
        return weight, bias

    def _plain_weight(self) -> tuple[Tensor, Tensor | None]:
        base = self.get_base_layer()
        weight = base.weight.data.double()
        bias = None if base.bias is None else base.bias.data.double()
        return (weight.T if isinstance(base, Conv1D) else weight), bias

    def _write(self, weight: Tensor, bias: Tensor | None) -> None:
        base = self.get_base_layer()
        plain = weight.T.contiguous() if isinstance(base, Conv1D) else weight
        base.weight.data = plain.to(base.weight.dtype)
        if bias is not None:
            base.bias.data = bias.to(base.bias.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move one adapter to the wrapped layer's device, dtypes unchanged: generators stay float32 on any base."""
        target = self._device() if device is None else device
        for attribute in (*self.adapter_layer_names, "so8t_chart"):
            values = getattr(self, attribute)
            if adapter_name in values and not values[adapter_name].is_meta:
                values[adapter_name] = values[adapter_name].to(target)

    def __repr__(self) -> str:
        return f"so8t.{super().__repr__()}"


def refuse_several(names: list[str]) -> None:
    """Raise if more than one adapter is to act on the same weights.

    Args:
        names: of the adapters.
    """
    if len(names) > 1:
        raise AdapterError(
            f"expected one active SO(8) adapter, got {', '.join(names)}: rotations do not commute, so several at once "
            "would depend on their order. Switch with set_adapter(name), or fold one with `so8t bake` first."
        )


def refuse_quantized(module: nn.Module) -> None:
    """Raise if folding into this layer would have to round into 4 or 8 bits.

    Args:
        module: the wrapped layer.
    """
    kind = quantization(module)
    if kind != "none":
        raise AdapterError(
            f"merge: the base is stored as {kind}; folding into it would round the rotated weights to its few levels. "
            "Save the adapter and run `so8t bake ADAPTER OUTPUT`, which dequantises, folds and verifies."
        )


def chart_mismatch(where: str, configured: str, stored: int) -> str:
    """Return the text of the error for a stored chart other than the configured one.

    Args:
        where: names the adapter or the tensor.
        configured: the chart in the configuration.
        stored: the code found beside the weights.
    """
    name = CHARTS[stored] if stored < len(CHARTS) else f"unknown code {stored}"
    return (
        f"{where}: the configuration says chart={configured!r} but the weights were stored with {name!r}. The same "
        "coordinates mean another rotation there; put the chart back into adapter_config.json."
    )


def _promote(place: str, generator: nn.Parameter) -> None:
    narrow = generator.dtype
    if bool(generator.detach().any()):
        raise AdapterError(
            f"{place}: expected float32, got {narrow} with values other than zero. In {narrow} small updates round "
            "away and the gate stops learning; do not cast the adapter after training began, reload it instead."
        )
    generator.data = generator.data.float()
    warnings.warn(f"{place} had been cast to {narrow}; put back to float32.", GeneratorCastWarning, stacklevel=5)
