"""Phase 1 as a language model: one matrix of kinds, each causal, streaming, blind to padding, and able to learn."""

import random

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from so8t_torch.models.factory import create_phase1_model
from so8t_torch.models.memory import kept_bytes
from so8t_torch.models.phase1 import Phase1ForCausalLM, Phase1Model
from so8t_torch.models.states import state_bytes

SIZES = {"vocab_size": 30, "d_model": 16, "n_layers": 2, "n_seq": 32, "dropout": 0.0, "htt_rank": 4}
RANKS = {"ar_ssm_max_rank": 6, "ar_ssm_min_rank": 2}
KINDS = {
    "default": {},
    "hierarchical train": {"htt_num_cores": 3, "d_model": 8},
    "complex train": {"htt_complex": True, "tie_word_embeddings": False},
    "table": {"htt_enabled": False, "ffn_compression_enabled": False, "position_embedding": "zeta"},
    "compat": {"ar_ssm_core": "compat", "ar_ssm_decays": "uniform", "ar_ssm_gate_mode": "ste"},
    "rotating": {"ar_ssm_complex": True},
    "rotating compat, adaptive step": {
        "ar_ssm_complex": True,
        "ar_ssm_core": "compat",
        "ar_ssm_adaptive_time_step": True,
    },
    "adaptive step": {"ar_ssm_adaptive_time_step": True, "lns_enabled": True},
    "no decay": {"ar_ssm_decays": "none", "ar_ssm_band_width": 1},
}
kinds = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def built(fields, dtype=torch.float64):
    return create_phase1_model(**SIZES | RANKS | fields, dtype=dtype, seed=2).eval()


def drawn(rows, length, seed=0):
    return torch.randint(0, 30, (rows, length), generator=torch.Generator().manual_seed(seed))


def streamed(model, ids, cuts):
    cache, found = None, []
    for first, last in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        output = model(ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1), cache


@kinds
@torch.no_grad()
def test_any_split_is_one_run(fields):
    model, ids = built(fields), drawn(2, 24)
    whole, cache = streamed(model, ids, [])
    chance = random.Random(3)
    for cuts in [list(range(1, 24)), *(sorted(chance.sample(range(1, 24), chance.randint(1, 6))) for _ in range(12))]:
        parts, last = streamed(model, ids, cuts)
        assert torch.allclose(parts, whole, rtol=1e-10, atol=1e-12)
        for one, two in zip(cache.layers, last.layers, strict=True):
            for state, other in zip(one.recurrent_states.values(), two.recurrent_states.values(), strict=True):
                assert state is None or torch.allclose(state, other, rtol=1e-10, atol=1e-12)


@kinds
@torch.no_grad()
def test_a_later_token_changes_no_bit_of_an_earlier_logit(fields):
    model, ids = built(fields, torch.float32), drawn(2, 20)
    edited = ids.clone()
    edited[:, 11] = (ids[:, 11] + 7) % 30
    before, after = model(ids).logits, model(edited).logits
    assert torch.equal(before[:, :11], after[:, :11])
    assert not torch.equal(before[:, 11:], after[:, 11:])


@kinds
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(fields):
    model, ids = built(fields), drawn(2, 12)
    alone = model(ids[:1, 5:], use_cache=True)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    padded = model(ids, attention_mask=mask, use_cache=True)
    assert torch.allclose(padded.logits[0, 5:], alone.logits[0], rtol=1e-10, atol=1e-12)
    for one, two in zip(padded.past_key_values.layers, alone.past_key_values.layers, strict=True):
        assert torch.allclose(one.recurrent_states[1][0], two.recurrent_states[1][0], rtol=1e-10, atol=1e-12)
    packed = torch.cat([ids[0], ids[1]])[None]
    parts = model(packed, segment_ids=torch.arange(24)[None] // 12).logits.view(2, 12, -1)
    assert torch.allclose(parts, model(ids).logits, rtol=1e-10, atol=1e-12)


@kinds
def test_every_parameter_learns_and_the_loss_falls(fields):
    model, ids = built(fields, torch.float32).train(), torch.arange(64).reshape(4, 16) % 30
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for step in range(24):
        output = model(ids, labels=ids)
        losses.append(output.loss.item())
        optimiser.zero_grad()
        output.loss.backward()
        if not step:
            still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
            assert not still
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


@kinds
@torch.no_grad()
def test_it_goes_through_a_file(fields, tmp_path):
    model, ids = built(fields, torch.float32), drawn(1, 9)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, Phase1ForCausalLM)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    # a file's weights may begin anywhere in memory, and a product rounds by where they begin
    assert torch.allclose(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, Phase1Model)
    assert torch.allclose(body(ids).last_hidden_state, again.model(ids).last_hidden_state, rtol=1e-5, atol=1e-6)


