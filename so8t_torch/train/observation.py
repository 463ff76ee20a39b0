"""What physics terms look at: quantities of one forward pass, by name.

    trajectory   states (l+1, s, d): the residual stream before and after every layer
    maps         layer, x, u, w (b, n, d): one layer as a map of whole rows, its input, and two probes
    rates        decay (s, h): decay per token, of the heads of a memory, or of the channels of a chain
    memories     memory_states (b, h, t+1, k, v), keys (b, h, t, k), values (b, h, t, v), retention, eta (b, h, t)
    chains       green, left, right, width (b, k, n), upper, lower (b, k, n-1): the resolvent along a row

s counts real tokens; padding belongs to no state. Axes before those that a term of the room ``physics`` names are
independent problems. A hook on each module in question keeps its call; what is needed is computed from that after the
forward pass, in the dtype of the module's parameters. A memory is looked at for its first ``MEMORY_TOKENS`` tokens,
whose states exist at once, or for the first chunk that is judged where that is shorter; under the rule "delta" values
are what is written, v − (aS)ᵀk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from so8t_torch.core.errors import TrainingError
from so8t_torch.core.precision import accumulation_dtype
from so8t_torch.nn.dissipative_bk import DissipativeBKLayer
from so8t_torch.nn.hebbian import DissipativeHebbianLayer, Tokens
from so8t_torch.nn.modulated_memory import ModulatedMemory
from so8t_torch.nn.non_hermitian_potential import NonHermitianPotential
from so8t_torch.ops.hebbian.arguments import held, unit

KINDS: dict[str, tuple[str, ...]] = {
    "trajectory": ("states",),
    "maps": ("layer", "x", "u", "w"),
    "rates": ("decay",),
    "memories": ("memory_states", "keys", "values", "retention", "eta"),
    "chains": ("green", "left", "right", "upper", "lower", "width"),
}
"""Kind → the names that it offers."""

MEMORY_TOKENS = 64

_CHECKPOINTING = ("gradient_checkpointing", "checkpoint_mixer")
"""Attributes by which layers are told to compute again in the backward pass: all of them, or their mixer."""

SOURCES: dict[str, tuple[type[nn.Module], ...]] = {
    "rates": (NonHermitianPotential, DissipativeHebbianLayer),
    "memories": (DissipativeHebbianLayer, ModulatedMemory),
    "chains": (DissipativeBKLayer,),
}
"""Kind → the layers that it is read from; the others are read from every layer of the stack."""

Place = Mapping[str, Any]
"""Names → what stands there; a term is averaged over its places."""


class Call(NamedTuple):
    """One call of a module."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any


Calls = dict[nn.Module, list[Call]]


class Observer:
    """Keeps the calls of some modules during chosen forward passes.

    Args:
        decoder: the stack, with its layers under ``layers``.
        kinds: which quantities will be asked for.

    Raises:
        TrainingError: the model has no layer that a quantity could be read from.
    """

    def __init__(self, decoder: nn.Module, kinds: Collection[str]) -> None:
        layers: Any = getattr(decoder, "layers", ())
        self.layers: list[nn.Module] = list(layers)
        self._sources = {kind: _sources(decoder, self.layers, kind) for kind in sorted(kinds)}
        self._calls: Calls | None = None
        for module in {m for found in self._sources.values() for m in found}:
            module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        if self._calls is not None:
            self._calls.setdefault(module, []).append(Call(arguments, keywords, output))

    @contextmanager
    def open(self) -> Iterator[Calls]:
        """Collect calls into the mapping that is yielded, until the block ends."""
        self._calls = {}
        try:
            yield self._calls
        finally:
            self._calls = None

    def places(
        self, kind: str, calls: Calls, mask: Bool[Tensor, "b t"], generator: torch.Generator, probes: int
    ) -> list[Place]:
        """Return where a kind of quantity was found in the calls of a forward pass.

        Args:
            kind: one of ``KINDS``.
            calls: what ``open`` yielded.
            mask: True for tokens, False for padding.
            generator: of the CPU; draws layers and probes for ``maps``.
            probes: how many maps; each is a layer drawn at random with a pair of probes.

        Raises:
            TrainingError: a module was not called, or is in shards.
        """
        sources = self._sources[kind]
        for module in sources:
            if module not in calls:
                raise TrainingError(f"physics: {type(module).__name__} was not called in this forward pass.")
            if kind != "trajectory" and any(isinstance(p, DTensor) for p in module.parameters()):
                raise TrainingError(f"physics: {', '.join(KINDS[kind])} cannot be computed of parameters in shards.")
        if kind == "trajectory":
            return [{"states": _states(self.layers, calls, mask)}]
        if kind == "maps":
            drawn = torch.randint(len(self.layers), (probes,), generator=generator).tolist()
            return [_map(self.layers[index], calls[self.layers[index]][-1], mask, generator) for index in drawn]
        if kind == "rates":
            return [{"decay": _rates(module, calls[module], mask)} for module in sources]
        if kind == "memories":
            return [_memory(module, calls[module][0]) for module in sources]
        return [_chain(module, call) for module in sources for call in calls[module]]


