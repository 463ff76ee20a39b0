"""The language models inside transformers: Auto classes, files, generation, half precision, compilers."""

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.phase2 import Phase2Block, Phase2Model
from so8t_torch.models.states import RecurrentCache, state_bytes

VOCAB, LENGTH = 23, 11
SMALL = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_seq": 8, "dropout": 0.0}
PHASE_2 = {"num_heads": 2, "head_dim": 4, "memory_chunk": 4, "snr_threshold": 0.8}
MODELS = {
    "phase 1": lambda **more: create_phase1_model(**SMALL | {"htt_rank": 3, "ar_ssm_max_rank": 4} | more, seed=1),
    "phase 2": lambda **more: create_phase2_model(**SMALL | PHASE_2 | more, seed=1),
}
both = pytest.mark.parametrize("name", MODELS)


def built(name="phase 2", **more):
    return MODELS[name](**more).eval()


def ids(rows=2, length=LENGTH, seed=0):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, tokens, count):
    """Return tokens and the most likely ones after them, each from a run over all before it."""
    for _ in range(count):
        logits = model(tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


@both
@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_files_and_auto_classes(name, tied, tmp_path):
    model = built(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
        assert type(loaded) is type(model)
        assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
        torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits)
    body = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(body(ids()).last_hidden_state, model.model(ids()).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(half(ids()).logits, copy.deepcopy(model).bfloat16()(ids()).logits)


@torch.no_grad()
def test_a_file_without_some_weights_leaves_the_others_alone(tmp_path):
    built().save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, adaptive_time_step=True, output_loading_info=True)
    assert {name.split(".", 3)[-1] for name in report["missing_keys"]} == {
        "memory.time_step.weight",
        "memory.time_step.bias",
    }
    steps = loaded.model.layers[0].memory.time_step
    torch.testing.assert_close(torch.nn.functional.softplus(steps.bias), torch.ones(2))
    given = built().state_dict()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in given.items())


@both
@torch.no_grad()
def test_generation_is_what_runs_over_all_tokens_give(name):
    model, tokens = built(name), ids()
    wanted = greedy(model, tokens, 7)
    assert torch.equal(model.generate(tokens, max_new_tokens=7, do_sample=False), wanted)
    assert torch.equal(model.generate(tokens, max_new_tokens=7, do_sample=False, use_cache=False), wanted)
    pieces = model.generate(tokens, max_new_tokens=7, do_sample=False, prefill_chunk_size=3)
    assert torch.equal(pieces, wanted)


@both
@torch.no_grad()
def test_rows_of_a_padded_batch_generate_as_alone(name):
    model = built(name)
    rows = [ids(1, length, seed=length) for length in (3, 9, 6)]
    tokens, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, 9 - row.shape[1] :], mask[number, 9 - row.shape[1] :] = row[0], 1
    found = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for number, row in enumerate(rows):
        assert torch.equal(found[number, 9:], greedy(model, row, 6)[0, row.shape[1] :])


@both
@torch.no_grad()
def test_a_conversation_continues_from_its_cache(name):
    model, tokens = built(name), ids(1)
    cache = RecurrentCache(model.config)
    first = model.generate(tokens, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert cache.get_seq_length() == first.shape[1] - 1
    longer = torch.cat([first, ids(1, 3, seed=2)], 1)
    found = model.generate(longer, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, greedy(model, longer, 5))


@both
@torch.no_grad()
def test_beams_sampling_and_a_state_that_does_not_grow(name):
    model, tokens = built(name), ids(1)
    beams = model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False)
    uncached = model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, uncached)
    torch.manual_seed(0)
    assert model.generate(tokens, max_new_tokens=4, do_sample=True, num_return_sequences=2).shape == (2, LENGTH + 4)
    sizes = {state_bytes(model(ids(1, length), use_cache=True).past_key_values) for length in (1, 5, 200)}
    assert len(sizes) == 1


@torch.no_grad()
def test_a_cache_of_the_library_serves_as_well_and_can_be_emptied():
    model, tokens = built(), ids()
    wanted = model(tokens, use_cache=True)
    cache = DynamicCache(config=model.config)
    for _ in range(2):
        model(tokens[:, :4], past_key_values=cache, use_cache=True)
        last = model(tokens[:, 4:], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(last.logits, wanted.logits[:, 4:], rtol=1e-4, atol=1e-5)
        cache.reset()
    bytes_of_rows = 2 * (2 * (2 * 2 + 3 * 16 + 2 * 4 * 4 + 2 * 2) * 4 + 8)
    assert state_bytes(wanted.past_key_values) == bytes_of_rows


@both
def test_the_loss_is_that_of_the_logits(name):
    model, tokens = built(name, ar_ssm_l1_regularization=0.0) if name == "phase 1" else built(name), ids()
    labels = torch.where(tokens > 4, tokens, -100)
    out = model(tokens, labels=labels)
    flat, wanted = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(flat, wanted))
    total = torch.nn.functional.cross_entropy(flat, wanted, reduction="sum")
    torch.testing.assert_close(model(tokens, labels=labels, num_items_in_batch=17).loss, total / 17)
    bare = model(tokens, labels=labels, skip_logits=True)
    assert bare.logits is None
    torch.testing.assert_close(bare.loss, out.loss)
    kept = model(tokens, labels=labels, logits_to_keep=3)
    torch.testing.assert_close(kept.logits, out.logits[:, -3:])
    torch.testing.assert_close(kept.loss, out.loss)
    assert out.past_key_values is None


