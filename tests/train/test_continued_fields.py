"""Fields of a model that training begins from: each changes the model that is there, or is refused by name."""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from so8t_torch.core.config import parse_config
from so8t_torch.core.errors import ConfigError
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.stored import read_model
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer
from so8t_torch.train import continuing, language
from so8t_torch.train.config import ModelSection
from tests.models.test_no_dead_field import ELSEWHERE, OF_PHASE_1, OF_PHASE_2, PHASE_1, PHASE_2, differ, seen_of

OF_KIND = {"phase1": (create_phase1_model, PHASE_1, OF_PHASE_1), "phase2": (create_phase2_model, PHASE_2, OF_PHASE_2)}
TAKEN = {
    "phase1": {
        *("dropout", "layer_norm_eps", "position_scale", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("position_embedding", "backend", "ar_ssm_min_rank", "ar_ssm_l1_regularization", "ar_ssm_gate_mode"),
        *("ar_ssm_gumbel_temperature", "checkpoint_ar_ssm", "lns_enabled"),
    },
    "phase2": {
        *("dropout", "layer_norm_eps", "position_scale", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("position_embedding", "backend", "base_decay", "hebbian_eta", "hebbian_rule", "hebbian_dt", "memory_chunk"),
        *("snr_enabled", "snr_threshold", "snr_gamma_boost", "snr_eta_boost", "resonance_energy_threshold"),
    },
}
"""Fields that change what is there; all others are refused."""
PEERS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, state_size=4, time_step_rank=2)
    ),
}


def section(kind, folder, **fields):
    return parse_config(ModelSection, {"kind": kind, "init_from": str(folder), "fields": fields})


def begun(kind, folder, **fields):
    chosen = section(kind, folder, **fields)
    return continuing.weights(chosen, continuing.configuration(chosen))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of models by kind and fields."""
    folders = {}

    def make(kind, **beside):
        key = kind, *beside.items()
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(kind)
            create, sizes, _ = OF_KIND[kind]
            create(**sizes | beside, seed=0).save_pretrained(folders[key])
        return folders[key]

    return make


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, found in OF_KIND.items() for name in found[2] if name != "vocab_size"]
)
def test_a_field_changes_the_model_that_is_there_or_is_refused(kind, name, saved):
    value, beside = OF_KIND[kind][2][name]
    folder = saved(kind, **beside)
    if name in TAKEN[kind]:
        place = ELSEWHERE.get(name, "output")
        before, after = (seen_of(lambda fields=fields: begun(kind, folder, **fields)) for fields in ({}, {name: value}))
        assert differ(before.get(place), after.get(place))
    else:
        with pytest.raises(ConfigError, match=rf"model\.fields\.{name}: |is_encoder false"):
            continuing.configuration(section(kind, folder, **{name: value}))


@pytest.mark.parametrize(
    ("kind", "beside", "name", "value"),
    [
        ("phase2", {"zeta_embedding_trainable": True}, "position_scale", 1.0),
        ("phase2", {"hebbian_eta_mode": "head"}, "hebbian_eta", 0.7),
    ],
)
def test_what_a_trained_tensor_began_from_is_refused(kind, beside, name, value, saved):
    with pytest.raises(ConfigError, match=rf"say how weights are drawn.*\n  model\.fields\.{name}: {value}, and "):
        continuing.configuration(section(kind, saved(kind, **beside), **{name: value}))
    same = getattr(read_model(saved(kind, **beside)).config, name)
    assert getattr(continuing.configuration(section(kind, saved(kind, **beside), **{name: same})), name) == same


def test_gates_are_those_of_the_fields_and_otherwise_those_of_the_folder(tmp_path):
    model = create_phase1_model(**PHASE_1, seed=0)
    for block in model.model.layers:
        block.mixer.set_gate_mode("gumbel", 0.7)
        block.mixer.update_rank_schedule(1, 2)
    model.save_pretrained(tmp_path)

    def gates(**fields):
        mixers = begun("phase1", tmp_path, **fields).modules()
        found = [m for m in mixers if isinstance(m, AdaptiveRankSemiseparableLayer)]
        (one,) = {(m.gate_mode, m.gumbel_temperature, m.active_rank) for m in found}
        return one

    assert gates() == ("gumbel", 0.7, 4)
    assert gates(ar_ssm_gate_mode="ste") == ("ste", 0.7, 4)
    assert gates(ar_ssm_gumbel_temperature=0.3) == ("gumbel", 0.3, 4)


def test_a_folder_without_ids_gets_those_of_the_configuration(saved):
    chosen = section("phase1", saved("phase1"))
    settings = continuing.configuration(chosen)
    settings.eos_token_id = 3
    assert continuing.weights(chosen, settings).generation_config.eos_token_id == 3


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    folders = {}
    for kind, create in PEERS.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        create().save_pretrained(folders[kind])
    return folders


WRONG = {
    "llama": {
        "num_attention_heads": 3,
        "num_key_value_heads": 0,
        "hidden_size": "many",
        "rms_norm_eps": "x",
        "hidden_act": "nonsense",
        "pad_token_id": 999,
    },
    "mamba": {"hidden_act": "nonsense", "time_step_rank": "x", "state_size": -1},
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, fields in WRONG.items() for name in fields])
def test_a_value_that_the_library_refuses_is_told_with_its_field(kind, name, peers):
    value = WRONG[kind][name]
    told = rf"no model of kind {kind} has {name}={value!r} \(.*"
    with pytest.raises(ConfigError, match=rf"(?s)model\.init_from .*{told}"):
        continuing.configuration(section(kind, peers[kind], **{name: value}))
    small = PEERS[kind]().config.to_dict()
    fields = {key: small[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")} | {name: value}
    fresh = ModelSection(kind=kind, fields=fields)
    with pytest.raises(ConfigError, match=rf"(?s)model\.fields.*{name}|Config refuses them"):
        language.configuration(fresh, 257, 24)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("llama", "initializer_range", 0.5),
        ("mamba", "initializer_range", 0.5),
        ("mamba", "rescale_prenorm_residual", True),
        ("mamba", "time_step_scale", 2.0),
        ("mamba", "time_step_min", 0.01),
        ("mamba", "time_step_max", 0.2),
        ("mamba", "time_step_floor", 0.01),
        ("mamba", "time_step_init_scheme", "constant"),
        ("mamba", "expand", 3),
        ("llama", "num_attention_heads", 2),
    ],
)
def test_fields_of_a_peer_that_cannot_act_are_refused(kind, name, value, peers):
    with pytest.raises(ConfigError, match=rf"\n  model\.fields\.{name}: {value!r}, and "):
        continuing.configuration(section(kind, peers[kind], **{name: value}))


def test_a_field_of_a_peer_acts(peers):
    ids = torch.arange(8)[None]
    with torch.no_grad():
        plain = read_model(peers["llama"]).eval()(ids).logits
        changed = begun("llama", peers["llama"], rms_norm_eps=0.5).eval()(ids).logits
    assert not torch.equal(plain, changed)


def test_a_folder_of_which_no_model_can_be_built_is_told(peers, tmp_path):
    folder = shutil.copytree(peers["llama"], tmp_path / "model")
    config = LlamaConfig.from_pretrained(folder)
    config.hidden_act = "nonsense"
    config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"no model can be built from its config\.json \(KeyError: 'nonsense'\)"):
        continuing.configuration(section("llama", folder))
