"""Cores of 8 bits: rounded as said, used by rows and heads alike, and told what they cost."""

import copy

import pytest
import torch
from torch import nn

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.int8_tensor_train import Int8TTEmbedding, core_rounding, round_cores
from so8t_torch.nn.tensor_train_head import TensorTrainHead

KINDS = {
    "two cores": {"rank": 6},
    "three cores": {"rank": (4, 3), "num_cores": 3},
    "complex": {"rank": 4, "complex_cores": True, "emit": "pair"},
    "no phase": {"rank": 4, "phase_encoding": False, "padding_idx": 2},
}


def layer(kind, **more):
    torch.manual_seed(0)
    return HolographicTTEmbedding(97, 24, **KINDS[kind] | more)


def written_out(rounded, kind):
    """Return a plain layer with the rounded cores, each code times its scale in a loop of this test's own."""
    plain = layer(kind)
    with torch.no_grad():
        plain.phase_shift.copy_(rounded.phase_shift)
        for number, core in enumerate(plain.stored_cores(), start=1):
            codes, scales = getattr(rounded, f"codes{number}"), getattr(rounded, f"scales{number}")
            for i, p, q in torch.cartesian_prod(*map(torch.arange, core.shape[:3])).tolist():
                core[i, p, q] = codes[i, p, q] * scales[i, p, q].item()
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_entries_are_off_by_half_a_level_and_rows_are_those_of_the_cores(kind):
    plain = layer(kind)
    before = copy.deepcopy(plain.state_dict())
    rounded, ids = Int8TTEmbedding(plain), torch.arange(97)
    for number, core in enumerate(plain.stored_cores(), start=1):
        codes, scales = getattr(rounded, f"codes{number}"), getattr(rounded, f"scales{number}")
        assert codes.dtype == torch.int8
        flat = core.flatten(3)
        torch.testing.assert_close(scales.flatten(), flat.abs().amax(-1).flatten() / 127)
        assert bool((codes.flatten(3).abs().amax(-1) == 127).all())
        off = (flat - (codes * scales).flatten(3)).abs()
        assert bool((off <= scales.flatten(3) * 0.5001).all())
        assert bool(off.any())
    torch.testing.assert_close(rounded(ids), written_out(rounded, kind)(ids))
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert not list(rounded.parameters())


@pytest.mark.parametrize("kind", ["two cores", "three cores"])
def test_the_head_takes_the_same_cores(kind):
    rounded = Int8TTEmbedding(layer(kind))
    found, wanted = TensorTrainHead(rounded), TensorTrainHead(written_out(rounded, kind))
    hidden, labels = torch.randn(5, 24), torch.randint(97, (5,))
    torch.testing.assert_close(found(hidden), wanted(hidden))
    torch.testing.assert_close(found(hidden), hidden @ rounded.dense_table().T)
    torch.testing.assert_close(found.loss(hidden, labels), nn.functional.cross_entropy(wanted(hidden), labels))


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_is_that_of_the_tables(kind):
    plain = layer(kind)
    rounded = Int8TTEmbedding(plain)
    report = core_rounding(plain, rounded)
    tables = [part(torch.arange(97)).detach().double() for part in (plain, rounded)]
    apart = (tables[0] - tables[1]).norm(dim=1)
    assert report.relative_error == pytest.approx(float(apart.norm() / tables[0].norm()), rel=1e-6)
    assert report.worst_row == int(apart.argmax())
    assert report.worst_row_error == pytest.approx(float(apart.max() / tables[0].norm() * 97**0.5), rel=1e-6)
    assert 0 < report.relative_error < 0.02
    numbers = sum(core.numel() for core in plain.stored_cores())
    scales = sum(core[:, :, :, 0].numel() // (2 if plain.complex_cores else 1) for core in plain.stored_cores())
    rest = 4 * len(plain.phase_shift)
    assert (report.bytes_before, report.bytes_after) == (4 * numbers + rest, numbers + 4 * scales + rest)
    assert f"{report.bytes_after:,} bytes" in str(report)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_the_plain_layer_and_are_read_without_change(kind):
    rounded = Int8TTEmbedding(layer(kind))
    state = rounded.state_dict()
    plain = layer(kind)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(torch.arange(97)), rounded(torch.arange(97)))
    again = Int8TTEmbedding(layer(kind, init_scale=1.0))
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.buffers(), rounded.buffers(), strict=True))
    with pytest.raises(RuntimeError, match="core1"):
        again.load_state_dict({name: tensor for name, tensor in state.items() if name != "core1"})
    with pytest.raises(RuntimeError, match="expected"):
        again.load_state_dict(state | {"core2": state["core2"][1:]})


@torch.no_grad()
@pytest.mark.parametrize("make", [create_phase1_model, create_phase2_model])
def test_a_model_with_rounded_cores(make, tmp_path):
    more = {"embedding": "tt"} if make is create_phase2_model else {}
    model = make(vocab_size=97, d_model=24, n_layers=1, n_seq=8, dropout=0.0, htt_rank=6, seed=0, **more).eval()
    ids = torch.randint(97, (2, 9))
    plain = model(ids).logits
    report = round_cores(model)
    found = model(ids).logits
    apart = float((found - plain).norm() / plain.norm())
    assert 0 < apart < 0.05
    assert report.relative_error < 0.02
    assert report.bytes_after < 0.6 * report.bytes_before
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids).logits, found)
    with pytest.raises(ConfigError, match="got Int8TTEmbedding"):
        round_cores(model)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ConfigError, match="got Embedding"):
        round_cores(create_phase2_model(vocab_size=9, d_model=8, n_layers=1, num_heads=2, head_dim=4))
    broken = layer("two cores")
    with torch.no_grad():
        broken.core2[0, 0, 0, 0] = torch.nan
    with pytest.raises(DomainError, match="finite"):
        Int8TTEmbedding(broken)
    with pytest.raises(ConfigError, match="from a plain layer"):
        Int8TTEmbedding(layer("two cores")).reset_parameters()


def test_a_slice_of_zeros_stays_zero():
    plain = layer("two cores")
    with torch.no_grad():
        plain.core1.zero_()
    assert not Int8TTEmbedding(plain)(torch.arange(97)).any()