@both
def test_what_blocks_add_to_the_loss_is_divided_over_the_parts_of_a_batch(name):
    model, tokens = built(name), ids()
    plain = model(tokens, labels=tokens)
    parts = [model(tokens[row : row + 1], labels=tokens[row : row + 1], num_items_in_batch=20).loss for row in (0, 1)]
    torch.testing.assert_close(sum(parts), plain.loss)
    assert (plain.aux_loss is not None) is (name == "phase 1")


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(name, dtype):
    # small rows: none of these heads reads so little that rounding takes its sign, which a norm would then magnify
    start = {"initializer_range": 0.02} | ({"use_zeta_init": True} if name == "phase 2" else {})
    exact, tokens = built(name, **start), ids()
    wanted = exact(tokens).logits.detach()
    half = copy.deepcopy(exact).to(dtype)
    found = half(tokens, use_cache=True)
    assert found.logits.dtype == dtype
    torch.testing.assert_close(found.logits.float(), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
    carried = [state for layer in found.past_key_values.layers for state in layer.recurrent_states.values()]
    assert torch.float32 in {state.dtype for state in carried if state is not None}
    model = copy.deepcopy(exact).train()
    with torch.autocast("cpu", dtype=dtype):
        out = model(tokens, labels=tokens)
    out.loss.backward()
    torch.testing.assert_close(out.logits.float(), wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_probabilities_reach_the_head_through_a_scaled_loss(dtype, whole):
    """Every token has the logits 0, and −17 for the last id: p ≈ 2e-9, which float16 does not know."""
    model, scale = built().train(), 2.0**14
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.model.norm.bias.copy_(torch.eye(SMALL["d_model"])[0])
        model.lm_head.weight.zero_()[-1, 0] = -17.0
    labels = torch.tensor([[1, 2, 3]])
    scores = model.lm_head.weight.detach()[:, 0].double().expand(2, -1).clone().requires_grad_()
    torch.nn.functional.cross_entropy(scores, labels[0, 1:]).backward()
    wanted = scores.grad.sum(0)
    assert 0 < wanted[-1] < 3e-8
    model = model.to(dtype) if whole else model
    with torch.autocast("cpu", dtype=dtype, enabled=not whole):
        loss = model(labels, labels=labels, skip_logits=True).loss
    (scale * loss.float()).backward()
    found = model.lm_head.weight.grad[:, 0].double() / scale
    torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=0)


@both
def test_checkpointing_runs_every_block_again_and_changes_no_gradient(name):
    runs = []
    gradients = []
    for checkpointed in (False, True):
        model = built(name).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        count = [0]
        for block in model.model.layers:
            norm = block.ffn_norm
            norm.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        model(ids(), labels=ids()).loss.backward()
        runs.append(count[0])
        gradients.append([p.grad for p in model.parameters()])
    assert runs == [2, 4]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@both
@pytest.mark.slow
def test_training_compiles_to_one_graph(name):
    model, tokens = built(name, n_layers=1).train(), ids(length=6)
    plain = model(tokens, labels=tokens)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(tokens, labels=tokens)
    torch.testing.assert_close(out.loss, plain.loss)
    out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain.loss.backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-4, atol=1e-6)


@both
@torch.no_grad()
def test_the_stream_before_blocks_is_returned_when_asked(name):
    model, tokens = built(name), ids()
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], model.model(tokens).last_hidden_state)
    row = model(tokens, return_dict=False)
    assert isinstance(row, tuple)
    assert torch.equal(row[0], out.logits)


