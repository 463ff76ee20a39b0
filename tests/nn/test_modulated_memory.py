"""The memory that is judged chunk by chunk, beside one that takes token after token and knows no runs."""

import math

import pytest
import torch

from so8t_torch.nn import modulated_memory as room
from so8t_torch.nn.hebbian import DissipativeHebbianLayer
from so8t_torch.nn.memory_resonance import MemoryResonanceLayer
from so8t_torch.nn.memory_selection import SNRMemoryFilter
from so8t_torch.nn.modulated_memory import MemoryState, ModulatedMemory, mark

WIDTH, HEADS, SIZE, CHUNK = 6, 2, 3, 4
ROUNDING = 1e-12


def memory(rule="hebb", *, snr=True, resonance=True, adaptive=False):
    torch.manual_seed(5)
    kind = {"dtype": torch.float64}
    layer = DissipativeHebbianLayer(WIDTH, HEADS, SIZE, eta=0.7, rule=rule, own_decay=False, dt=0.5, **kind)
    modes = MemoryResonanceLayer(SIZE, HEADS, 0.8, gate_init=1.0, **kind) if resonance else None
    noise = SNRMemoryFilter(0.8, 3.0, 2.0) if snr else None
    return ModulatedMemory(layer, noise, modes, chunk=CHUNK, adaptive_time_step=adaptive, **kind)


def drawn(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64)
    return x, 0.3 * torch.rand(rows, length, HEADS, generator=generator, dtype=torch.float64)


def zeros(rows):
    return MemoryState(
        torch.zeros(rows, HEADS, SIZE, SIZE, dtype=torch.float64), torch.zeros(rows, HEADS, 2, dtype=torch.float64)
    )