def check_sources(decoder: nn.Module, kinds: Collection[str]) -> None:
    """Raise TrainingError where the model has nothing that a kind of quantity could be read from."""
    for kind in sorted(kinds):
        _sources(decoder, list(getattr(decoder, "layers", ())), kind)


def _sources(decoder: nn.Module, layers: list[nn.Module], kind: str) -> list[nn.Module]:
    if kind not in SOURCES:
        if not layers:
            raise TrainingError(f"physics reads the layers of a stack, but {type(decoder).__name__} has no .layers.")
        return layers
    found = [m for m in decoder.modules() if isinstance(m, SOURCES[kind])]
    if kind == "rates":
        found = [m for m in found if not isinstance(m, DissipativeHebbianLayer) or m.gamma_proj is not None]
    if kind == "memories":
        # a memory inside of another layer is never called itself
        inner = {m.hebbian for m in found if isinstance(m, ModulatedMemory)}
        found = [m for m in found if m not in inner]
    if not found:
        names = " or ".join(source.__name__ for source in SOURCES[kind])
        raise TrainingError(
            f"physics: {', '.join(KINDS[kind])} is read from {names}, and {type(decoder).__name__} has none; drop the "
            "term, or train a model with such a layer."
        )
    return found


def _states(layers: list[nn.Module], calls: Calls, mask: Tensor) -> Tensor:
    """Return the stream before every layer and after the last (l+1, s, d), in float32 (float64 for float64)."""
    kept = mask.flatten().nonzero()[:, 0]
    stream = [_entered(layer, calls[layer][-1]) for layer in layers] + [_first(calls[layers[-1]][-1].output)]
    return torch.stack([x.flatten(0, 1)[kept].to(accumulation_dtype(x.dtype)) for x in stream])


def _map(layer: nn.Module, call: Call, mask: Tensor, generator: torch.Generator) -> Place:
    """Return a layer as a map of rows: without checkpointing or hooks, with one draw of dropout, zero at padding."""
    x = _entered(layer, call)
    real = mask[..., None]
    u, w = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) * real for _ in range(2))
    keywords = call.keywords | _seeing_themselves(call.keywords.get("attention_mask"))
    seed = int(torch.randint(2**31, (), generator=generator))
    devices = [x.device] if x.device.type == "cuda" else []

    def run(x: Tensor) -> Tensor:
        # attention's fused kernels have no forward-mode derivative
        with torch.random.fork_rng(devices), sdpa_kernel(SDPBackend.MATH), _kept_whole(layer):
            torch.manual_seed(seed)
            return torch.where(real, _first(layer.forward(x, *call.arguments[1:], **keywords)), 0.0)

    return {"layer": run, "x": x, "u": u, "w": w}


def _seeing_themselves(mask: Any) -> dict[str, Tensor]:
    """Return an attention mask with a diagonal: a token of padding that sees nothing has no second derivative."""
    if not isinstance(mask, Tensor) or mask.ndim < 3:
        return {}
    here = torch.eye(*mask.shape[-2:], dtype=torch.bool, device=mask.device)
    return {"attention_mask": mask | here if mask.dtype == torch.bool else mask.masked_fill(here, 0.0)}


@contextmanager
def _kept_whole(layer: nn.Module) -> Iterator[None]:
    """Leave checkpointing out: what runs again in the backward pass would run without its tangents."""
    asked = {name: getattr(layer, name) for name in _CHECKPOINTING if hasattr(layer, name)}
    for name in asked:
        setattr(layer, name, False)
    try:
        yield
    finally:
        for name, value in asked.items():
            setattr(layer, name, value)


