"""Every field of a configuration changes the outputs of a model with the same parameters, or what is named for it."""

import functools
import zlib

import pytest
import torch

from so8t_torch.core.errors import BackendError
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.memory import kept_bytes

SIZES = {"vocab_size": 36, "d_model": 16, "n_layers": 2, "n_seq": 16, "dropout": 0.0, "htt_rank": 4}
TRAIN_OF_3 = {"d_model": 8}
PHASE_1 = {**SIZES, "ar_ssm_max_rank": 6, "ar_ssm_min_rank": 2}
PHASE_2 = {**SIZES, "num_heads": 2, "head_dim": 4, "memory_chunk": 4}
OF_BOTH = {
    "vocab_size": (37, {}),
    "d_model": (32, {}),
    "n_layers": (3, {}),
    "n_seq": (8, {"position_embedding": "zeta", "zeta_embedding_trainable": True}),
    "ffn_dim": (24, {}),
    "dropout": (0.5, {}),
    "layer_norm_eps": (0.1, {}),
    "position_scale": (1.0, {"position_embedding": "zeta"}),
    "zeta_embedding_trainable": (True, {"position_embedding": "zeta"}),
    "initializer_range": (0.1, {}),
    "use_cache": (False, {}),
    "bos_token_id": (1, {}),
    "eos_token_id": (2, {}),
    "pad_token_id": (4, {}),
}
OF_PHASE_1 = OF_BOTH | {
    "position_embedding": ("zeta", {}),
    "tie_word_embeddings": (False, {}),
    "htt_rank": (3, {}),
    "htt_num_cores": (3, TRAIN_OF_3),
    "htt_phase_encoding": (False, {}),
    "backend": ("triton", {}),
    "ar_ssm_max_rank": (8, {}),
    "ar_ssm_min_rank": (3, {}),
    "ar_ssm_gate_hidden_dim": (7, {}),
    "ar_ssm_l1_regularization": (0.5, {}),
    "ar_ssm_core": ("compat", {}),
    "ar_ssm_decays": ("uniform", {}),
    "ar_ssm_adaptive_time_step": (True, {}),
    "ar_ssm_complex": (True, {}),
    "ar_ssm_band_width": (2, {}),
    "ar_ssm_gate_mode": ("ste", {}),
    "ar_ssm_gumbel_temperature": (0.3, {"ar_ssm_gate_mode": "gumbel"}),
    "checkpoint_ar_ssm": (True, {}),
    "htt_enabled": (False, {}),
    "htt_complex": (True, {"tie_word_embeddings": False}),
    "ffn_rank": (5, {}),
    "ffn_compression_enabled": (False, {}),
    "lns_enabled": (True, {}),
}
OF_PHASE_2 = OF_BOTH | {
    "position_embedding": ("none", {}),
    "tie_word_embeddings": (True, {}),
    "htt_rank": (3, {"embedding": "tt"}),
    "htt_num_cores": (3, {"embedding": "tt", **TRAIN_OF_3}),
    "htt_phase_encoding": (False, {"embedding": "tt"}),
    "backend": ("triton", {}),
    "embedding": ("complex_tt", {}),
    "num_heads": (4, {}),
    "head_dim": (8, {}),
    "bk_channels": (3, {}),
    "bk_mode": ("full", {"is_encoder": True}),
    "bk_hermitian": (False, {}),
    "bk_adaptive_hopping": (True, {}),
    "is_encoder": (True, {}),
    "base_decay": (0.04, {"adaptive_decay": True}),
    "adaptive_decay": (False, {}),
    "hebbian_enabled": (False, {}),
    "hebbian_eta": (0.7, {}),
    "hebbian_eta_mode": ("token", {}),
    "hebbian_rule": ("delta", {}),
    "hebbian_dt": (0.5, {}),
    "adaptive_time_step": (True, {}),
    "short_conv": (2, {}),
    "memory_chunk": (8, {}),
    "snr_enabled": (False, {}),
    "snr_threshold": (0.5, {}),
    "snr_gamma_boost": (3.0, {}),
    "snr_eta_boost": (3.0, {}),
    "resonance_enabled": (False, {}),
    "resonance_energy_threshold": (0.9, {}),
    "feedback_enabled": (True, {}),
    "use_zeta_init": (True, {}),
}


