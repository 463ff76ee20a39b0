"""Embeddings of Phase 2 by choice of the configuration: each streams, is saved, carries a gradient and learns."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from so8t_torch.models.factory import create_phase2_model

SIZES = {"vocab_size": 30, "d_model": 16, "n_layers": 1, "n_seq": 32, "dropout": 0.0, "num_heads": 2, "head_dim": 8}
KINDS = {
    "train": {"embedding": "tt", "htt_rank": 4},
    "train, tied": {"embedding": "tt", "htt_rank": 4, "tie_word_embeddings": True},
    "hierarchical train, adaptive step": {
        "embedding": "tt",
        "htt_num_cores": 3,
        "htt_rank": 3,
        "d_model": 8,
        "adaptive_time_step": True,
    },
    "complex train": {"embedding": "complex_tt", "htt_rank": 4},
    "hierarchical complex train": {"embedding": "complex_tt", "htt_num_cores": 3, "htt_rank": 3},
    "table, tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_every_choice_is_a_whole_language_model(fields, tmp_path):
    model = create_phase2_model(**SIZES | {"memory_chunk": 8} | fields, seed=0)
    ids = torch.arange(64).reshape(4, 16) % 30
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(32):
        loss = model(ids, labels=ids).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:], past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)
