"""Every parameter gets a gradient, whatever a configuration chooses: one step on random rows, a fresh model."""

import pytest
import torch

from so8t_torch.models.factory import create_phase1_model, create_phase2_model

CHUNK, ROWS, LENGTH, VOCAB = 4, 3, 14, 30
SIZES = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_seq": LENGTH, "dropout": 0.0, "htt_rank": 3}
PHASE_1 = {
    "default": {},
    "table, untied": {"htt_enabled": False, "tie_word_embeddings": False},
    "table, tied": {"htt_enabled": False},
    "untied": {"tie_word_embeddings": False},
    "complex train": {"htt_complex": True, "tie_word_embeddings": False},
    "hierarchical train": {"htt_num_cores": 3, "d_model": 8},
    "no phases": {"htt_phase_encoding": False},
    "positions": {"position_embedding": "zeta", "zeta_embedding_trainable": True},
    "dense maps": {"ffn_compression_enabled": False},
    "sign-log": {"lns_enabled": True},
    "compat": {"ar_ssm_core": "compat"},
    "uniform": {"ar_ssm_decays": "uniform"},
    "no decay": {"ar_ssm_decays": "none"},
    "adaptive step": {"ar_ssm_adaptive_time_step": True},
    "rotating": {"ar_ssm_complex": True},
    "rotating compat, adaptive step": {
        "ar_ssm_complex": True,
        "ar_ssm_core": "compat",
        "ar_ssm_adaptive_time_step": True,
    },
    "straight through": {"ar_ssm_gate_mode": "ste"},
    "samples": {"ar_ssm_gate_mode": "gumbel"},
    "one tap": {"ar_ssm_band_width": 1},
    "computed twice": {"checkpoint_ar_ssm": True},
    "dropout": {"dropout": 0.2},
}
PHASE_2 = {
    "default": {},
    "tied": {"tie_word_embeddings": True},
    "train": {"embedding": "tt"},
    "train, tied": {"embedding": "tt", "tie_word_embeddings": True},
    "complex train": {"embedding": "complex_tt"},
    "hierarchical train": {"embedding": "tt", "htt_num_cores": 3, "d_model": 8},
    "trained positions": {"zeta_embedding_trainable": True},
    "no positions": {"position_embedding": "none"},
    "delta": {"hebbian_rule": "delta"},
    "strength per head": {"hebbian_eta_mode": "head"},
    "strength per token": {"hebbian_eta_mode": "token"},
    "adaptive step": {"adaptive_time_step": True},
    "adaptive hopping": {"bk_adaptive_hopping": True},
    "not hermitian": {"bk_hermitian": False},
    "not hermitian, adaptive hopping": {"bk_hermitian": False, "bk_adaptive_hopping": True},
    "rates that are not adaptive": {"adaptive_decay": False},
    "one chain": {"bk_channels": 1},
    "feedback": {"feedback_enabled": True},
    "no noise filter": {"snr_enabled": False},
    "no resonance": {"resonance_enabled": False},
    "no filter": {"short_conv": 0},
    "no memory": {"hebbian_enabled": False},
    "zeta start": {"use_zeta_init": True},
    "dropout": {"dropout": 0.2},
    "everything": {
        "hebbian_rule": "delta",
        "hebbian_eta_mode": "token",
        "adaptive_time_step": True,
        "bk_hermitian": False,
        "bk_adaptive_hopping": True,
        "feedback_enabled": True,
        "embedding": "tt",
    },
}
LATER = {"feedback_weight": "learns from the second step on: its gate starts at zero"}
"""Ends of the names of parameters without a gradient in the first step."""
MODELS = [
    *(
        (create_phase1_model, SIZES | {"ar_ssm_max_rank": 6, "ar_ssm_min_rank": 2}, fields)
        for fields in PHASE_1.values()
    ),
    *(
        (create_phase2_model, SIZES | {"num_heads": 2, "head_dim": 4, "memory_chunk": CHUNK}, fields)
        for fields in PHASE_2.values()
    ),
]
NAMES = [*(f"phase 1 {name}" for name in PHASE_1), *(f"phase 2 {name}" for name in PHASE_2)]


@pytest.mark.parametrize(("create", "sizes", "fields"), MODELS, ids=NAMES)
def test_every_parameter_gets_a_gradient(create, sizes, fields):
    model = create(**sizes | fields, seed=3).train()
    torch.manual_seed(0)
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    model(ids, labels=ids).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    still = [name for name, gradient in found.items() if not gradient.any() and not name.endswith(tuple(LATER))]
    assert not still


def test_what_learns_later_does_so_in_the_second_step():
    model = create_phase2_model(**SIZES, num_heads=2, head_dim=4, memory_chunk=CHUNK, feedback_enabled=True, seed=3)
    ids = torch.randint(VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    late = [p.grad for name, p in model.named_parameters() if name.endswith(tuple(LATER))]
    assert len(late) == 2
    assert all(gradient.any() for gradient in late)
