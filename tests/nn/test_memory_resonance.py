"""The resonance layer: start near the identity, gradients, buffers, the report, and causality in a chunked memory."""

import pytest
import torch

from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.nn.memory_resonance import MemoryResonanceLayer, ZetaBasisTransform
from so8t_torch.nn.memory_selection import SNRMemoryFilter
from so8t_torch.ops import resonance, zeta


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def memory(k, v, q, decay, eta, resonance_layer, snr, chunk):
    """A fast-weight memory (B, T, H, D), token by token, that is filtered before every chunk but the first."""
    batch, length, heads, width = k.shape
    state = k.new_zeros(batch, heads, width, width)
    outputs = []
    for start in range(0, length, chunk):
        state, _ = resonance_layer(state)
        state, rate, strength, _ = snr(state, decay[:, start : start + chunk], eta[:, start : start + chunk])
        for t in range(start, min(start + chunk, length)):
            kept = torch.exp(-rate[:, t - start])[..., None, None] * state
            state = kept + strength[:, t - start, :, None, None] * k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1)


def sequence(dtype=torch.float32, length=12):
    k, v, q = (drawn(2, length, 3, 6, seed=s, dtype=dtype) for s in range(3))
    decay, eta = (drawn(2, length, 3, seed=s, dtype=dtype).abs() for s in (3, 4))
    return k, v, q, decay, eta


@pytest.mark.parametrize("edited", [1, 3, 4, 7, 11])
@pytest.mark.parametrize("value", [2.0, torch.inf, torch.nan])
def test_no_output_depends_on_a_later_token(edited, value):
    layer, snr = MemoryResonanceLayer(6, 3, gate_init=1.0, temperature=0.5), SNRMemoryFilter(cleanup=0.5)
    inputs = sequence()
    before = memory(*inputs, layer, snr, 4)
    for which in range(5):
        changed = [x.clone() for x in inputs]
        changed[which][:, edited] = value
        after = memory(*changed, layer, snr, 4)
        assert torch.equal(before[:, :edited], after[:, :edited])
        assert not torch.equal(before[:, edited:], after[:, edited:])


def test_the_loss_of_the_last_token_reaches_the_first_one_as_finite_differences_say():
    layer = MemoryResonanceLayer(6, 3, gate_init=1.0, temperature=0.5, dtype=torch.float64)
    snr = SNRMemoryFilter(gamma_boost=1.0, eta_boost=1.0)
    inputs = sequence(torch.float64)
    k = inputs[0].clone().requires_grad_()
    memory(k, *inputs[1:], layer, snr, 4)[:, -1].square().sum().backward()
    step, ends = 1e-6, []
    for sign in (1, -1):
        moved = inputs[0].clone()
        moved[0, 0, 1, 2] += sign * step
        ends.append(memory(moved, *inputs[1:], layer, snr, 4)[:, -1].square().sum())
    expected = (ends[0] - ends[1]) / (2 * step)
    assert k.grad[0, 0, 1, 2] != 0
    assert torch.allclose(k.grad[0, 0, 1, 2], expected, rtol=1e-5, atol=0)


def test_the_layer_starts_near_the_identity_and_its_gate_is_learned():
    layer = MemoryResonanceLayer(8, 3, energy_threshold=1.0, dtype=torch.float64)
    state = drawn(2, 3, 8, 8, dtype=torch.float64)
    found, _ = layer(state)
    assert (found - state).norm() < 0.02 * state.norm()
    found.square().sum().backward()
    gradient = layer.resonance_gate.grad
    assert gradient.isfinite().all()
    assert (gradient != 0).all()

    def of_gate(gate):
        return torch.func.functional_call(layer, {"resonance_gate": gate}, (state,))[0]

    assert torch.autograd.gradcheck(of_gate, layer.resonance_gate)