def token_by_token(module, x, gamma, positions):
    """Return what the tokens of one document row read, by the formulas, and the last state."""
    layer, weights, read = module.hebbian, torch.zeros(HEADS, SIZE, SIZE, dtype=torch.float64), []
    excess = torch.zeros(HEADS, 2, dtype=torch.float64)
    for token, rates, position in zip(x, gamma, positions, strict=True):
        if position == 0:
            weights, excess = torch.zeros_like(weights), torch.zeros_like(excess)
        elif position % CHUNK == 0:
            if module.snr is not None:
                one = torch.ones(1, 1, HEADS, dtype=torch.float64)
                found = module.snr(weights[None], one, one)
                excess = torch.stack([found.decay[0, 0], found.eta[0, 0]], -1) - 1
            if module.resonance is not None:
                weights = module.resonance(weights[None])[0][0]
        q, k, v = (p(token).reshape(HEADS, SIZE) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        step = torch.ones(HEADS, dtype=torch.float64)
        if module.time_step is not None:
            step = torch.log1p(torch.exp(module.time_step(token)))
        decay = rates * layer.dt * step * (1 + excess[:, 0])
        eta = layer.eta * layer.dt * step * (1 + excess[:, 1]) * -torch.expm1(-decay) / decay
        faded = torch.exp(-decay)[:, None, None] * weights
        k = k / k.norm(dim=-1, keepdim=True)
        written = v - torch.einsum("hkv,hk->hv", faded, k) if layer.rule == "delta" else v
        weights = faded + eta[:, None, None] * k[:, :, None] * written[:, None, :]
        read.append(torch.einsum("hkv,hk->hv", weights, q) / math.sqrt(SIZE))
    return layer.output(torch.stack(read)[None])[0], weights, excess


VARIANTS = {
    "hebb": {},
    "delta": {"rule": "delta"},
    "noise alone": {"resonance": False},
    "modes alone": {"snr": False},
    "neither": {"snr": False, "resonance": False},
    "own steps": {"adaptive": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 4, 19])
def test_runs_are_what_tokens_one_by_one_are(variant, length):
    module, (x, gamma) = memory(**VARIANTS[variant]), drawn(2, length)
    positions = torch.arange(length).expand(2, -1)
    y, state, _ = module(x, gamma, zeros(2), mark(positions, CHUNK, fresh=True))
    for row in range(2):
        wanted, weights, excess = token_by_token(module, x[row], gamma[row], positions[row])
        torch.testing.assert_close(y[row], wanted, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(state.weights[row], weights, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(state.excess[row], excess, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first", [1, 4, 7])
def test_a_call_may_begin_anywhere_inside_a_chunk(variant, first):
    module, (x, gamma) = memory(**VARIANTS[variant]), drawn(1, 17)
    state, parts = zeros(1), []
    for places in (slice(0, first), slice(first, first + 1), slice(first + 1, 17)):
        marks = mark(torch.arange(17)[None, places], CHUNK)
        y, state, _ = module(x[:, places], gamma[:, places], state, marks)
        parts.append(y)
    wanted, weights, excess = token_by_token(module, x[0], gamma[0], range(17))
    torch.testing.assert_close(torch.cat(parts, 1)[0], wanted, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(state.weights[0], weights, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(state.excess[0], excess, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_and_padding_of_rows_that_differ(variant):
    module, (x, gamma) = memory(**VARIANTS[variant]), drawn(3, 16)
    lengths = ((16,), (5, 4, 4), (1, 9))
    positions = torch.zeros(3, 16, dtype=torch.int64)
    documents, real = torch.zeros_like(positions), torch.zeros(3, 16, dtype=torch.bool)
    for row, parts in enumerate(lengths):
        count = sum(parts)
        positions[row, :count] = torch.cat([torch.arange(n) for n in parts])
        documents[row, :count] = torch.cat([torch.full((n,), i) for i, n in enumerate(parts)])
        documents[row, count:], real[row, :count] = len(parts) - 1, True
    x[~real] = torch.nan
    y, state, _ = module(x, gamma, zeros(3), mark(positions, CHUNK, real=real, documents=documents, fresh=True))
    for row, parts in enumerate(lengths):
        count = sum(parts)
        wanted, weights, _ = token_by_token(module, x[row, :count], gamma[row, :count], positions[row, :count])
        torch.testing.assert_close(y[row, :count], wanted, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(state.weights[row], weights, rtol=0, atol=ROUNDING)


def test_what_a_chunk_works_with_depends_on_the_chunks_before():
    module, (x, gamma) = memory(), drawn(1, 8)
    marks = mark(torch.arange(8)[None], CHUNK, fresh=True)
    _, _, worked = module(x, gamma, zeros(1), marks)
    plain = gamma * module.hebbian.dt
    assert torch.equal(worked["decay"][:, :CHUNK], plain[:, :CHUNK])
    assert (worked["decay"][:, CHUNK:] > plain[:, CHUNK:]).all()
    x[:, 1] += 1.0
    assert not torch.equal(module(x, gamma, zeros(1), marks)[2]["decay"][:, CHUNK:], worked["decay"][:, CHUNK:])


def test_the_books_balance_in_every_run():
    module, (x, gamma) = memory(), drawn(2, 11)
    _, state, worked = module(x, gamma, zeros(2), mark(torch.arange(11).expand(2, -1), CHUNK), monitored=True)
    change = worked["energy"] - worked["entering"]
    torch.testing.assert_close(change, worked["supply"] - worked["dissipation"], rtol=0, atol=ROUNDING)
    torch.testing.assert_close(worked["energy"][:, -1], state.weights.square().sum((-2, -1)) / 2, rtol=0, atol=ROUNDING)
    assert worked["within_bound"].all()
    # where a chunk begins, the state that enters is the one whose faint modes have faded
    assert (worked["entering"][:, CHUNK] < worked["energy"][:, CHUNK - 1]).all()


def counted(module, name, monkeypatch):
    """Return a list that grows by what a method is given with every call of it."""
    calls, method = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(given) or method(*given))
    return calls


@pytest.mark.parametrize("first", [0, 3, 4, 5])
def test_rows_that_stand_alike_are_judged_once_a_chunk_and_gone_through_once(first, monkeypatch):
    module, (x, gamma) = memory(), drawn(2, 17)
    judged, gone = counted(module, "judge", monkeypatch), counted(module, "_recur", monkeypatch)
    positions = torch.arange(17).expand(2, -1)
    module(x[:, first:], gamma[:, first:], zeros(2), mark(positions[:, first:], CHUNK, fresh=not first))
    turns = [place for place in (4, 8, 12, 16) if place >= first]
    assert len(judged) == len(turns)
    assert sum(tokens.v.shape[1] for tokens, *_ in gone) == 17 - first


def test_tokens_that_come_singly_are_judged_where_a_chunk_begins(monkeypatch):
    module, (x, gamma) = memory(), drawn(1, 9)
    judged, state = counted(module, "judge", monkeypatch), zeros(1)
    for place in range(9):
        one = slice(place, place + 1)
        _, state, _ = module(x[:, one], gamma[:, one], state, mark(torch.tensor([[place]]), CHUNK))
    assert len(judged) == 2


CALLS = {
    "rows that begin": ({"fresh": True}, 0),
    "rows that begin, with padding": ({"fresh": True, "real": torch.arange(13) < torch.tensor([[13], [9]])}, 0),
    "rows that go on": ({}, 1),
    "rows that go on where nobody wants to know": ({"looking": False}, 0),
    "rows of documents": ({"documents": torch.arange(13).expand(2, -1) // 5}, 0),
}


@pytest.mark.parametrize("length", [1, 13])
@pytest.mark.parametrize("name", CALLS)
def test_marks_wait_for_a_device_once_or_not_at_all(name, length, monkeypatch):
    given, most = CALLS[name]
    if name == "rows of documents":
        most = 1 if length == 1 else 0
    waited = []
    monkeypatch.setattr(room, "readable", lambda *_, waiting=False: waited.append(waiting) or True)
    given = {key: part[:, :length] if isinstance(part, torch.Tensor) else part for key, part in given.items()}
    module, (x, gamma) = memory(), drawn(2, length)
    places = torch.arange(13).expand(2, -1) % 5 if "documents" in given else torch.arange(13).expand(2, -1)
    module(x, gamma, zeros(2), mark(places[:, :length], CHUNK, **given))
    assert sum(waited) == most


def test_tensors_without_data_are_judged_at_every_chunk(monkeypatch):
    module = memory().to("meta")
    judged = counted(module, "judge", monkeypatch)
    x, gamma = (part.to("meta") for part in drawn(2, 13))
    state = MemoryState(*(part.to("meta") for part in zeros(2)))
    module(x, gamma, state, mark(torch.empty(2, 13, dtype=torch.int64, device="meta"), CHUNK, fresh=True))
    assert len(judged) == 3
