"""Declarations of the layers: options that change what is computed, with carried state and packed rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from torch import nn

from parity_tests.harness import Budget, OpPair
from parity_tests.harness.pair import Size, Strategy
from parity_tests.nn.twin import twin
from so8t_jax.nn import dissipative_bk as bk_definition
from so8t_jax.nn import hebbian as hebbian_definition
from so8t_jax.nn import lns_linear as lns_definition
from so8t_jax.nn import memory_resonance as resonance_definition
from so8t_jax.nn import rotation_gate as gate_definition
from so8t_jax.nn import semiseparable as semiseparable_definition
from so8t_jax.nn import tensor_train_embedding as embedding_definition
from so8t_jax.nn import zeta_embedding as zeta_definition
from so8t_torch.adapter.config import SO8TConfig
from so8t_torch.adapter.layer import SO8TLayer
from so8t_torch.adapter.routing import GateRoutes
from so8t_torch.nn.dissipative_bk import DissipativeBKLayer
from so8t_torch.nn.hebbian import DissipativeHebbianLayer
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.lns_linear import LNSLinear
from so8t_torch.nn.memory_resonance import MemoryResonanceLayer
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer, State
from so8t_torch.nn.tensor_train_head import TensorTrainHead
from so8t_torch.nn.zeta_embedding import ZetaEmbedding

WIDTH, OUTPUTS, VOCABULARY = 6, 16, 23
HEADS, HEAD_WIDTH, CHANNELS, RANK, TAPS = 2, 4, 3, 5, 3
SIZES = ({"t": 11},)
HEAD_BAR = 3.0
"""The cores' gradient sums over states in another order: 2.7 times the error of plain arithmetic was seen."""
BOTH = ("float64", "float32")
"""One declaration of each layer is judged in float32 too, the others in float64, where a difference is an error."""
PLAIN = ("two_cores", "sum", "operator", "hermitian", "hebb")
Drawn = tuple[Any, ...]


def rngs() -> nnx.Rngs:
    """Return a source of weights, which the declared ones replace."""
    return nnx.Rngs(0)


def tokens(generator: np.random.Generator, size: Size) -> Drawn:
    """Draw activations."""
    return (generator.standard_normal((size["t"], WIDTH)),)


def ids(generator: np.random.Generator, size: Size) -> Drawn:
    """Draw token ids."""
    return (generator.integers(0, VOCABULARY, size["t"]),)


def segments(generator: np.random.Generator, size: Size) -> np.ndarray:
    """Draw the numbers of packed sequences."""
    return np.sort(generator.integers(0, 3, size["t"]))


def after(state: Any) -> Strategy:
    """Return the strategy that draws tokens, a state, and the numbers of packed sequences."""
    return lambda generator, size: (*tokens(generator, size), state(generator), segments(generator, size))


def gate(name: str, frozen: str, **options: Any) -> OpPair:
    """Declare a linear layer with a gate and a low-rank update."""
    rank, alpha = options.pop("r", 0), 4.0

    def layer(dtype: Any) -> nn.Module:
        module = SO8TLayer(nn.Linear(WIDTH, OUTPUTS, dtype=dtype), GateRoutes())
        config = SO8TConfig(**options, r=rank, lora_alpha=alpha)
        module.add_adapter("default", config, gated=True, rank=rank)
        module.set_adapter("default")
        return module.to(dtype)

    def definition(dtype: Any) -> Any:
        scale = alpha / rank if rank else 1.0
        chosen: dict[str, Any] = {"rank": rank, "scaling": scale, "param_dtype": dtype, "rngs": rngs()}
        return gate_definition.SO8TLayer(WIDTH, OUTPUTS, **options, **chosen)

    return twin(
        f"nn.rotation_gate:{name}",
        dtypes=BOTH if name in PLAIN else BOTH[:1],
        layer=layer,
        definition=definition,
        inputs={"generic": tokens},
        sizes=SIZES,
        frozen=(frozen,),
        budget=Budget(forward=8, gradient=16),
    )


def lns(name: str, **options: Any) -> OpPair:
    """Declare a linear layer in sign–log numbers."""
    given = {"use_bias" if key == "bias" else key: value for key, value in options.items()}
    return twin(
        f"nn.lns_linear:{name}",
        dtypes=BOTH if name in PLAIN else BOTH[:1],
        layer=lambda dtype: LNSLinear(WIDTH, OUTPUTS, **options, dtype=dtype),
        definition=lambda dtype: lns_definition.LNSLinear(WIDTH, OUTPUTS, **given, param_dtype=dtype, rngs=rngs()),
        inputs={"generic": tokens},
        sizes=SIZES,
        budget=Budget(forward=16, gradient=16),
    )


def embedding(name: str, **options: Any) -> OpPair:
    """Declare a tensor-train embedding."""
    return twin(
        f"nn.tensor_train_embedding:{name}",
        dtypes=BOTH if name in PLAIN else BOTH[:1],
        layer=lambda dtype: HolographicTTEmbedding(VOCABULARY, WIDTH, **options, dtype=dtype),
        definition=lambda dtype: embedding_definition.HolographicTTEmbedding(
            VOCABULARY, WIDTH, **options, param_dtype=dtype, rngs=rngs()
        ),
        inputs={"generic": ids},
        sizes=SIZES,
        wrt=(),
        budget=Budget(forward=8, gradient=16),
    )