def test_the_report_counts_modes_of_every_head():
    layer = MemoryResonanceLayer(8, 2, energy_threshold=0.5)
    modes = torch.zeros(1, 2, 8, 8)
    modes[0, 0, 2], modes[0, 1, :4] = 3.0, 1.0
    state = layer.transform.inverse(modes)
    _, info = layer(state)
    assert info["num_resonant"].tolist() == [[1, 4]]
    assert torch.allclose(info["sparsity_ratio"], torch.tensor([[7 / 8, 4 / 8]]))
    assert torch.allclose(info["total_energy"], state.square().sum((-2, -1)), rtol=1e-5)
    assert info["diag_energy"].shape == info["resonance_mask"].shape == (1, 2, 8)
    assert not any(x.requires_grad for x in info.values())
    assert torch.allclose(layer.get_resonance_strength(state, 2, 5), torch.tensor([[3.0, 1.0]]), atol=1e-5)


def test_there_and_back_is_the_identity_and_keeps_the_norm():
    transform = ZetaBasisTransform(8, 5, dtype=torch.float64)
    state = drawn(2, 3, 8, 5, dtype=torch.float64)
    assert torch.allclose(transform.inverse(transform(state)), state, rtol=0, atol=1e-13)
    assert torch.allclose(transform(state).norm(), state.norm(), rtol=1e-13)


def test_the_bases_are_saved_shared_by_instances_and_never_rounded_below_float32():
    layer, other = MemoryResonanceLayer(16, 2), MemoryResonanceLayer(16, 2)
    assert {"transform.key_basis", "transform.value_basis"} <= set(layer.state_dict())
    assert torch.equal(layer.transform.key_basis, other.transform.key_basis)
    half = layer.to(torch.bfloat16)
    assert half.resonance_gate.dtype == torch.bfloat16
    assert half.transform.key_basis.dtype == torch.float32
    assert torch.equal(half.transform.key_basis, resonance.basis(16).float())
    for wide in (half.double(), MemoryResonanceLayer(16, 2).double()):
        assert torch.equal(wide.transform.key_basis, resonance.basis(16))
    half = half.to(torch.bfloat16)
    assert half.transform.key_basis.dtype == torch.float32
    state, info = half(drawn(1, 2, 16, 16).bfloat16())
    assert state.dtype == info["resonance_mask"].dtype == torch.bfloat16


def test_every_option_changes_something():
    state = drawn(1, 2, 8, 8)
    plain = MemoryResonanceLayer(8, 2, gate_init=2.0, energy_threshold=0.9)(state)[0]
    for option in (
        {"energy_threshold": 0.5},
        {"temperature": 0.5},
        {"energy": "diag"},
        {"hard": True},
        {"gate_init": 0.0},
    ):
        changed = MemoryResonanceLayer(8, 2, **{"gate_init": 2.0, "energy_threshold": 0.9, **option})(state)[0]
        assert not torch.equal(plain, changed), option
    assert MemoryResonanceLayer(8, 2, value_dim=5)(state[..., :5])[0].shape == (1, 2, 8, 5)


def test_bad_arguments_are_refused():
    with pytest.raises(ConfigError, match="num_heads ≥ 1"):
        MemoryResonanceLayer(8, 0)
    with pytest.raises(ConfigError, match="whole number key_dim ≥ 1"):
        MemoryResonanceLayer(0, 2)
    with pytest.raises(ShapeError, match="one blend per head"):
        MemoryResonanceLayer(8, 2)(torch.zeros(1, 3, 8, 8))


def test_it_compiles_into_one_graph():
    layer, state = MemoryResonanceLayer(8, 2), drawn(1, 2, 8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(state)[0], layer(state)[0], atol=1e-6)


def test_a_module_built_without_data_is_whole_after_a_reset():
    with torch.device("meta"):
        layer = MemoryResonanceLayer(6, 3, value_dim=5, gate_init=0.5, dtype=torch.float64)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    layer = layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(torch.nan)
    for module in layer.modules():
        module.reset_parameters()
    for found, size in ((layer.transform.key_basis, 6), (layer.transform.value_basis, 5)):
        left, _, right = torch.linalg.svd(zeta.basis(size))
        assert torch.allclose(found, left @ right, rtol=0, atol=1e-13)
    assert torch.equal(layer.resonance_gate.detach(), torch.full((3,), 0.5, dtype=torch.float64))
