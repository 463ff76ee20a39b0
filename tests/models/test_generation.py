"""Generation as the library offers it: beams, padding of every length, long prompts, half precision, foreign caches."""

import copy

import pytest
import torch

from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.states import read_positions

VOCAB, COUNT = 23, 6
SMALL = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_seq": 8, "dropout": 0.0}
PHASE_2 = {"num_heads": 2, "head_dim": 4, "memory_chunk": 4, "snr_threshold": 0.8}
MODELS = {
    "phase 1": lambda **more: create_phase1_model(**SMALL | {"htt_rank": 3, "ar_ssm_max_rank": 4} | more, seed=1),
    "phase 2": lambda **more: create_phase2_model(**SMALL | PHASE_2 | more, seed=1),
    "feedback": lambda **more: create_phase2_model(**SMALL | PHASE_2 | {"feedback_enabled": True} | more, seed=1),
}
every_model = pytest.mark.parametrize("name", MODELS)


def built(name, **more):
    return MODELS[name](**more).eval()


def ids(rows, length, seed=0):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def written(model, tokens, **options):
    return model.generate(tokens, **{"max_new_tokens": COUNT, "do_sample": False} | options)


@every_model
@torch.no_grad()
def test_beams_are_those_of_runs_over_all_tokens(name):
    model, tokens = built(name), ids(2, 5)
    options = {"num_beams": 4, "num_return_sequences": 3, "eos_token_id": 7, "pad_token_id": 0}
    found = written(model, tokens, **options)
    assert len(found) == 6
    assert torch.equal(found, written(model, tokens, use_cache=False, **options))


@every_model
@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_a_batch_padded_by_every_length_is_written_as_its_rows_alone(name, beams):
    model, longest = built(name), 9
    rows = [ids(1, length, seed=length) for length in range(1, longest + 1)]
    tokens, mask = (torch.zeros(longest, longest, dtype=torch.int64) for _ in range(2))
    for number, row in enumerate(rows):
        tokens[number, longest - row.shape[1] :], mask[number, longest - row.shape[1] :] = row[0], 1
    found = written(model, tokens, attention_mask=mask, num_beams=beams)[:, longest:]
    for number, row in enumerate(rows):
        assert torch.equal(found[number], written(model, row, num_beams=beams)[0, row.shape[1] :])


@every_model
@torch.no_grad()
def test_a_prompt_may_be_longer_than_the_rows_of_training(name):
    more = {"position_embedding": "zeta"}
    for trained in (False, True):
        model = built(name, zeta_embedding_trainable=trained, **more)
        prompt = ids(1, 3 * model.config.n_seq)
        assert torch.equal(written(model, prompt), written(model, prompt, use_cache=False))


@every_model
@torch.no_grad()
def test_half_precision_vectors_instead_of_ids_and_a_single_token(name):
    model, tokens = built(name), ids(2, 5)
    half = copy.deepcopy(model).bfloat16()
    assert torch.equal(written(half, tokens), written(half, tokens, use_cache=False))
    vectors = model.get_input_embeddings()(tokens)
    assert torch.equal(model.generate(inputs_embeds=vectors, max_new_tokens=COUNT), written(model, tokens)[:, 5:])
    assert torch.equal(written(model, tokens, max_new_tokens=1), written(model, tokens)[:, :6])


REFUSED = {
    "an empty prompt": (ShapeError, "at least one row and one token", {"inputs": torch.zeros(1, 0, dtype=torch.int64)}),
    "an empty prompt that is padded": (
        ShapeError,
        "generate: expected prompts",
        {"inputs": torch.zeros(2, 0, dtype=torch.int64), "pad_token_id": 0},
    ),
    "no prompt in the batch": (ShapeError, "one row", {"inputs": torch.zeros(0, 3, dtype=torch.int64)}),
    "a prompt without rows": (ShapeError, r"got \(3,\)", {"inputs": torch.ones(3, dtype=torch.int64)}),
    "no token": (ValueError, "max_new_tokens", {"max_new_tokens": 0}),
    "guesses": (ValueError, "assisted generation is not supported", {"prompt_lookup_num_tokens": 3}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused(case):
    error, text, options = REFUSED[case]
    with pytest.raises(error, match=text):
        built("phase 2").generate(**{"inputs": ids(1, 5), "max_new_tokens": COUNT} | options)


@torch.no_grad()
def test_another_model_cannot_assist():
    model = built("phase 2")
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        written(model, ids(1, 5), assistant_model=copy.deepcopy(model))


FOREIGN = {
    "a part more": ("phase 2", lambda: built("feedback"), "chain, conv, memory, excess of block 0 alone, got 5"),
    "a part less": ("feedback", lambda: built("phase 2"), "hold shift of block 0"),
    "wider heads": (
        "phase 2",
        lambda: built("phase 2", head_dim=8),
        r"memory \(2, 4, 4\) in every row, got \(2, 8, 8\)",
    ),
    "fewer blocks": ("phase 2", lambda: built("phase 2", n_layers=1), "for block 1, got none"),
    "more channels": ("phase 1", lambda: built("phase 1", ar_ssm_max_rank=6), r"mixer \(4, 16\) in every row"),
    "another phase": ("phase 1", lambda: built("phase 2"), "another model"),
}


@pytest.mark.parametrize("case", FOREIGN)
@torch.no_grad()
def test_a_cache_of_another_model_is_refused(case):
    name, other, told = FOREIGN[case]
    cache = other()(ids(2, 5), use_cache=True).past_key_values
    with pytest.raises(ConfigError, match=told):
        built(name)(ids(2, 1), past_key_values=cache)


def test_what_is_no_cache_is_refused():
    with pytest.raises(ConfigError, match="got none in tuple; make the cache with RecurrentCache"):
        read_positions((), 2)