def head() -> OpPair:
    """Declare the head that is tied to a tensor-train embedding."""
    return twin(
        "nn.tensor_train_head",
        dtypes=BOTH,
        layer=lambda dtype: HolographicTTEmbedding(VOCABULARY, WIDTH, rank=3, dtype=dtype),
        definition=lambda dtype: embedding_definition.HolographicTTEmbedding(
            VOCABULARY, WIDTH, rank=3, param_dtype=dtype, rngs=rngs()
        ),
        call=lambda layer, hidden: TensorTrainHead(layer)(hidden),
        defined=lambda layer, hidden: layer.logits(hidden),
        inputs={"generic": tokens},
        sizes=SIZES,
        budget=Budget(forward=8, gradient=16, bar=HEAD_BAR),
    )


def ar_ssm(name: str, **options: Any) -> OpPair:
    """Declare an adaptive-rank semiseparable layer, with the state and the loss of its gates."""
    chosen: dict[str, Any] = {"max_rank": RANK, "min_rank": 2, "band_width": TAPS, **options}
    mode = chosen.pop("gate_mode", "soft")
    compat = options.get("core") == "compat"

    def layer(dtype: Any) -> nn.Module:
        module = AdaptiveRankSemiseparableLayer(WIDTH, **chosen, chunk=4, dtype=dtype)
        module.set_gate_mode(mode)
        return module

    def definition(dtype: Any) -> Any:
        return semiseparable_definition.AdaptiveRankSemiseparableLayer(
            WIDTH, **chosen, gate_mode=mode, param_dtype=dtype, rngs=rngs()
        )

    def call(layer: Any, x: Any, mixer: Any = None, band: Any = None, segment_ids: Any = None) -> Any:
        y, found = layer(x, None if mixer is None else State(mixer, band), segment_ids)
        return y, tuple(found["state"]), found["gates"]

    def defined(layer: Any, x: Any, mixer: Any = None, band: Any = None, segment_ids: Any = None) -> Any:
        state = None if mixer is None else semiseparable_definition.State(mixer, band)
        y, found = layer(x, state, segment_ids)
        return y, tuple(found["state"]), found["gates"]

    def carried(generator: np.random.Generator, size: Size) -> Drawn:
        rank = 2 * RANK if options.get("rotating") else RANK
        mixer = generator.standard_normal((rank,) if compat else (rank, WIDTH))
        band = generator.standard_normal((TAPS - 1, WIDTH))
        return (*tokens(generator, size), mixer, band, segments(generator, size))

    return twin(
        f"nn.semiseparable:{name}",
        dtypes=BOTH if name in PLAIN else BOTH[:1],
        layer=layer,
        definition=definition,
        call=call,
        defined=defined,
        inputs={"generic": carried},
        sizes=SIZES,
        wrt=(0, 1, 2),
        budget=Budget(forward=32, gradient=64),
    )


def bk(name: str, **options: Any) -> OpPair:
    """Declare a BK layer, with the rates that it gives to a memory."""
    chosen: dict[str, Any] = {"channels": CHANNELS, "memory_heads": HEADS, **options}
    full, lossy = options.get("mode") == "full", options.get("include_gamma_in_h", True)

    def state(generator: np.random.Generator) -> np.ndarray:
        # g of a chain lies in the upper half-plane
        return generator.standard_normal(CHANNELS) + 1j * generator.uniform(0.5, 1.5, CHANNELS)

    def packed(generator: np.random.Generator, size: Size) -> Drawn:
        return (*tokens(generator, size), None, segments(generator, size))

    def call(layer: Any, *inputs: Any) -> Any:
        found = layer(*inputs)
        v, gamma, memory = found.potential
        # chains that lose nothing have rates of zero
        rates = (v, gamma, memory) if lossy else (v, memory)
        return found.features, found.state, rates

    return twin(
        f"nn.dissipative_bk:{name}",
        dtypes=BOTH if name in PLAIN else BOTH[:1],
        layer=lambda dtype: DissipativeBKLayer(WIDTH, **chosen, dtype=dtype),
        definition=lambda dtype: bk_definition.DissipativeBKLayer(WIDTH, **chosen, param_dtype=dtype, rngs=rngs()),
        call=call,
        inputs={"generic": packed if full else after(state)},
        sizes=SIZES,
        wrt=(0,) if full else (0, 1),
        budget=Budget(forward=64, gradient=128),
    )