SIZES_OF_PARAMETERS = {
    *("vocab_size", "d_model", "n_layers", "n_seq", "ffn_dim", "htt_rank", "htt_num_cores", "num_heads", "head_dim"),
    *("bk_channels", "short_conv", "ar_ssm_max_rank", "ar_ssm_gate_hidden_dim", "ar_ssm_band_width", "ffn_rank"),
}
ELSEWHERE = {
    "initializer_range": "start",
    "use_zeta_init": "start",
    "ar_ssm_decays": "start",
    "zeta_embedding_trainable": "trained numbers",
    "checkpoint_ar_ssm": "kept",
    "use_cache": "cache",
    "backend": "refused",
    **dict.fromkeys(("dropout", "ar_ssm_l1_regularization", "ar_ssm_gumbel_temperature"), "trained"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "ids"),
}
"""What shows a field that changes neither the sizes of parameters nor the outputs of equal parameters."""


def alike(model, start):
    """Give a model the parameters of another one where they have the same name and shape, all moved a little."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            given = start.get(name, parameter)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((given if given.shape == parameter.shape else parameter) + 0.1 * noise)
    return model


@functools.cache
def started(create, *fields):
    """Return the parameters of a fresh model."""
    model = create(**dict(fields), seed=0)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@functools.cache
def seen(create, before, fields):
    """Return what there is to be seen of a model with the parameters of the model of other fields."""
    start = started(create, *fields)
    found = {"start": torch.cat([tensor.flatten() for tensor in start.values()])}
    return found | seen_of(lambda: alike(create(**dict(fields), seed=0), started(create, *before)))


def seen_of(build):
    """Return what there is to be seen of the model that a function gives, or why a backend does not run it."""
    try:
        return _seen(build())
    except BackendError as refused:
        return {"refused": str(refused)}


def _seen(model):
    ids = torch.arange(24).reshape(2, 12) % 36
    language = model.can_generate()
    found = {"shapes": {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}}
    with torch.no_grad():
        model.eval()
        output = model(ids)
        found["output"] = output.logits if language else output.last_hidden_state
        found["cache"] = output.past_key_values is not None
    model.train()
    torch.manual_seed(1)
    given = {"labels": ids} if language else {}
    output = model(ids, **given)
    found["trained"] = output.loss if language else output.last_hidden_state
    found["kept"] = kept_bytes(model, lambda: model(ids, **given))
    found["trained numbers"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if language:
        found["ids"] = [getattr(model.generation_config, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    return found


def differ(one, two):
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return not torch.equal(one, two)
    return one != two


@pytest.mark.parametrize(
    ("create", "sizes", "name", "value", "beside"),
    [
        *((create_phase1_model, PHASE_1, name, *change) for name, change in OF_PHASE_1.items()),
        *((create_phase2_model, PHASE_2, name, *change) for name, change in OF_PHASE_2.items()),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_field_makes_a_difference(create, sizes, name, value, beside):
    """In the sizes or outputs of a model with the same parameters, or in what is named for the field."""
    before = tuple((sizes | beside).items())
    after = tuple((sizes | beside | {name: value}).items())
    place = "shapes" if name in SIZES_OF_PARAMETERS else ELSEWHERE.get(name, "output")
    assert differ(seen(create, before, before).get(place), seen(create, before, after).get(place))


@pytest.mark.parametrize(("create", "sizes"), [(create_phase1_model, PHASE_1), (create_phase2_model, PHASE_2)])
def test_the_same_fields_make_none(create, sizes):
    fields = tuple(sizes.items())
    one, two = seen(create, fields, fields), seen.__wrapped__(create, fields, fields)
    assert not [name for name in one if differ(one[name], two[name])]


@pytest.mark.parametrize(("kind", "changes"), [(Phase1Config, OF_PHASE_1), (Phase2Config, OF_PHASE_2)])
def test_no_field_is_left_out(kind, changes):
    assert set(kind.settings()) == set(changes)
