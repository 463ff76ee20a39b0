"""A forward-mode derivative passes through every room or is refused: an operator of its own would answer zero."""

import importlib
import pkgutil

import pytest
import torch
from torch.autograd import forward_ad

import so8t_torch.ops
from so8t_torch.core.errors import BackendError
from so8t_torch.ops import (
    hebbian,
    linear_recurrence,
    lns,
    rank_gate,
    rotation,
    second_difference,
    semiseparable,
    tensor_train,
    triality,
    tridiagonal,
)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CORES = (drawn(3, 1, 2, 2, seed=1), drawn(4, 2, 1, 3, seed=2))
IDS = torch.tensor([0, 5, 11])
MASK = torch.ones(2, 6, dtype=torch.int64)
POSITIVE = torch.ones(4, 5, dtype=torch.int8), torch.ones(5, 3, dtype=torch.int8)
ROTATION = rotation.exponential(drawn(2, 28, seed=3))
VALUES, WRITTEN = drawn(2, 6, 3, seed=6), drawn(2, 6, 4, seed=7)
HALF = torch.tensor(0.5, dtype=torch.float64)
FACTOR, CHANNELS = drawn(5, 3, seed=4), drawn(3, 16, seed=5)
COUPLINGS, HEIGHT = drawn(5, seed=6), torch.tensor(0.1 + 1.0j, dtype=torch.complex128)

QUERIES = drawn(2, 6, 2, 3, seed=8)
KEPT = torch.tensor(0.9, dtype=torch.float64)

# name, function of one tensor and a backend, that tensor, registered backends
CALLS = (
    ("rotation.exponential", lambda x, _: rotation.exponential(x), drawn(2, 28), ()),
    ("rotation.cayley", lambda x, _: rotation.cayley(x), drawn(2, 28), ()),
    ("rotation.logarithm", lambda x, _: rotation.logarithm(x), ROTATION, ()),
    ("rotation.apply", lambda x, b: rotation.apply(ROTATION, x, backend=b), drawn(3, 16), ("triton",)),
    ("rotation.apply of R", lambda r, b: rotation.apply(r, CHANNELS, backend=b), ROTATION, ("triton",)),
    ("triality.representations", lambda x, _: triality.representations(x), drawn(28), ()),
    ("second_difference.energy", lambda h, b: second_difference.energy(h, MASK, backend=b), drawn(2, 6, 3),
     ("streamed", "triton")),
    ("second_difference", lambda h, b: second_difference.second_difference(h, MASK, backend=b), drawn(2, 6, 3),
     ("streamed", "triton")),
    ("lns.encode", lambda x, _: lns.encode(x)[1], drawn(4, 5), ()),
    ("lns.logmatmulexp", lambda a, b: lns.logmatmulexp(a, FACTOR, backend=b), drawn(4, 5), ("rescaled", "triton")),
    ("lns.matmul", lambda a, b: lns.matmul(POSITIVE[0], a, POSITIVE[1], FACTOR, backend=b)[1], drawn(4, 5),
     ("rescaled", "triton")),
    ("tensor_train.rows", lambda c, b: tensor_train.rows(IDS, c, CORES[1], backend=b), CORES[0], ("tiled", "triton")),
    ("tensor_train.logits", lambda h, b: tensor_train.logits(h, *CORES, backend=b), drawn(3, 6), ("tiled",)),
    ("rank_gate", lambda z, _: rank_gate.rank_gate(z, min_rank=2), drawn(3, 6), ()),
    ("semiseparable.operator", lambda u, b: semiseparable.operator(VALUES, u, WRITTEN, HALF, backend=b)[0], WRITTEN,
     ("chunked",)),
    ("tensor_train.cross_entropy", lambda h, b: tensor_train.cross_entropy(h, IDS, *CORES, backend=b), drawn(3, 6),
     ("tiled", "triton")),
    ("tridiagonal.green", lambda h, b: tridiagonal.green(h, COUPLINGS, COUPLINGS, HEIGHT, backend=b).imag, drawn(6),
     ("blocked", "triton")),
    ("linear_recurrence", lambda b, c: linear_recurrence.linear_recurrence(HALF, b, backend=c)[0], VALUES,
     ("blocked", "triton")),
    ("hebbian", lambda v, b: hebbian.hebbian(QUERIES, QUERIES, v, KEPT, HALF, backend=b)[0], drawn(2, 6, 2, 4),
     ("chunked", "triton")),
)  # fmt: skip
PLAIN = {"rotation.cayley", "lns.encode", "rank_gate"}
"""What contains no operator of its own."""
REGISTERED = [(name, f, x, backend) for name, f, x, backends in CALLS for backend in backends]


