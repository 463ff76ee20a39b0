"""Every trainable parameter of every layer gets a finite non-zero gradient within three random batches."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import so8t_torch.nn as layers
from so8t_torch.models.configuration import Phase2Config
from so8t_torch.models.phase2 import Phase2Block
from so8t_torch.nn.dissipative_bk import DissipativeBKLayer, NonHermitianPotential
from so8t_torch.nn.hamiltonian import HamiltonianBlock
from so8t_torch.nn.hebbian import DissipativeHebbianLayer
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.int8_tensor_train import Int8TTEmbedding
from so8t_torch.nn.lns_linear import LNSLinear
from so8t_torch.nn.memory_resonance import MemoryResonanceLayer
from so8t_torch.nn.memory_selection import MemoryImportanceEstimator, SNRMemoryFilter
from so8t_torch.nn.semiseparable import AdaptiveRankSemiseparableLayer
from so8t_torch.nn.tensor_train_head import TensorTrainHead
from so8t_torch.nn.zeta_embedding import ZetaEmbedding

BATCHES = 3
WIDTH, HEADS, KEYS = 16, 2, 8


def stream(generator):
    return torch.randn(2, 12, WIDTH, generator=generator)


def table(**options):
    return lambda: HolographicTTEmbedding(30, WIDTH, 3, **options)


def ids(generator):
    return torch.randint(0, 30, (2, 12), generator=generator)


def memory(generator):
    return torch.randn(2, HEADS, KEYS, KEYS, generator=generator)


class Feedback(nn.Module):
    """The fast weights as a model uses them whose next chunk sees a potential made of them."""

    def __init__(self):
        super().__init__()
        self.layer = DissipativeHebbianLayer(WIDTH, HEADS, KEYS, feedback_channels=3)

    def forward(self, x):
        y, state = self.layer(x)
        return y, self.layer.potential_feedback(state)


class Block(nn.Module):
    """A judged memory behind its short convolution, as the block of a model uses them."""

    def __init__(self):
        super().__init__()
        sizes = {"d_model": WIDTH, "num_heads": HEADS, "head_dim": KEYS, "memory_chunk": 4, "dropout": 0.0}
        self.layer = Phase2Block(Phase2Config(**sizes, adaptive_time_step=True))

    def forward(self, x):
        y, state, _ = self.layer(x, positions=torch.arange(12).expand(2, -1))
        return y, state


def bk(**options):
    return lambda: DissipativeBKLayer(WIDTH, channels=2, **options)


def hebbian(**options):
    return lambda: DissipativeHebbianLayer(WIDTH, HEADS, KEYS, **options)


def ranked(**options):
    return lambda: AdaptiveRankSemiseparableLayer(WIDTH, 8, 2, chunk=4, **options)


CASES = {
    "potential": (lambda: NonHermitianPotential(WIDTH, channels=2, memory_heads=HEADS), stream),
    "resolvent, causal": (bk(), stream),
    "resolvent, full": (bk(mode="full"), stream),
    "resolvent, not Hermitian": (bk(mode="full", hermitian=False, adaptive_hopping=True), stream),
    "resolvent, hopping": (bk(adaptive_hopping=True), stream),
    "Hamiltonian": (lambda: HamiltonianBlock(WIDTH, steps=2, damping=0.1), stream),
    "Hamiltonian with mass": (lambda: HamiltonianBlock(WIDTH, learn_mass=True), stream),
    "Hebbian": (hebbian(), stream),
    "Hebbian, rate of a head": (hebbian(eta_mode="head"), stream),
    "Hebbian, rate of a token": (hebbian(eta_mode="token", rule="delta"), stream),
    "Hebbian, zero-order hold": (hebbian(discretization="zoh"), stream),
    "Hebbian with feedback": (Feedback, stream),
    "Hebbian, judged and filtered": (Block, stream),
    "table": (table(), ids),
    "table of three cores": (table(num_cores=3), ids),
    "table without phase": (table(phase_encoding=False), ids),
    "table of complex cores": (table(complex_cores=True, emit="pair"), ids),
    "head": (lambda: TensorTrainHead(HolographicTTEmbedding(30, WIDTH, 3)), stream),
    "sign–log, sum": (lambda: LNSLinear(WIDTH, 6), stream),
    "sign–log, max": (lambda: LNSLinear(WIDTH, 6, mode="max"), stream),
    "resonance": (lambda: MemoryResonanceLayer(KEYS, HEADS), memory),
    "semiseparable": (ranked(), stream),
    "semiseparable, rotating": (ranked(rotating=True), stream),
    "semiseparable, time step": (ranked(adaptive_time_step=True), stream),
    "zeta positions": (lambda: ZetaEmbedding(16, WIDTH, trainable=True), lambda _: torch.arange(12)),
}
WITHOUT_PARAMETERS = (SNRMemoryFilter, MemoryImportanceEstimator)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, dict):
        return [t for part in value.values() for t in tensors(part)]
    return [t for part in value for t in tensors(part)] if isinstance(value, (tuple, list)) else []


def unreached(model, draw, generator):
    """Return the parameters that no batch reached, and those whose gradient was not finite once."""
    silent = {name for name, p in model.named_parameters() if p.requires_grad}
    wild = set()
    for _ in range(BATCHES):
        model.zero_grad(set_to_none=True)
        parts = tensors(model(draw(generator)))
        sum((p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum().real for p in parts).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                wild |= set() if torch.isfinite(parameter.grad).all() else {name}
                silent -= {name} if bool(parameter.grad.any()) else set()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
    return silent, wild


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_of_a_layer_learns(name):
    make, draw = CASES[name]
    torch.manual_seed(0)
    model = make().train()
    assert list(model.parameters())
    assert unreached(model, draw, torch.Generator().manual_seed(1)) == (set(), set())


def test_no_layer_is_forgotten():
    modules = [importlib.import_module(f"{layers.__name__}.{m.name}") for m in pkgutil.iter_modules(layers.__path__)]
    kinds = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    found = {kind for kind in kinds if issubclass(kind, nn.Module) and kind.__module__.startswith(layers.__name__)}
    tried = {type(inner) for make, _ in CASES.values() for inner in make().modules()}
    # cores rounded to 8 bits are buffers, made from a layer that is tried
    assert found - tried <= {*WITHOUT_PARAMETERS, Int8TTEmbedding}
    assert not [kind for kind in WITHOUT_PARAMETERS if list(kind().parameters())]


class Forgetful(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return super().forward(x) + 0 * self.spare.sum() + (self.bias - self.bias.detach()).sum().mul(float("inf"))


def test_a_parameter_that_is_not_reached_is_found():
    silent, wild = unreached(Forgetful(), stream, torch.Generator().manual_seed(1))
    assert silent == {"spare"}
    assert "bias" in wild
