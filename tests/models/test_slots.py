"""Slots: sequences that join and leave at random are written as alone, and a failing call changes none."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.slots import SlotPool
from so8t_torch.models.states import RecurrentCache, state_bytes

VOCAB, SLOTS = 23, 4
SMALL = {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_seq": 8, "dropout": 0.0, "seed": 1}
PHASE_2 = {"num_heads": 2, "head_dim": 4, "memory_chunk": 4, "snr_threshold": 0.8}
MODELS = {
    "phase 1": lambda **more: create_phase1_model(**SMALL | {"htt_rank": 3, "ar_ssm_max_rank": 4} | more),
    "phase 1 complex": lambda: create_phase1_model(**SMALL, htt_rank=3, ar_ssm_max_rank=4, ar_ssm_complex=True),
    "phase 2": lambda **more: create_phase2_model(**SMALL | PHASE_2 | more),
    "phase 2 feedback": lambda: create_phase2_model(**SMALL | PHASE_2, feedback_enabled=True, adaptive_time_step=True),
}
every = pytest.mark.parametrize("name", MODELS)


def built(name="phase 2", **more):
    return MODELS[name](**more).eval()


def drawn(count, seed):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def alone(model, tokens):
    """Return the logits after the last token, from a run over all of them without a state."""
    return model(torch.as_tensor(tokens)[None], use_cache=False).logits[0, -1].detach()


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@every
def test_sequences_that_come_and_go_are_written_as_alone(name):
    model, dice = built(name), torch.Generator().manual_seed(3)
    pool, written, parked = SlotPool(model, SLOTS), {}, []

    def throw(sides):
        return int(torch.randint(sides, (), generator=dice))

    seen = dict.fromkeys(("join", "step", "leave", "evict", "resume", "reorder"), 0)
    for turn in range(48):
        move = ("join", "step", "step", "step", "leave", "evict", "resume", "reorder")[throw(8)]
        if (move in ("join", "resume") and not pool.free) or (move not in ("join", "resume") and not pool.live):
            continue
        if move == "join":
            prompt = drawn(1 + throw(11), turn)
            slot, logits = pool.join(prompt, piece=(None, 1, 4)[throw(3)])
            written[slot] = prompt.tolist()
            close(logits, alone(model, prompt))
        elif move == "step":
            slots = [slot for slot in pool.live if throw(4)] or [pool.live[0]]
            tokens = drawn(len(slots), turn)
            for slot, token, logits in zip(slots, tokens.tolist(), pool.step(slots, tokens), strict=True):
                written[slot].append(token)
                close(logits, alone(model, written[slot]))
        elif move == "leave":
            slot = pool.live[throw(len(pool.live))]
            pool.leave(slot)
            del written[slot]
        elif move == "evict":
            slot = pool.live[throw(len(pool.live))]
            parked.append((pool.evict(slot), written.pop(slot)))
        elif move == "resume" and parked:
            state, tokens = parked.pop(throw(len(parked)))
            written[pool.resume(state)] = tokens
        elif move == "reorder":
            sources = {throw(SLOTS): pool.live[throw(len(pool.live))] for _ in range(2)}
            pool.reorder(sources)
            before = {slot: list(tokens) for slot, tokens in written.items()}
            written |= {slot: list(before[source]) for slot, source in sources.items()}
        seen[move] += 1
        assert set(pool.live) == set(written)
        assert sorted(pool.live + pool.free) == list(range(SLOTS))
    assert all(seen.values())


def test_a_prompt_is_read_alone_and_each_token_once():
    model, shapes = built(), []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: shapes.append(tuple(given[0].shape)))
    pool = SlotPool(model, SLOTS)
    slots = [pool.join(drawn(length, length))[0] for length in (5, 3)]
    pool.step(slots, [1, 2])
    slots.append(pool.join(drawn(7, 0))[0])
    pool.step(slots, [3, 4, 5])
    pool.leave(slots[0])
    pool.step(slots[1:], [6, 7])
    assert shapes == [(1, 5), (1, 3), (2, 1), (1, 7), (3, 1), (2, 1)]


@every
def test_the_bytes_of_a_slot_are_those_of_a_state(name):
    model = built(name)
    pool = SlotPool(model, SLOTS)
    slot, _ = pool.join(drawn(7, 0))
    cache = RecurrentCache(model.config)
    model(drawn(30, 1)[None], past_key_values=cache, use_cache=True)
    assert pool.bytes_per_slot == state_bytes(cache) == pool.evict(slot).bytes
    assert f"0 of 4 slots, {pool.bytes_per_slot:,} bytes each" in str(pool)


@pytest.mark.parametrize("name", ["phase 1", "phase 2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_carried_as_the_model_carries_them(name, dtype):
    model = built(name).to(dtype)
    pool, tokens = SlotPool(model, 2), drawn(9, 4)
    slot, _ = pool.join(tokens[:6])
    cache = RecurrentCache(model.config)
    with torch.no_grad():
        model(tokens[None, :6], past_key_values=cache, use_cache=True)
        for token in tokens[6:]:
            wanted = model(token.reshape(1, 1), past_key_values=cache, use_cache=True).logits[0]
            assert torch.equal(pool.step([slot], token[None]), wanted)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = built()
    pool = SlotPool(model, 2)
    first, _ = pool.join([1, 2, 3])
    second, _ = pool.join([4])
    for call, error, text in (
        (lambda: pool.join([1]), ConfigError, "all 2 taken; leave or evict"),
        (lambda: pool.step([first, 7], [1, 1]), ConfigError, r"expected live slots \(0, 1\), got 7"),
        (lambda: pool.step([], []), ConfigError, "got none"),
        (lambda: pool.step([first, first], [1, 1]), ConfigError, "each slot once"),
        (lambda: pool.step([first, second], [1]), ShapeError, "one token for each of 2 slots"),
        (lambda: pool.step([first, second], [1, VOCAB]), DomainError, "expected ids in"),
        (lambda: pool.step([first], [0.5]), DomainError, "integer dtype"),
        (lambda: pool.leave(5), ConfigError, "got 5"),
        (lambda: pool.evict(-1), ConfigError, "got -1"),
        (lambda: pool.reorder({2: first}), ConfigError, r"slots in \[0, 2\), got 2"),
        (lambda: pool.reorder({0: 3}), ConfigError, "got 3"),
    ):
        with pytest.raises(error, match=text):
            call()
    pool.leave(second)
    for prompt, error in (([], ShapeError), ([[1]], ShapeError), ([VOCAB], DomainError), ([-1], DomainError)):
        with pytest.raises(error):
            pool.join(prompt)
    with pytest.raises(ConfigError, match="at least 1 token"):
        pool.join([1], piece=0)
    assert pool.live == (first,)
    close(pool.step([first], [5])[0], alone(model, [1, 2, 3, 5]))


def test_a_step_that_breaks_off_leaves_all_slots_as_they_were(monkeypatch):
    model = built()
    pool = SlotPool(model, 2)
    slot, _ = pool.join([1, 2, 3])
    with monkeypatch.context() as broken:

        def fail(*_, **__):
            raise MemoryError

        broken.setattr(model.model.layers[1], "forward", fail)
        with pytest.raises(MemoryError):
            pool.step([slot], [9])
        with pytest.raises(MemoryError):
            pool.join([9])
    assert pool.live == (slot,)
    close(pool.step([slot], [5])[0], alone(model, [1, 2, 3, 5]))


def test_a_slot_that_was_left_begins_anew():
    model = built()
    pool = SlotPool(model, 1)
    pool.leave(pool.join(drawn(9, 0))[0])
    slot, _ = pool.join([3])
    close(pool.step([slot], [4])[0], alone(model, [3, 4]))


def test_a_foreign_model_or_state_is_refused():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    with pytest.raises(ConfigError, match="got LlamaForCausalLM"):
        SlotPool(llama, 2)
    for count in (0, True, 1.0):
        with pytest.raises(ConfigError, match="at least 1 slot"):
            SlotPool(built(), count)
    pool, twin = SlotPool(built(), 1), SlotPool(built(), 1)
    parked = pool.evict(pool.join([1, 2])[0])
    with pytest.raises(ConfigError, match="of another model"):
        twin.resume(parked)
    with pytest.raises(ConfigError, match="what evict returned, got dict"):
        pool.resume({})
    assert pool.resume(parked) == 0
    with pytest.raises(ConfigError, match="all 1 taken"):
        pool.resume(parked)
    pool.model.train()
    with pytest.raises(ConfigError, match=r"model\.eval"):
        pool.step([0], [1])