@pytest.mark.parametrize(("name", "function", "x", "_backends"), CALLS, ids=[call[0] for call in CALLS])
def test_what_runs_by_itself_passes_the_tangent(name, function, x, _backends):
    direction, step = drawn(*x.shape, seed=9), 1e-5
    tangent = torch.func.jvp(lambda value: function(value, "auto"), (x,), (direction,))[1]
    ahead, behind = (function(x + sign * step * direction, "auto") for sign in (1, -1))
    slope = (ahead - behind) / (2 * step)
    assert slope.abs().max() > 1e-3, name
    assert torch.allclose(tangent, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("_name", "function", "x", "backend"), REGISTERED, ids=[f"{call[0]}-{call[3]}" for call in REGISTERED]
)
def test_a_registered_backend_raises_rather_than_answering_zero(_name, function, x, backend):
    def along(value):
        return function(value, backend)

    with pytest.raises(BackendError, match=r"tangent|forward-mode"):
        torch.func.jvp(along, (x,), (drawn(*x.shape, seed=9),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(BackendError, match=r"tangent|forward-mode"):
            along(dual)


@pytest.mark.parametrize(("name", "function", "x", "_backends"), CALLS, ids=[call[0] for call in CALLS])
def test_gradients_by_torch_func_are_those_of_autograd(name, function, x, _backends):
    def loss(value):
        return function(value, "auto").sin().sum()

    given = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(given), given)
    assert expected.abs().max() > 1e-3, name
    assert torch.allclose(torch.func.grad(loss)(x), expected, rtol=1e-9, atol=1e-11)


def registered():
    """Every operator of this library, once all rooms are imported."""
    for module in pkgutil.walk_packages(so8t_torch.ops.__path__, "so8t_torch.ops."):
        if not module.name.endswith("kernels"):
            importlib.import_module(module.name)
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("so8t::"))


def made_up(argument, dual):
    """An argument of the type in the schema; nothing is computed with it."""
    kind = str(argument.type)
    values = {
        "Tensor": dual,
        "List[Tensor]": [dual],
        "int": 1,
        "float": 1.0,
        "bool": False,
        "str": "eager",
        "List[bool]": [False],
    }
    return values.get(kind)


@pytest.mark.parametrize("name", registered())
def test_a_registered_operator_raises_where_a_tangent_arrives(name):
    operator = getattr(torch.ops.so8t, name.removeprefix("so8t::")).default
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2, 2), torch.ones(2, 2))
        with pytest.raises(BackendError, match=rf"{name} has no forward-mode derivative"):
            operator(*(made_up(argument, dual) for argument in operator._schema.arguments))


def test_there_are_operators():
    assert len(registered()) > 10


@pytest.mark.parametrize(("name", "function", "x", "_backends"), CALLS, ids=[call[0] for call in CALLS])
def test_compiled_it_is_right_or_raises(name, function, x, _backends):
    """A compiled function sees no tangents when it chooses a backend; the operator that it meets does."""
    direction = drawn(*x.shape, seed=9)

    def along(value, tangent):
        return torch.func.jvp(lambda v: function(v, "auto"), (value,), (tangent,))[1]

    torch.compiler.reset()
    compiled = torch.compile(along, backend="aot_eager")
    if name in PLAIN:
        assert torch.allclose(compiled(x, direction), along(x, direction), rtol=1e-10, atol=1e-12)
    else:
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            compiled(x, direction)
