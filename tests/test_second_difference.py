"""What one pair cannot say about the penalty: memory, registration, transforms, and how it is used in training."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from so8t_torch.core.errors import BackendError, ConfigError, DomainError, ShapeError
from so8t_torch.ops import second_difference as room
from so8t_torch.ops.second_difference import eager

SHAPE = (2, 9, 5)
ENERGY = torch.ops.so8t.second_difference_energy.default
GRADIENT = torch.ops.so8t.second_difference_gradient.default


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padded_mask():
    mask = torch.ones(SHAPE[:2], dtype=torch.int64)
    mask[0, :2] = 0
    mask[1, -3:] = 0
    return mask


def test_padding_side_changes_neither_value_nor_gradient():
    content = drawn(2, 6, 5)
    results = []
    for left, right in ((0, 0), (3, 0), (0, 3), (2, 1)):
        h = torch.full((2, left + 6 + right, 5), torch.nan, dtype=torch.float64)
        h[:, left : left + 6] = content
        mask = torch.zeros(h.shape[:2], dtype=torch.bool)
        mask[:, left : left + 6] = True
        h.requires_grad_()
        value = room.second_difference(h, mask)
        (grad,) = torch.autograd.grad(value, h)
        assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
        results.append((value.item(), grad[:, left : left + 6]))
    for value, grad in results[1:]:
        assert value == results[0][0]
        assert torch.equal(grad, results[0][1])


def test_packed_rows_cost_what_their_sequences_cost_alone():
    first, second = drawn(1, 6, 5, seed=1), drawn(1, 4, 5, seed=2)
    packed = room.energy(torch.cat([first, second], 1), torch.tensor([[1] * 6 + [2] * 4]))
    alone = [room.energy(h, torch.ones(h.shape[:2])) for h in (first, second)]
    assert torch.allclose(packed, alone[0] + alone[1], rtol=1e-14, atol=0)


def test_two_masked_quarters_of_a_batch_add_up_to_the_batch():
    h = drawn(4, 9, 5)
    mask = torch.ones(4, 9)
    mask[0, 4:] = 0
    parts = [room.energy(h[i : i + 2], mask[i : i + 2]).sum() for i in (0, 2)]
    whole = sum(parts) / room.centres(mask).sum()
    assert torch.allclose(whole, room.second_difference(h, mask), rtol=1e-14, atol=0)


def test_fully_masked_input_costs_zero_and_gives_zero_gradient():
    h = torch.full(SHAPE, torch.inf, requires_grad=True)
    value = room.second_difference(h, torch.zeros(SHAPE[:2]))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(h.grad, torch.zeros(SHAPE))


def test_a_nan_that_counts_is_not_hidden():
    h = drawn(*SHAPE)
    h[0, 4, 1] = torch.nan
    for delta in (0.0, 0.5):
        assert room.second_difference(h, torch.ones(SHAPE[:2]), delta=delta).isnan()


def test_half_precision_does_not_overflow():
    h = torch.zeros(1, 3, 4, dtype=torch.float16)
    h[:, 1] = 60000.0
    assert room.second_difference(h, torch.ones(1, 3)).item() == 120000.0**2


def test_huber_with_a_large_threshold_is_the_square():
    h, mask = drawn(*SHAPE), padded_mask()
    assert torch.equal(room.second_difference(h, mask, delta=1e3), room.second_difference(h, mask))


@pytest.mark.parametrize("tile", [1, 7, 12, 1 << 17])
def test_the_size_of_a_tile_changes_no_bit(monkeypatch, tile):
    h, mask = drawn(3, 11, 3, dtype=torch.float32).requires_grad_(), torch.ones(3, 11)
    expected = room.second_difference(h, mask)
    (grad,) = torch.autograd.grad(expected, h)
    monkeypatch.setattr(eager, "TILE_ELEMENTS", tile)
    found = room.second_difference(h, mask)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, h)[0], grad)


def test_nothing_is_kept_for_backward_but_h_and_a_byte_per_token():
    kept = []
    h = drawn(2, 64, 48, dtype=torch.float32).requires_grad_()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        room.second_difference(h, torch.ones(2, 64))
    large = [t for t in kept if t.data_ptr() != h.data_ptr()]
    assert any(t.data_ptr() == h.data_ptr() for t in kept)
    assert sum(t.numel() * t.element_size() for t in large) <= 2 * 64 + 64


@pytest.mark.parametrize("delta", [0.0, 0.7])
@pytest.mark.parametrize("backend", ["streamed", "eager"])
def test_second_derivatives_agree_with_finite_differences(backend, delta):
    mask = padded_mask()
    h = drawn(*SHAPE).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: room.energy(x, mask, delta=delta, backend=backend), h)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "expanded"])
def test_the_registered_operations_pass_opcheck(strides):
    h = {
        "contiguous": drawn(*SHAPE),
        "transposed": drawn(SHAPE[0], SHAPE[2], SHAPE[1]).mT,
        "expanded": drawn(1, SHAPE[1], 1).expand(SHAPE),
    }[strides].requires_grad_()
    valid = room.centres(padded_mask())
    torch.library.opcheck(ENERGY, (h, valid, 0.5, "streamed"))
    torch.library.opcheck(GRADIENT, (drawn(SHAPE[0]).requires_grad_(), h, valid, 0.5, "streamed"))


def test_compiling_sees_one_node():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    h, mask = drawn(*SHAPE), padded_mask()
    compiled = torch.compile(lambda h, mask: room.second_difference(h, mask), fullgraph=True, backend=keep)
    assert torch.equal(compiled(h, mask), room.second_difference(h, mask))
    (graph,) = graphs
    heavy = [node for node in graph.graph.nodes if "so8t" in str(node.target)]
    assert len(heavy) == 1


def test_forward_mode_takes_the_plain_form_and_is_never_silently_zero():
    h, direction, mask = drawn(*SHAPE), drawn(*SHAPE, seed=5), padded_mask()
    _, slope = torch.func.jvp(lambda x: room.second_difference(x, mask), (h,), (direction,))
    step = 1e-4
    ahead, behind = (room.second_difference(h + s * direction, mask) for s in (step, -step))
    assert torch.allclose(slope, (ahead - behind) / (2 * step), rtol=1e-8, atol=0)
    with pytest.raises(BackendError, match="forward-mode tangent"):
        torch.func.jvp(lambda x: room.second_difference(x, mask, backend="streamed"), (h,), (direction,))


def test_the_choice_of_backend_can_be_explained():
    lines = room.explain_backend(torch.zeros(SHAPE)).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["triton", "streamed", "eager"]


def test_a_batch_axis_is_asked_for():
    with pytest.raises(ShapeError, match="add a batch axis"):
        room.second_difference(torch.zeros(5, 3), torch.ones(5))


def test_the_floor_of_the_scale_is_positive():
    with pytest.raises(ConfigError, match="scale_floor > 0"):
        room.second_difference(torch.zeros(SHAPE), torch.ones(SHAPE[:2]), scale_free=True, scale_floor=0.0)


def test_the_schedule_at_its_boundaries():
    table = {0.0: 0.01, 0.1999: 0.01, 0.2: 0.05, 0.5999: 0.05, 0.6: 0.1, 1.0: 0.1, 7.0: 0.1}
    assert {progress: room.schedule_weight(progress) for progress in table} == table


def test_the_schedule_keeps_a_nan():
    weights = room.schedule_weight(torch.tensor([0.1, torch.nan], dtype=torch.float64))
    assert weights[0] == 0.01
    assert weights[1].isnan()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_hidden_states_are_real_floating_numbers(dtype):
    h = torch.ones(SHAPE).to(dtype)
    for call in (room.energy, room.second_difference):
        with pytest.raises(DomainError, match="real floating-point h"):
            call(h, torch.ones(SHAPE[:2]))


@pytest.mark.parametrize("backend", ["auto", "streamed", "eager"])
def test_a_mask_on_another_device_is_refused(backend):
    with pytest.raises(DomainError, match="its mask on meta"):
        room.energy(torch.ones(SHAPE), torch.ones(SHAPE[:2], device="meta"), backend=backend)


def test_a_mask_has_an_axis_of_tokens():
    with pytest.raises(ShapeError, match="one number per token"):
        room.centres(torch.tensor(1.0))


def test_a_schedule_of_whole_numbers_is_refused_not_rounded_to_zero():
    with pytest.raises(DomainError, match="floating-point tensor"):
        room.schedule_weight(torch.tensor([0, 1]))