WRONG = {
    "no token": (ShapeError, "at least one row and one token", {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}),
    "one axis": (ShapeError, r"got \(3,\)", {"input_ids": torch.zeros(3, dtype=torch.int64)}),
    "ids with fractions": (DomainError, "integer dtype", {"input_ids": torch.zeros(1, 3)}),
    "an id that is none": (DomainError, r"ids in \[0, 23\), got 23", {"input_ids": torch.full((1, 3), VOCAB)}),
    "nothing": (ConfigError, "neither", {}),
    "both": (ConfigError, "both", {"input_ids": ids(), "inputs_embeds": torch.zeros(2, LENGTH, 16)}),
    "width": (ShapeError, r"\(B, N, 16\)", {"inputs_embeds": torch.zeros(2, 3, 5)}),
    "mask": (ShapeError, "attention_mask", {"input_ids": ids(), "attention_mask": torch.ones(2, 3)}),
    "pairs": (ShapeError, "no mask between pairs", {"input_ids": ids(), "attention_mask": torch.ones(2, 1, 11, 11)}),
    "segments": (ShapeError, "segment_ids", {"input_ids": ids(), "segment_ids": torch.zeros(3, dtype=torch.int64)}),
    "segments with fractions": (DomainError, "whole", {"input_ids": ids(), "segment_ids": torch.zeros(LENGTH)}),
    "labels": (ShapeError, "labels", {"input_ids": ids(), "labels": ids()[:, :4]}),
    "labels with fractions": (DomainError, "integer dtype", {"input_ids": ids(), "labels": ids().float()}),
    "a label that is none": (
        DomainError,
        r"labels in \[0, 23\), .* got 23",
        {"input_ids": ids(), "labels": ids() * 0 + VOCAB},
    ),
    "a label below": (DomainError, "got -1;", {"input_ids": ids(), "labels": ids() * 0 - 1}),
    "word": (ConfigError, "'all'", {"input_ids": ids(), "diagnostics": "all"}),
    "argument": (ConfigError, "attention_maks", {"input_ids": ids(), "attention_maks": torch.ones(2, LENGTH)}),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True, "embedding": "tt", "htt_rank": 3}])
def test_what_makes_no_sense_is_refused(case, more):
    error, text, given = WRONG[case]
    with pytest.raises(error, match=text):
        built(**more)(**given)


@pytest.mark.parametrize("skip", [False, True])
def test_labels_are_whole_numbers_of_any_size_and_the_first_one_says_nothing(skip):
    model, labels = built(), ids()
    wanted = model(labels, labels=labels).loss
    torch.testing.assert_close(model(labels, labels=labels.int(), skip_logits=skip).loss, wanted)
    labels = labels.clone()
    labels[:, 0] = VOCAB
    torch.testing.assert_close(model(ids(), labels=labels, skip_logits=skip).loss, wanted)
    labels[:, 1] = VOCAB
    with pytest.raises(DomainError, match="got 23;"):
        model(ids(), labels=labels, skip_logits=skip)


@torch.no_grad()
def test_caches_of_others_are_refused():
    model = built()
    cache = model(ids(2), use_cache=True).past_key_values
    with pytest.raises(ShapeError, match="cache of 3 rows"):
        model(ids(3), past_key_values=cache)
    with pytest.raises(ConfigError, match="RecurrentCache"):
        model(ids(2), past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match="another model"):
        built(feedback_enabled=True)(ids(2), past_key_values=cache)
    with pytest.raises(ConfigError, match="cache_implementation"):
        model.generate(ids(), generation_config=GenerationConfig(max_new_tokens=2, cache_implementation="static"))


def test_an_encoder_has_no_head_and_no_cache():
    config = built().config.replace(is_encoder=True, bk_mode="full")
    with pytest.raises(ConfigError, match="is_encoder false"):
        AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="no cache"):
        Phase2Model(config)(ids(), use_cache=True)


def test_blocks_carry_what_they_say():
    block = Phase2Block(built(feedback_enabled=True).config)
    assert block.state_names == ("chain", "conv", "memory", "excess", "shift")
    assert not any(state.any() for state in block.initial_state(3, torch.device("cpu"), torch.float32).values())


@torch.no_grad()
@pytest.mark.slow
def test_a_step_of_generation_compiles_to_one_graph():
    model, tokens = built(n_layers=1), ids()
    plain, cache = model(tokens, use_cache=True).past_key_values, model(tokens, use_cache=True).past_key_values
    torch.compiler.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for place in range(3):
        token = tokens[:, place : place + 1]
        wanted = model(token, past_key_values=plain, use_cache=True).logits
        torch.testing.assert_close(step(token, past_key_values=cache, use_cache=True).logits, wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("phase", [1, 2])
def test_logits_begin_with_unit_variance_at_any_width(phase, train, tied):
    for width in (32, 128):
        sizes = {"vocab_size": 400, "d_model": width, "n_layers": 2, "n_seq": 16, "seed": 0}
        if phase == 1:
            model = create_phase1_model(**sizes, htt_enabled=train, tie_word_embeddings=tied)
        else:
            heads = {"num_heads": 2, "head_dim": 16, "embedding": "tt" if train else "dense"}
            model = create_phase2_model(**sizes, **heads, tie_word_embeddings=tied)
        with torch.no_grad():
            spread = model.eval()(input_ids=torch.arange(16)[None]).logits.std()
        assert 0.75 < spread < 1.35