@kinds
@torch.no_grad()
def test_generation_continues_the_argmax_with_a_state_of_fixed_size(fields):
    model, ids = built(fields), drawn(2, 5)
    found = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found.sequences, expected)
    assert state_bytes(found.past_key_values) == state_bytes(model(ids[:, :1], use_cache=True).past_key_values)


def test_the_gates_add_to_the_loss():
    ids = drawn(2, 10)
    free, charged = (built({"ar_ssm_l1_regularization": weight}) for weight in (0.0, 2.0))
    gates = [found["gates"].mean() for found in charged(ids, diagnostics="full").diagnostics["blocks"]]
    output = charged(ids, labels=ids)
    assert torch.allclose(output.aux_loss, 2.0 * sum(gates), rtol=1e-12)
    assert torch.allclose(output.loss, free(ids, labels=ids).loss + output.aux_loss, rtol=1e-12)


@kinds
@pytest.mark.parametrize("level", ["summary", "full"])
def test_diagnostics_change_nothing_and_are_detached(fields, level):
    model, ids = built(fields).train(), drawn(2, 10)
    plain, told = model(ids), model(ids, diagnostics=level)
    assert torch.equal(plain.logits, told.logits)
    for found in told.diagnostics["blocks"]:
        assert ("gates" in found) == (level == "full")
        assert 2 <= float(found["effective_rank"]) <= 6
        assert all(not tensor.requires_grad for tensor in found.values())
        assert all(tensor.ndim == 0 for tensor in found.values()) == (level == "summary")


@torch.no_grad()
def test_diagnostics_count_no_padding():
    """Gates of padding are closed; numbers are those of the tokens alone."""
    model, ids = built({}), drawn(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :7] = 0
    rows = [ids[:1, 7:], ids[1:]]
    found = model(ids, attention_mask=mask, diagnostics="summary").diagnostics["blocks"]
    alone = [model(row, diagnostics="full").diagnostics["blocks"] for row in rows]
    for block, told in enumerate(found):
        gates = torch.cat([row[block]["gates"].flatten(0, 1) for row in alone])
        assert told["gate_sparsity"].item() == pytest.approx((gates < 0.5).double().mean().item())
        assert told["effective_rank"].item() == pytest.approx(gates.sum(-1).mean().item())
        assert 0 < told["gate_sparsity"] < 1


def test_mixers_that_are_computed_again_keep_less_and_give_the_same_gradient():
    ids, found = drawn(2, 24), {}
    for again in (False, True):
        model = built({"checkpoint_ar_ssm": again, "ar_ssm_gate_mode": "gumbel", "dropout": 0.1}).train()
        torch.manual_seed(0)
        kept = kept_bytes(model, lambda model=model: model(ids, labels=ids))
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        found[again] = kept, [parameter.grad for parameter in model.parameters()]
    assert found[True][0] < 0.7 * found[False][0]
    assert all(torch.equal(one, two) for one, two in zip(found[True][1], found[False][1], strict=True))


@pytest.mark.parametrize(("mixers", "blocks", "times"), [(False, False, 1), (True, False, 2), (True, True, 2)])
def test_no_mixer_is_computed_a_third_time(mixers, blocks, times):
    model, count = built({"checkpoint_ar_ssm": mixers, "n_layers": 1}).train(), []
    if blocks:
        model.activation_checkpointing_enable()
    model.model.layers[0].mixer.register_forward_pre_hook(lambda *_: count.append(1))
    model(drawn(2, 10), labels=drawn(2, 10)).loss.backward()
    assert len(count) == times


@kinds
def test_autocast_answers_in_half_precision_and_stays_near(fields):
    model, ids = built(fields, torch.float32), drawn(2, 12)
    exact = model(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids, use_cache=True)
    output.loss.backward()
    assert torch.nn.functional.cosine_similarity(output.logits.float().flatten(), exact.flatten(), 0) > 0.99
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert output.past_key_values.layers[0].recurrent_states[1].dtype == torch.float32


def test_half_weights_run_and_carry_float32_states():
    model, ids = built({}).to(torch.bfloat16), drawn(2, 12)
    output = model(ids, use_cache=True)
    assert output.logits.isfinite().all()
    assert output.past_key_values.layers[0].recurrent_states[1].dtype == torch.float32
