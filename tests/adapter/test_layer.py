from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from so8t_torch import SO8TConfig
from so8t_torch.adapter import SO8TLayer
from so8t_torch.adapter.routing import GateRoutes


def dense_rotation(coordinates: np.ndarray, blocks: int, chart: str = "exp") -> np.ndarray:
    """The D×D block-diagonal rotation, written out entry by entry, with scipy's own matrix functions."""
    matrix = np.zeros((8 * blocks, 8 * blocks))
    for k in range(blocks):
        numbers = iter(coordinates[k % len(coordinates)])
        skew = np.zeros((8, 8))
        for i in range(8):
            for j in range(i + 1, 8):
                skew[i, j] = next(numbers)
                skew[j, i] = -skew[i, j]
        eye = np.eye(8)
        block = scipy.linalg.expm(skew) if chart == "exp" else np.linalg.solve(eye - skew / 2, eye + skew / 2)
        matrix[8 * k : 8 * k + 8, 8 * k : 8 * k + 8] = block
    return matrix


def random_layer(config: SO8TConfig, base: nn.Module | None = None, *, gated: bool = True, seed: int = 0) -> SO8TLayer:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    layer = SO8TLayer(base or nn.Linear(24, 16), GateRoutes())
    layer.add_adapter("default", config, gated=gated, rank=config.r)
    layer.set_adapter("default")
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "so8t_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return layer


def expected(layer: SO8TLayer, x: Tensor, chart: str) -> np.ndarray:
    """R_cmd R_safe (W x + b + s B A x) with dense matrices in float64."""
    base = layer.base_layer
    weight = base.weight.detach().double().numpy()
    weight = weight.T if isinstance(base, Conv1D) else weight
    z = x.double().numpy() @ weight.T + base.bias.detach().double().numpy()
    if "default" in layer.so8t_lora_A:
        down, up = (p["default"].detach().double().numpy() for p in (layer.so8t_lora_A, layer.so8t_lora_B))
        z = z + (16 / len(down)) * x.double().numpy() @ down.T @ up.T
    if "default" in layer.so8t_safe:
        blocks = z.shape[-1] // 8
        generators = (p["default"].detach().double().numpy() for p in (layer.so8t_safe, layer.so8t_cmd))
        safe, cmd = (dense_rotation(g, blocks, chart) for g in generators)
        z = z @ (cmd @ safe).T
    return z


@pytest.mark.parametrize("chart", ["exp", "cayley"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("gated", "rank"), [(True, 0), (False, 3), (True, 3)])
def test_the_layer_is_the_formula(chart, shared, gated, rank) -> None:
    layer = random_layer(SO8TConfig(chart=chart, shared=shared, r=rank), gated=gated)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(layer(x).detach().numpy(), expected(layer, x, chart), rtol=0, atol=1e-5)


def test_conv1d_layers_compute_and_merge() -> None:
    torch.manual_seed(0)
    layer = random_layer(SO8TConfig(r=2), Conv1D(16, 24)).eval()
    x = torch.randn(3, 24)
    y = layer(x)
    np.testing.assert_allclose(y.detach().numpy(), expected(layer, x, "exp"), rtol=0, atol=1e-5)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=0, atol=1e-5)


def test_swapping_the_factors_changes_the_output() -> None:
    layer = random_layer(SO8TConfig())
    x = torch.randn(4, 24)
    y = layer(x)
    with torch.no_grad():
        safe, cmd = layer.so8t_safe["default"].clone(), layer.so8t_cmd["default"].clone()
        layer.so8t_safe["default"].copy_(cmd)
        layer.so8t_cmd["default"].copy_(safe)
    assert (layer(x) - y).abs().max() > 0.1