def _rates(module: nn.Module, calls: list[Call], mask: Tensor) -> Tensor:
    """Return the decay per token (s, h) of a memory's heads, or of a chain without a memory."""
    if isinstance(module, DissipativeHebbianLayer):
        found = torch.cat([_written(module, call)[1].decay for call in calls], 1)
    else:
        assert isinstance(module, NonHermitianPotential), "SOURCES"
        rates = [call.output.memory_gamma if module.memory_heads else call.output.gamma for call in calls]
        found = torch.cat(rates, 1) * module.dt
    # pieces of rows that overlap cannot be laid beside the mask
    return found[mask] if found.shape[:2] == mask.shape else found.flatten(0, 1)


def _memory(module: nn.Module, call: Call) -> Place:
    """Return the states of a memory over the first tokens of a call, and what was written into them."""
    layer, tokens, state, starts = _written(module, call)
    length = min(MEMORY_TOKENS, module.chunk) if isinstance(module, ModulatedMemory) else MEMORY_TOKENS
    kind = tokens.decay.dtype
    k, values, decay, eta = (part[:, :length].to(kind) for part in tokens[1:])
    keys = unit(k) if layer.key_norm == "l2" else k
    if layer.discretization == "zoh":
        eta = eta * held(decay)
    retention = (-decay).exp()
    if starts is not None:
        retention = torch.where(starts[:, :length, None], 0.0, retention)
    shape = (len(keys), *keys.shape[2:], values.shape[-1])
    states = [keys.new_zeros(shape) if state is None else state.to(kind)]
    written = []
    for t in range(keys.shape[1]):
        kept = retention[:, t, :, None, None] * states[-1]
        value = values[:, t]
        if layer.rule == "delta":
            value = value - (keys[:, t, :, None] @ kept)[..., 0, :]
        written.append(value)
        states.append(kept + eta[:, t, :, None, None] * keys[:, t, :, :, None] * value[..., None, :])
    return {
        "memory_states": torch.stack(states, 2),
        "keys": keys.transpose(1, 2),
        "values": torch.stack(written, 2),
        "retention": retention.mT,
        "eta": eta.mT,
    }


def _written(
    module: nn.Module, call: Call
) -> tuple[DissipativeHebbianLayer, Tokens, Tensor | None, Bool[Tensor, "b t"] | None]:
    """Return a memory, the tokens that it worked with, the state that entered, and where it was dropped."""
    given = _named(module, call)
    if isinstance(module, ModulatedMemory):
        x, keyed, marks = given["x"], given.get("keyed"), given["marks"]
        keyed = None if keyed is None else _in_its_dtype(module, keyed)
        tokens = module.tokens(_in_its_dtype(module, x), given["gamma"], marks, keyed=keyed)
        return module.hebbian, tokens, given["state"].weights, marks.starts
    assert isinstance(module, DissipativeHebbianLayer), "SOURCES"
    x = _in_its_dtype(module, given["x"])
    ids, starts = given.get("segment_ids"), None
    if ids is not None:
        ids = ids.expand(len(x), -1)
        starts = torch.cat([torch.zeros_like(ids[:, :1], dtype=torch.bool), ids[:, 1:] != ids[:, :-1]], 1)
    return module, module.tokens(x, given.get("padding_mask"), given.get("gamma")), given.get("state"), starts


def _chain(module: nn.Module, call: Call) -> Place:
    assert isinstance(module, DissipativeBKLayer), "SOURCES"
    given = _named(module, call)
    options = {name: given.get(name) for name in ("padding_mask", "shift")}
    return module.chain(_in_its_dtype(module, given["x"]), given.get("segment_ids"), **options)._asdict()


def _named(module: nn.Module, call: Call) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    forward: Callable[..., Any] = module.forward
    return inspect.signature(forward).bind(*call.arguments, **call.keywords).arguments


def _entered(layer: nn.Module, call: Call) -> Tensor:
    if not call.arguments or not isinstance(call.arguments[0], Tensor):
        raise TrainingError(f"physics: expected {type(layer).__name__} to be called with its states first.")
    found: Tensor = call.arguments[0]
    return found


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found


def _in_its_dtype(module: nn.Module, x: Tensor) -> Tensor:
    """Return activations in the dtype of the parameters: under autocast they may have another."""
    return x.to(next(module.parameters()).dtype)
