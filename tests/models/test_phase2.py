"""The Phase 2 model: rows, documents, splits and single tokens agree, nothing reaches back, and credit goes far."""

import random
from itertools import pairwise

import pytest
import torch

from so8t_torch.core.readable import readable
from so8t_torch.models.configuration import Phase2Config
from so8t_torch.models.factory import create_phase2_model
from so8t_torch.models.phase2 import Phase2Model
from so8t_torch.models.rows import lay_out
from so8t_torch.models.states import RecurrentCache
from so8t_torch.nn import modulated_memory

VOCAB, CHUNK, LENGTH = 23, 4, 13
SMALL = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "num_heads": 2, "head_dim": 4, "dropout": 0.0, "n_seq": 8}
CHOSEN = {"memory_chunk": CHUNK, "snr_threshold": 0.8, "snr_gamma_boost": 4.0, "resonance_energy_threshold": 0.8}
VARIANTS = {
    "default": {},
    "feedback": {"feedback_enabled": True},
    "all else": {
        "hebbian_rule": "delta",
        "hebbian_eta_mode": "token",
        "adaptive_time_step": True,
        "bk_hermitian": False,
        "bk_adaptive_hopping": True,
        "zeta_embedding_trainable": True,
        "embedding": "tt",
        "htt_rank": 3,
        "tie_word_embeddings": True,
    },
    "no memory": {"hebbian_enabled": False},
    "plain memory": {"snr_enabled": False, "resonance_enabled": False, "short_conv": 0, "position_embedding": "none"},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
ROUNDING = 1e-10


def built(variant="default", **others):
    """Return a model in float64 whose gates stand open, so that every part has an effect."""
    model = create_phase2_model(**SMALL | CHOSEN | VARIANTS[variant] | others, seed=1).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(1.0)
            if name.endswith(("bk_out.weight", "out_proj.weight", "ffn.3.weight")):
                parameter.mul_(4.0)
    return model


def ids(rows=2, length=LENGTH, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_pieces(model, tokens, cuts):
    """Return the logits of tokens that come piece by piece, and what they leave."""
    cache, parts = None, []
    for first, last in zip((0, *cuts), (*cuts, tokens.shape[1]), strict=True):
        out = model(tokens[:, first:last], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1), cache


def states(cache, row=slice(None)):
    """Return all that is carried, of one row or of all."""
    held = [layer.recurrent_states[place] for layer in cache.layers for place in sorted(layer.recurrent_states)]
    return [state[row] for state in held if state is not None]


def same_states(found, wanted, row=slice(None)):
    torch.testing.assert_close(states(found, row), states(wanted), rtol=0, atol=ROUNDING)


@every_variant
@torch.no_grad()
def test_token_by_token_and_in_pieces(variant):
    model, tokens = built(variant), ids()
    whole = model(tokens, use_cache=True)
    for cuts in (range(1, LENGTH), (1, 6), (4, 8), (5, 12)):
        logits, cache = in_pieces(model, tokens, tuple(cuts))
        torch.testing.assert_close(logits, whole.logits, rtol=0, atol=ROUNDING)
        same_states(cache, whole.past_key_values)


@torch.no_grad()
def test_a_thousand_random_splits():
    model, draw, rows, length = built(n_layers=1), random.Random(0), 1000, 20
    tokens = ids(1, length).expand(rows, -1)
    cuts = [sorted(draw.sample(range(1, length), draw.randrange(length))) for _ in range(rows)]
    assert len({tuple(cut) for cut in cuts}) > 800
    ends = [[0, *cut, length] for cut in cuts]
    cache, found = RecurrentCache(model.config), torch.zeros(rows, length, VOCAB, dtype=torch.float64)
    for piece in range(max(map(len, ends)) - 1):
        spans = [(end[piece], end[piece + 1]) if piece + 1 < len(end) else (length, length) for end in ends]
        longest = max(last - first for first, last in spans)
        mask = torch.tensor([[i < last - first for i in range(longest)] for first, last in spans])
        places = torch.tensor([[min(first + i, length - 1) for i in range(longest)] for first, _ in spans])
        part = model(tokens.gather(1, places), attention_mask=mask, past_key_values=cache, use_cache=True).logits
        found[mask.nonzero()[:, 0], places[mask]] = part[mask]
    wanted = model(tokens[:1], use_cache=True)
    torch.testing.assert_close(found, wanted.logits.expand(rows, -1, -1), rtol=0, atol=ROUNDING)
    for found, one in zip(states(cache), states(wanted.past_key_values), strict=True):
        torch.testing.assert_close(found, one.expand_as(found), rtol=0, atol=ROUNDING)


@every_variant
@torch.no_grad()
def test_padding_changes_no_row(variant):
    model, tokens = built(variant), ids(3)
    masks = torch.ones(3, LENGTH, dtype=torch.int64)
    masks[0, :5] = masks[1, 9:] = masks[2, 3] = masks[2, 11:] = 0
    batch = model(torch.where(masks == 0, -7, tokens), attention_mask=masks, use_cache=True)
    for row, mask in enumerate(masks.bool()):
        alone = model(tokens[row : row + 1, mask], use_cache=True)
        torch.testing.assert_close(batch.logits[row, mask], alone.logits[0], rtol=0, atol=ROUNDING)
        same_states(batch.past_key_values, alone.past_key_values, slice(row, row + 1))


@every_variant
@torch.no_grad()
def test_packed_documents_are_documents_alone(variant):
    model, tokens = built(variant), ids(1, 24)
    lengths = (7, 1, 11, 5)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    packed = model(tokens, segment_ids=documents, use_cache=True)
    restarts = torch.cat([torch.arange(n) for n in lengths])[None]
    assert torch.equal(model(tokens, position_ids=restarts).logits, packed.logits)
    for number in range(4):
        here = documents == number
        alone = model(tokens[:, here], use_cache=True)
        torch.testing.assert_close(packed.logits[:, here], alone.logits, rtol=0, atol=ROUNDING)
    same_states(packed.past_key_values, alone.past_key_values)


@torch.no_grad()
def test_numbers_of_one_document_cost_nothing():
    model, tokens = built(), ids(2, 18)
    real = torch.ones(2, 18, dtype=torch.bool)
    real[0, :3] = real[1, 15:] = False
    numbers = torch.where(real, 7, torch.tensor([[1], [9]]))
    for mask, given in ((real, numbers), (None, torch.full((18,), 4))):
        assert lay_out((2, 18), tokens.device, attention_mask=mask, segment_ids=given).documents is None
    assert torch.equal(
        model(tokens, attention_mask=real, segment_ids=numbers).logits, model(tokens, attention_mask=real).logits
    )
    numbers[0, 9:] = 8
    assert lay_out((2, 18), tokens.device, attention_mask=real, segment_ids=numbers).documents is not None


WAITS = {"default": 1, "feedback": 1, "no memory": 0, "plain memory": 0}


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("variant", WAITS)
def test_all_blocks_wait_once_to_know_where_rows_stand(variant, length, monkeypatch):
    model, tokens, waited = built(variant), ids(length=10), []
    monkeypatch.setattr(
        modulated_memory, "readable", lambda x, *, waiting=False: waited.append(waiting) or readable(x, waiting=waiting)
    )
    cache = model(tokens[:, :4], use_cache=True).past_key_values
    assert sum(waited) == 0
    model(tokens[:, 4 : 4 + length], past_key_values=cache)
    assert sum(waited) == WAITS[variant]


def test_feedback_is_that_of_the_state_that_dropout_left(monkeypatch):
    """Unequal rows are gone through twice: the state that shifts the potentials is that with which the memory turns."""
    model = built("feedback", dropout=0.5, n_layers=1).train()
    memory, turned = model.model.layers[0].memory, []
    judge = memory.judge
    monkeypatch.setattr(memory, "judge", lambda weights: turned.append(weights) or judge(weights))
    tokens, restarts = ids(2, 14), torch.stack([torch.arange(14), (torch.arange(14) - 3).clamp(min=0)])
    restarts[1, :3] = torch.arange(3)
    torch.manual_seed(0)
    model(tokens, position_ids=restarts)
    shifting, turning = turned[::2], turned[1::2]
    assert len(shifting) == len(turning) > 2
    torch.testing.assert_close(shifting, turning, rtol=0, atol=ROUNDING)
    assert turning[-1].any()


@torch.no_grad()
def test_padding_documents_and_calls_together():
    model, tokens = built("feedback"), ids(2, 18)
    numbers = torch.tensor([[0] * 3 + [1] * 6 + [2] * 9, [0] * 8 + [1] * 10])
    real = torch.ones(2, 18, dtype=torch.bool)
    real[0, :2] = real[1, 10] = real[1, 15:] = False
    first = model(tokens[:, :7], attention_mask=real[:, :7], segment_ids=numbers[:, :7], use_cache=True)
    second = model(
        tokens[:, 7:], attention_mask=real, segment_ids=numbers[:, 7:], past_key_values=first.past_key_values
    )
    logits = torch.cat([first.logits, second.logits], 1)
    for row in range(2):
        for number in range(numbers[row, -1] + 1):
            here = (numbers[row] == number) & real[row]
            alone = model(tokens[row : row + 1, here]).logits[0]
            torch.testing.assert_close(logits[row, here], alone, rtol=0, atol=ROUNDING)
    positions = first.past_key_values.layers[0].recurrent_states[0]
    assert positions.tolist() == [9, 6]


@torch.no_grad()
def test_packed_rows_in_any_pieces_are_their_documents():
    """Pieces may begin with a document, be one token long, and end inside the padding."""
    generator = random.Random(0)
    model, tokens = built("feedback", n_layers=1), ids(2, 18)
    places = torch.tensor([[*range(3), *range(6), *range(9)], [*range(8), *range(10)]])
    real = torch.ones(2, 18, dtype=torch.bool)
    real[0, 3:5] = real[1, 15:] = False
    places[0, 5] = 0
    whole = model(tokens, attention_mask=real, position_ids=places).logits
    for trial in range(20):
        cuts = [8, 9] if trial == 0 else sorted(generator.sample(range(1, 18), generator.randrange(1, 6)))
        cache, found = None, []
        for low, high in pairwise([0, *cuts, 18] if trial != 1 else range(19)):
            out = model(
                tokens[:, low:high],
                attention_mask=real[:, :high],
                position_ids=places[:, low:high],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], rtol=0, atol=ROUNDING)


@every_variant
@torch.no_grad()
def test_no_later_token_changes_a_bit(variant):
    model, tokens = built(variant).float(), ids(1)
    logits = model(tokens).logits
    for place in range(LENGTH):
        edited = tokens.clone()
        edited[:, place] = (edited[:, place] + 1) % VOCAB
        found = model(edited).logits
        assert torch.equal(found[:, :place], logits[:, :place])
        assert not torch.equal(found[:, place:], logits[:, place:])


@torch.no_grad()
def test_an_encoder_in_mode_full_sees_later_tokens():
    config = Phase2Config(**SMALL, bk_mode="full", is_encoder=True)
    model, tokens = Phase2Model(config).eval(), ids(1)
    edited = tokens.clone()
    edited[:, -1] = (edited[:, -1] + 1) % VOCAB
    before, after = (model(x).last_hidden_state for x in (tokens, edited))
    assert not torch.equal(before[:, :-1], after[:, :-1])
    padded = model(torch.cat([tokens, edited], 1), attention_mask=torch.arange(2 * LENGTH)[None] < LENGTH)
    torch.testing.assert_close(padded.last_hidden_state[:, :LENGTH], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["default", "feedback", "all else"])
def test_the_loss_of_the_last_token_credits_the_first(variant):
    assert_credit_goes_back(built(variant))
    # the noise of the filter is constant in the gradient on purpose
    model = built(variant, snr_enabled=False)
    embedded = 0.3 * torch.randn(1, LENGTH, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    labels = torch.full((1, LENGTH), -100)
    labels[0, -1] = 5

    def loss(x):
        return model(inputs_embeds=x, labels=labels).loss

    (slopes,) = torch.autograd.grad(loss(embedded.requires_grad_()), embedded)
    assert (slopes[:, :-1].norm(dim=-1) > 0).all()
    assert not slopes[:, -1].any()
    for place in (0, 3, 8, 11):
        direction = torch.zeros_like(slopes)
        direction[:, place] = torch.randn(16, generator=torch.Generator().manual_seed(place), dtype=torch.float64)
        with torch.no_grad():
            ends = [loss(embedded + step * direction) for step in (1e-5, -1e-5)]
        difference = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((slopes * direction).sum(), difference, rtol=1e-5, atol=1e-9)


def assert_credit_goes_back(model):
    tokens = ids()
    out = model(tokens, output_hidden_states=True)
    (slopes,) = torch.autograd.grad(out.logits[:, -1].square().sum(), out.hidden_states[0])
    assert (slopes.norm(dim=-1) > 0).all()


def test_gradients_pass_from_one_call_to_the_next():
    model, tokens = built(), ids()
    labels = torch.full_like(tokens, -100)
    labels[:, -1] = tokens[:, -1]
    wanted = torch.autograd.grad(model(tokens, labels=labels).loss, model.model.embed_tokens.weight)[0]
    first = model(tokens[:, :6], use_cache=True)
    loss = model(tokens[:, 6:], past_key_values=first.past_key_values, labels=labels[:, 6:], use_cache=True).loss
    found = torch.autograd.grad(loss, model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING)


@every_variant
@torch.no_grad()
def test_diagnostics_change_nothing_and_are_detached(variant):
    model, tokens = built(variant), ids()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    plain = model(tokens, attention_mask=mask, use_cache=True)
    assert plain.diagnostics is None
    for level in ("summary", "full"):
        with torch.enable_grad():
            found = model(tokens, attention_mask=mask, use_cache=True, diagnostics=level)
        assert torch.equal(found.logits, plain.logits)
        assert all(map(torch.equal, states(found.past_key_values), states(plain.past_key_values)))
        tensors = list(leaves(found.diagnostics))
        assert tensors
        assert not any(tensor.requires_grad for tensor in tensors)
        if level == "summary":
            assert all(tensor.ndim == 0 and tensor.isfinite() for tensor in tensors)


def leaves(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(part)


@torch.no_grad()
def test_diagnostics_have_the_promised_names_and_shapes():
    model, tokens = built("feedback"), ids()
    found = model(tokens, diagnostics="full").diagnostics
    block = found["blocks"][0]
    per_token = {
        **dict.fromkeys(("gamma", "v_complex", "potential_feedback", "adjusted_gamma"), (2, LENGTH, 2)),
        "adjusted_eta": (2, LENGTH, 2),
        "bk_features": (2, LENGTH, 4),
        "hebbian_output": (2, LENGTH, 16),
        "ffn_output": (2, LENGTH, 16),
        "fast_weight_energy": (2, 2),
    }
    assert {name: tuple(block[name].shape) for name in per_token} == per_token
    assert set(block["snr_stats"]) == {"mean_snr", "std_snr", "min_snr", "max_snr", "low_snr_ratio"}
    assert {"diag_energy", "resonance_mask", "num_resonant", "total_energy", "sparsity_ratio"} <= set(
        block["resonance_info"]
    )
    assert {"energy", "dE_dt", "is_stable", "suggested_gamma_adjust", "violation_count"} <= set(block["stability"])
    assert block["stability"]["is_stable"].all()
    assert block["stability"]["violation_count"].eq(0).all()
    assert block["stability"]["balance_residual"].abs().max() < ROUNDING
    assert {len(found[name]) for name in ("layer_outputs", "gamma_values", "snr_stats", "stability_metrics")} == {2}
    assert torch.equal(found["logits"], model(tokens).logits)
    assert torch.equal(found["layer_outputs"][0], model(tokens, output_hidden_states=True).hidden_states[1])
    assert torch.equal(found["final_hidden_states"], model.model(tokens).last_hidden_state)
