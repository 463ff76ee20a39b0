"""The layer of positions: its formula, what is trained, and what every option changes."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.nn.zeta_embedding import ZetaEmbedding
from so8t_torch.ops import zeta


def by_hand(positions, width, scale=1.0):
    gamma = zeta.zeros((width + 1) // 2)
    rows = []
    for p in positions:
        angle = p * math.pi / 2 * gamma[0] / gamma
        rows.append(torch.stack([angle.sin(), angle.cos()], -1).flatten()[:width] * scale)
    return torch.stack(rows)


@pytest.mark.parametrize("width", [1, 7, 16])
def test_rows_are_the_formula(width):
    layer = ZetaEmbedding(8, width, scale=0.5, dtype=torch.float64)
    positions = torch.tensor([[0, 3, 7], [8, 100, -2]])
    expected = by_hand(positions.flatten().tolist(), width, 0.5).reshape(2, 3, width)
    assert torch.allclose(layer(positions), expected, rtol=0, atol=1e-12)


def test_without_training_nothing_is_stored():
    layer = ZetaEmbedding(4096, 64)
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert list(ZetaEmbedding(4096, 64, trainable=True).state_dict()) == ["weight"]


class Copies(TorchDispatchMode):
    """Counts tensors that are made of numbers of the host, and moves."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_to_copy" in str(func) and (kwargs or {}).get("device") is not None:
            self.seen.append(str(func))
        found = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*args, found) if isinstance(x, torch.Tensor) and x.ndim}
        if len(devices) > 1:
            self.seen.append(f"{func} from {devices}")
        return found


@pytest.mark.parametrize("trainable", [False, True])
def test_a_call_moves_nothing_between_devices(trainable):
    layer = ZetaEmbedding(4, 8, trainable=trainable).to("meta")
    positions = torch.arange(9, device="meta")
    with Copies() as copies:
        assert layer(positions).shape == (9, 8)
    assert not copies.seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 0.0283, math.pi])
def test_a_half_precision_row_is_the_formula_rounded_once(dtype, scale):
    positions = torch.arange(3000)
    exact = zeta.embedding(positions.double(), 8, scale=scale)
    built, converted = ZetaEmbedding(3000, 8, scale=scale, dtype=dtype), ZetaEmbedding(3000, 8, scale=scale).to(dtype)
    for layer in (built, converted, ZetaEmbedding(3000, 8, trainable=True, scale=scale, dtype=dtype)):
        assert torch.equal(layer(positions), exact.to(dtype))


def test_frequencies_keep_their_precision_in_any_module():
    positions, exact = torch.arange(3000, 3010), by_hand(range(3000, 3010), 8)
    layer = ZetaEmbedding(4, 8).bfloat16().double()
    assert torch.allclose(layer(positions), exact, rtol=0, atol=1e-12)


def test_trained_rows_start_at_the_formula_and_the_formula_goes_on_behind_them():
    layer = ZetaEmbedding(6, 8, trainable=True, dtype=torch.float64)
    positions = torch.tensor([0, 5, 6, 50, -1])
    expected = by_hand(positions.tolist(), 8)
    assert torch.allclose(layer(positions), expected, rtol=0, atol=1e-13)
    with torch.no_grad():
        layer.weight.add_(1.0)
    changed = (layer(positions) - expected).abs().amax(-1) > 0.5
    assert changed.tolist() == [True, True, False, False, False]
    layer.reset_parameters()
    assert torch.allclose(layer(positions), expected, rtol=0, atol=1e-13)


def test_the_gradient_of_a_trained_row_is_the_sum_of_its_cotangents():
    layer = ZetaEmbedding(5, 3, trainable=True)
    cotangent = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    layer(torch.tensor([1, 3, 1, 9])).backward(cotangent)
    assert torch.allclose(layer.weight.grad[1], cotangent[0] + cotangent[2])
    assert torch.allclose(layer.weight.grad[3], cotangent[1])
    assert not layer.weight.grad[[0, 2, 4]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_follows_the_module_and_only_the_result_is_rounded(dtype):
    positions = torch.arange(3000, 3010)
    exact = by_hand(positions.tolist(), 8)
    found = ZetaEmbedding(4, 8).to(dtype)(positions)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= max(torch.finfo(dtype).eps, 1e-12)


def test_every_option_changes_something():
    positions = torch.arange(4)
    plain = ZetaEmbedding(4, 6)(positions)
    for option in ({"scale": 2.0}, {"omega_max": 1.0}, {"power": 0.5}, {"mode": "inverse"}, {"mode": "direct"}):
        assert not torch.allclose(ZetaEmbedding(4, 6, **option)(positions), plain)


def test_the_size_of_rows_is_that_of_tokens():
    rows = ZetaEmbedding(4, 64, scale=math.sqrt(2.0) * 0.02)(torch.arange(100))
    assert torch.allclose(rows.square().mean(-1).sqrt(), torch.tensor(0.02), rtol=1e-5)


def test_bad_arguments_are_refused():
    for options in (
        {"max_len": 0},
        {"max_len": 2.5},
        {"d_model": 4.0},
        {"d_model": 0},
        {"scale": 0.0},
        {"power": -1.0},
        {"omega_max": 3.0},
        {"mode": "x"},
    ):
        with pytest.raises(ConfigError):
            ZetaEmbedding(**{"max_len": 4, "d_model": 4, **options})
    with pytest.raises(DomainError, match="integer positions"):
        ZetaEmbedding(4, 4)(torch.tensor([0.5]))


def test_it_compiles_into_one_graph():
    layer = ZetaEmbedding(6, 8, trainable=True)
    positions = torch.arange(9)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(positions), layer(positions))


def test_a_module_built_without_data_is_whole_after_a_reset():
    with torch.device("meta"):
        layer = ZetaEmbedding(6, 8, trainable=True, scale=0.5, dtype=torch.float64)
    layer = layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(math.nan)
    layer.reset_parameters()
    positions = torch.tensor([0, 5, 9])
    assert torch.allclose(layer(positions), by_hand(positions.tolist(), 8, 0.5), rtol=0, atol=1e-13)
