"""Every field of production that is mathematics is one of the definition and changes it; what is none is refused."""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from parity_tests.harness import environment
from parity_tests.nn.models import FIRST_SMALL, SMALL
from so8t_jax.nn.checkpoint import MODELS
from so8t_jax.nn.weights import places
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.phase1 import Phase1ForCausalLM
from so8t_torch.models.phase2 import Phase2ForCausalLM, Phase2Model

environment.prepare()

ROW = jnp.arange(9) % 11
PRODUCTION: dict[str, Any] = {
    "so8t_phase1": (Phase1Config, Phase1ForCausalLM, FIRST_SMALL | {"n_layers": 1}),
    "so8t_phase2": (Phase2Config, Phase2ForCausalLM, SMALL),
}
VALUES: dict[str, Any] = {
    "ar_ssm_core": "compat",
    "ar_ssm_decays": "uniform",
    "ar_ssm_gate_hidden_dim": 3,
    "ar_ssm_gate_mode": "gumbel",
    "bk_mode": "full",
    "embedding": "tt",
    "hebbian_eta_mode": "head",
    "hebbian_rule": "delta",
    "htt_num_cores": 3,
}
"""Another value of a field; truth values are turned and numbers doubled."""
BESIDE: dict[str, dict[str, Any]] = {
    "n_seq": {"position_embedding": "zeta", "zeta_embedding_trainable": True},
    "zeta_embedding_trainable": {"position_embedding": "zeta"},
    "position_scale": {"position_embedding": "zeta"},
    "htt_complex": {"tie_word_embeddings": False},
    "ffn_compression_enabled": {"ffn_rank": None},
    "ar_ssm_gumbel_temperature": {"ar_ssm_gate_mode": "gumbel"},
    "bk_mode": {"is_encoder": True},
}
"""Other fields without which a field does nothing, or cannot change."""


FIELDS = [(kind, field.name) for kind, (config, *_) in MODELS.items() for field in dataclasses.fields(config)]


def neighbours(kind: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of two models that differ in one of them."""
    train = {"embedding": "tt"} if kind == "so8t_phase2" and name.startswith("htt") else {}
    given = PRODUCTION[kind][2] | train | BESIDE.get(name, {})
    now = given.get(name, getattr(MODELS[kind][0](), name))
    if name == "position_embedding":
        value: Any = "none" if now == "zeta" else "zeta"
    elif name in VALUES:
        value = VALUES[name]
    else:
        value = not now if isinstance(now, bool) else 2 * now
    return given, given | {name: value}


def traced(kind: str, given: dict[str, Any]) -> str:
    """Return what a definition computes, its start included, as text; one model is traced once."""
    return _traced(kind, tuple(sorted(given.items())))


@functools.cache
def _traced(kind: str, given: tuple[tuple[str, Any], ...]) -> str:
    model = definition(kind, dict(given))
    graph, state = nnx.split(model)

    def run(state: Any) -> Any:
        rebuilt = nnx.merge(graph, state)
        return rebuilt(ROW), getattr(rebuilt, "model", rebuilt).aux_loss(ROW)

    start = jax.make_jaxpr(lambda: nnx.state(built(kind, dict(given))))()
    return re.sub("0x[0-9a-f]+", "", f"{start} {jax.make_jaxpr(run)(state)}")


def built(kind: str, given: dict[str, Any]) -> Any:
    config, body, whole = MODELS[kind]
    return (body if given.get("is_encoder") else whole)(config(**given), rngs=nnx.Rngs(0))


def definition(kind: str, given: dict[str, Any]) -> Any:
    return nnx.eval_shape(lambda: built(kind, given))


def test_a_model_is_traced_to_the_same_text_again() -> None:
    given = tuple(sorted(PRODUCTION["so8t_phase2"][2].items()))
    assert _traced.__wrapped__("so8t_phase2", given) == _traced("so8t_phase2", given)


@pytest.mark.parametrize(("kind", "name"), FIELDS)
def test_a_field_changes_the_definition_and_its_tensors_are_those_of_production(kind: str, name: str) -> None:
    given, changed = neighbours(kind, name)
    assert traced(kind, given) != traced(kind, changed)
    config, model, _ = PRODUCTION[kind]
    with torch.device("meta"):
        there = (Phase2Model if changed.get("is_encoder") else model)(config(**changed))
    tensors = {key: tuple(value.shape) for key, value in there.state_dict().items() if not key.endswith("_extra_state")}
    if changed.get("tie_word_embeddings", there.config.tie_word_embeddings):
        tensors.pop("lm_head.weight", None)
    assert {key: place.shape for key, place in places(definition(kind, changed)).items()} == tensors


@pytest.mark.parametrize("kind", MODELS)
def test_fields_and_defaults_are_those_of_production(kind: str) -> None:
    production, ours = PRODUCTION[kind][0](), MODELS[kind][0]()
    names = set(vars(ours))
    assert names | set(ours.running) == set(type(production).settings())
    assert {name: getattr(production, name) for name in names} == vars(ours)
    assert MODELS[kind][0].from_dict(production.to_dict()) == ours


@pytest.mark.parametrize(
    ("kind", "given", "text"),
    [
        ("so8t_phase1", {"ar_ssm_core": "dense"}, "ar_ssm_core: expected 'operator' or 'compat', got 'dense'"),
        ("so8t_phase2", {"bk_mode": "both", "embedding": 3}, "bk_mode: .* got 'both'; embedding: .* got 3"),
        ("so8t_phase1", {"quantization_config": {}}, "'so8t_phase1' has no field quantization_config"),
        ("so8t_phase2", {"depth": 1, "model_type": "so8t_phase1"}, "expected the configuration of a model"),
    ],
)
def test_what_the_definition_does_not_know_is_refused_by_name(kind: str, given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MODELS[kind][0].from_dict(given)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_start_with_the_sizes_of_production(kind: str) -> None:
    config, model, small = PRODUCTION[kind]
    given = small | {"d_model": 32, "ffn_dim": 64, "vocab_size": 101, "initializer_range": 0.02}
    torch.manual_seed(0)
    wanted = {
        name: float(value.detach().pow(2).mean().sqrt()) for name, value in model(config(**given)).named_parameters()
    }
    values = dict(nnx.to_flat_state(jax.jit(lambda: nnx.state(built(kind, given), nnx.Param))()))
    for name, place in places(definition(kind, given)).items():
        size = float(np.sqrt(np.square(np.asarray(values[place.path][...])).mean())) if place.trained else None
        # a tensor of a few numbers has no size of its own; that of n numbers is known to one part in sqrt(2 n)
        if size is not None and (count := math.prod(place.shape)) >= 96:
            assert size == pytest.approx(wanted[name], rel=5 / math.sqrt(2 * count)), name
