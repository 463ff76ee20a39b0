"""Weights of 8 and 4 bits: which maps they take, what they cost on a text, and that states stay what they were."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import so8t_torch.models.slots
from so8t_torch.adapter.quantized import dequantize, quantization
from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.quantization import quantization_cost
from so8t_torch.models.slots import SlotPool

pytest.importorskip("bitsandbytes")

SMALL = {"vocab_size": 256, "d_model": 64, "n_layers": 2, "n_seq": 64, "dropout": 0.0, "seed": 1}
MODELS = {
    "phase 1": lambda: create_phase1_model(**SMALL, htt_rank=8, ar_ssm_max_rank=8, ar_ssm_adaptive_time_step=True),
    "phase 2": lambda: create_phase2_model(
        **SMALL, num_heads=2, head_dim=32, adaptive_time_step=True, hebbian_eta_mode="token"
    ),
}
KINDS = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
MOST_NATS = {"int8": 0.01, "nf4": 0.1}
KEPT = {
    "phase 1": {"mixer.gate.0", "mixer.gate.2", "mixer.time_step"},
    "phase 2": {"bk.potential.projection", "bk_out", "memory.time_step", "memory.hebbian.eta_proj"},
}


def text():
    """Return rows of bytes of this package's own source."""
    source = Path(so8t_torch.models.slots.__file__).read_bytes()
    return torch.frombuffer(bytearray(source), dtype=torch.uint8)[: 64 * 120].long().reshape(-1, 64)


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    """A model that has learned something of the text, and its folder."""
    model, rows = MODELS[request.param](), text()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(24):
        batch = rows[step * 4 % 96 :][:4]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    model.eval().save_pretrained(folder)
    return request.param, model, folder


def quantised(folder, kind, **more):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**KINDS[kind], **more))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_costs_little_more_and_rates_stay(trained, kind):
    name, plain, folder = trained
    model = quantised(folder, kind)
    found = {n: quantization(m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    kept = {n for n, k in found.items() if k == "none"}
    assert kept == {f"model.layers.{b}.{n}" for b in range(2) for n in KEPT[name]} | ({"lm_head"} & found.keys())
    assert set(found.values()) == {"none", kind}
    weights = plain.state_dict()
    assert all(torch.equal(weights[f"{n}.weight"], model.get_submodule(n).weight) for n in kept)
    cost = quantization_cost(plain, model, text()[100:])
    assert cost.plain < 4.5 < torch.log(torch.tensor(256.0))
    assert cost.quantised != cost.plain
    assert abs(cost.nats) < MOST_NATS[kind]
    assert cost.quantised_bytes < cost.plain_bytes
    assert f"({cost.nats:+.4f}) on 1,260 tokens" in str(cost)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_weights_written_out(trained, kind):
    _, _, folder = trained
    model, written_out = quantised(folder, kind), quantised(folder, kind)
    dequantize(written_out, torch.float32)
    with torch.no_grad():
        found, wanted = model(text()[:2]).logits, written_out(text()[:2]).logits
    apart = (found - wanted).norm() / wanted.norm()
    # the activations of int8 products have 8 bits as well
    assert apart < {"int8": 0.02, "nf4": 1e-5}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_states_are_those_of_the_plain_model(trained, kind):
    _, plain, folder = trained
    pool, bare = SlotPool(quantised(folder, kind), 3), SlotPool(plain, 3)
    assert pool.bytes_per_slot == bare.bytes_per_slot
    tokens = text()[0]
    with torch.no_grad():
        wanted = [pool.model(tokens[None, :length], use_cache=False).logits[0, -1] for length in (6, 10)]
    slots = [pool.join(tokens[:length])[0] for length in (5, 9)]
    found = pool.step(slots, tokens[[5, 9]])
    for row, alone in zip(found, wanted, strict=True):
        assert (row - alone).norm() / alone.norm() < 0.02


def test_what_the_caller_leaves_out_stays_out_as_well(trained):
    name, _, folder = trained
    inner = {"phase 1": "ffn.down.1", "phase 2": "ffn.3"}[name]
    given = BitsAndBytesConfig(**KINDS["int8"], llm_int8_skip_modules=[inner])
    before = copy.deepcopy(given.to_dict())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=given)
    assert given.to_dict() == before
    kept = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and quantization(m) == "none"}
    assert kept >= {f"model.layers.0.{n}" for n in (*KEPT[name], inner)}


def test_quantised_weights_are_saved_and_read(trained, tmp_path):
    _, _, folder = trained
    model = quantised(folder, "nf4")
    with torch.no_grad():
        wanted = model(text()[:1]).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(text()[:1]).logits, wanted)


def test_models_that_do_not_compare_are_refused(trained):
    _, model, _ = trained
    with pytest.raises(ShapeError, match="2 tokens or more"):
        quantization_cost(model, model, text()[:, :1])
    with pytest.raises(ConfigError, match="evaluation mode"):
        quantization_cost(model, copy.deepcopy(model).train(), text())