def hebbian(name: str, **options: Any) -> OpPair:
    """Declare a memory of fast weights; without rates of its own they are inputs."""
    sizes: dict[str, Any] = {"num_heads": HEADS, "head_dim": HEAD_WIDTH}
    brought = options.get("own_decay") is False

    def carried(generator: np.random.Generator, size: Size) -> Drawn:
        state = generator.standard_normal((HEADS, HEAD_WIDTH, HEAD_WIDTH))
        rates = (generator.uniform(0.0, 0.5, (size["t"], HEADS)),) if brought else ()
        return (*tokens(generator, size), state, segments(generator, size), *rates)

    def call(layer: Any, x: Any, state: Any, segment_ids: Any, gamma: Any = None) -> Any:
        return layer(x, state, segment_ids, gamma=gamma)

    return twin(
        f"nn.hebbian:{name}",
        dtypes=BOTH if name in PLAIN else BOTH[:1],
        layer=lambda dtype: DissipativeHebbianLayer(WIDTH, **sizes, **options, dtype=dtype),
        definition=lambda dtype: hebbian_definition.DissipativeHebbianLayer(
            WIDTH, **sizes, **options, param_dtype=dtype, rngs=rngs()
        ),
        call=call,
        inputs={"generic": carried},
        sizes=SIZES,
        wrt=(0, 1, 3) if brought else (0, 1),
        # what a head reads may nearly cancel, and is divided by its size
        budget=Budget(forward=128, gradient=512),
    )


def feedback() -> OpPair:
    """Declare what a memory gives back to the potential."""

    def state(generator: np.random.Generator, _size: Size) -> Drawn:
        return (generator.standard_normal((HEADS, HEAD_WIDTH, HEAD_WIDTH)),)

    chosen: dict[str, Any] = {"num_heads": HEADS, "head_dim": HEAD_WIDTH, "feedback_channels": CHANNELS}
    return twin(
        "nn.hebbian:potential_feedback",
        layer=lambda dtype: DissipativeHebbianLayer(WIDTH, **chosen, dtype=dtype),
        definition=lambda dtype: hebbian_definition.DissipativeHebbianLayer(
            WIDTH, **chosen, param_dtype=dtype, rngs=rngs()
        ),
        call=lambda layer, state: layer.potential_feedback(state),
        inputs={"generic": state},
        sizes=SIZES,
        only=("feedback_weight", "feedback_gate"),
        budget=Budget(forward=8, gradient=8),
    )


def resonance() -> OpPair:
    """Declare the filter of modes without energy."""

    def state(generator: np.random.Generator, _size: Size) -> Drawn:
        return (generator.standard_normal((HEADS, HEAD_WIDTH, HEAD_WIDTH)),)

    return twin(
        "nn.memory_resonance",
        layer=lambda dtype: MemoryResonanceLayer(HEAD_WIDTH, HEADS, 0.9, temperature=0.3, dtype=dtype),
        definition=lambda dtype: resonance_definition.MemoryResonanceLayer(
            HEAD_WIDTH, HEADS, 0.9, temperature=0.3, param_dtype=dtype
        ),
        call=lambda layer, state: layer(state)[0],
        defined=lambda layer, state: layer(state).state,
        inputs={"generic": state},
        sizes=SIZES,
        budget=Budget(forward=16, gradient=32),
    )


def positions() -> OpPair:
    """Declare trained positions, and those beyond the table."""

    def drawn(_generator: np.random.Generator, size: Size) -> Drawn:
        return (np.arange(size["t"]) * 3 - 2,)

    return twin(
        "nn.zeta_embedding",
        layer=lambda dtype: ZetaEmbedding(7, WIDTH, True, 0.5, dtype=dtype),
        definition=lambda dtype: zeta_definition.ZetaEmbedding(7, WIDTH, True, 0.5, param_dtype=dtype),
        inputs={"generic": drawn},
        sizes=SIZES,
        wrt=(),
        budget=Budget(forward=2, gradient=2),
    )


LAYERS = (
    gate("exp", "so8t_cmd.default", r=2),
    gate("cayley", "so8t_safe.default", chart="cayley", train_gates="cmd", shared=True),
    embedding("two_cores", rank=3),
    embedding("three_cores", rank=(2, 3), num_cores=3, feature_factors=(1, 2, 3), phase_encoding=False),
    embedding("complex", rank=3, complex_cores=True, emit="pair", padding_idx=4),
    head(),
    lns("sum"),
    lns("max", mode="max"),
    lns("guarded", cancellation_guard=0.3, bias=False),
    ar_ssm("operator"),
    ar_ssm("compat", core="compat", gate_mode="ste"),
    ar_ssm("adaptive_step", adaptive_time_step=True, gate_mode="gumbel"),
    ar_ssm("no_decay", decays="none", min_rank=RANK),
    ar_ssm("rotating", core="compat", rotating=True),
    bk("hermitian"),
    bk("hopping", hermitian=False, adaptive_hopping=True, base_decay=0.01),
    bk("constant_decay", adaptive_decay=False, include_gamma_in_h=False),
    bk("full", mode="full"),
    hebbian("hebb"),
    hebbian("delta", rule="delta", eta_mode="token", dt=0.5),
    hebbian("rates_given", own_decay=False, eta_mode="head", discretization="euler"),
    feedback(),
    resonance(),
    positions(),
)