@pytest.mark.parametrize("factor", ["safe", "cmd"])
def test_generator_gradients_agree_with_central_differences(factor) -> None:
    layer = random_layer(SO8TConfig(train_gates=factor, r=2)).double()
    x = torch.randn(3, 24, dtype=torch.float64)
    weights = torch.randn(3, 16, dtype=torch.float64)
    parameter = getattr(layer, f"so8t_{factor}")["default"]
    (layer(x) * weights).sum().backward()

    @torch.no_grad()
    def central(k: int, i: int, step: float) -> float:
        start, values = parameter[k, i].item(), []
        for moved in (start + step, start - step):
            parameter[k, i] = moved
            values.append((layer(x) * weights).sum().item())
        parameter[k, i] = start
        return (values[0] - values[1]) / (2 * step)

    for k, i in [(0, 0), (0, 13), (1, 27)]:
        # extrapolated to fourth order, so that steps far above the rounding of the sum suffice
        expected_slope = (4 * central(k, i, 5e-4) - central(k, i, 1e-3)) / 3
        assert parameter.grad[k, i].item() == pytest.approx(expected_slope, rel=1e-9)


@pytest.mark.parametrize("family", ["phi3", "llama", "qwen2", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chart", ["exp", "cayley"])
def test_step_zero_is_the_base_model_bit_for_bit(make_model, ids, family, dtype, chart) -> None:
    targets = ["attention.output.dense"] if family == "bert" else ["o_proj"]
    model = make_model(family).to(dtype).eval()
    base = model(ids).logits
    wrapped = get_peft_model(model, SO8TConfig(target_modules=targets, r=4, chart=chart)).eval()
    assert wrapped(ids).logits.dtype == dtype
    assert torch.equal(wrapped(ids).logits, base)


@pytest.mark.parametrize("factor", ["safe", "cmd"])
def test_moving_either_factor_moves_the_logits(make_model, ids, factor) -> None:
    model = get_peft_model(make_model(), SO8TConfig()).eval()
    base = model(ids).logits
    layer = model.base_model.model.model.layers[1].self_attn.o_proj
    with torch.no_grad():
        getattr(layer, f"so8t_{factor}")["default"][2, 5] = 0.4
    assert (model(ids).logits - base).abs().max() > 1e-4


def test_bfloat16_layers_keep_float32_generators_and_bfloat16_activations() -> None:
    layer = random_layer(SO8TConfig(r=2), nn.Linear(24, 16).bfloat16())
    y = layer(torch.randn(3, 24, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert layer.so8t_safe["default"].dtype == torch.float32
    y.float().sum().backward()
    assert layer.so8t_safe["default"].grad.dtype == torch.float32


def test_autocast_does_not_round_the_rotation() -> None:
    layer = random_layer(SO8TConfig())
    x = torch.randn(64, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, y = layer.base_layer(x), layer(x)
    blocks = (dense_rotation(p["default"].detach().double().numpy(), 2) for p in (layer.so8t_safe, layer.so8t_cmd))
    safe, cmd = blocks
    error = np.abs(y.detach().double().numpy() - z.detach().double().numpy() @ (cmd @ safe).T)
    # one rounding of the output to bfloat16 and no other
    assert error.max() <= 2**-8 * np.abs(y.detach().double().numpy()).max()


def test_gates_add_no_saved_tensors_of_activation_size_beyond_the_base_output() -> None:
    layer = random_layer(SO8TConfig())
    x = torch.randn(512, 24, requires_grad=True)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= 512 * 16:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x).sum()
    # the input of W and the input of R; autograd of a plain layer followed by any product keeps the same two
    assert len(saved) == 2


@pytest.mark.parametrize("train_gates", ["safe", "routed"])
def test_compiled_layers_give_the_same_values_and_gradients(train_gates) -> None:
    layer = random_layer(SO8TConfig(r=2, train_gates=train_gates)).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 5, 24)
    for rows in ([True, False, False, True], [False, False, False, True]):
        layer.routes.set(torch.tensor(rows))
        results = []
        for run in (layer, compiled):
            layer.zero_grad(set_to_none=True)
            y = run(x)
            y.square().sum().backward()
            results.append((y.detach(), [p.grad.clone() for p in layer.parameters() if p.grad is not None]))
        (y, gradients), (z, others) = results
        torch.testing.assert_close(z, y, rtol=0, atol=1e-6)
        assert len(gradients) == len(others)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-5)
