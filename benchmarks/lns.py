"""Claim: a log-sum-exp matrix product costs about as much as a dense one, a hundredth of what its peers take, on a CPU.

Compared in float32: forward and forward + backward of the unsigned and the signed product against ``torch.matmul`` of
the same sizes; the unsigned product at 512³ against torch-struct, torch-semiring-einsum, the broadcast formula and two
forms of pykeops; logs of growing spread, for which more and more outputs need a higher rung of the ladder, against the
broadcast formula; and the linear layer against ``nn.Linear``. Beside a dense product no ratio can be above 1: 0.5 means
that the log-domain semantics cost as much again. They buy range and exact zeros, not energy.
Peaks are bytes that the call itself allocates through torch's CPU allocator, which pykeops does not use.

Run: python -m benchmarks.lns
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.allocation import peak_bytes
from benchmarks.harness import Case, Rival, run
from so8t_torch.nn.lns_linear import LNSLinear
from so8t_torch.ops import lns

COMPONENT = ROOM = "lns"
SIZES = (512, 1024)
SPREADS = (1.0, 20.0, 40.0, 60.0, 1000.0)


def cases() -> Iterator[Case]:
    """Yield every comparison; inputs are seeded."""
    torch.manual_seed(0)
    for size in SIZES:
        yield from dense_cases(size)
    yield peers_case(512)
    for spread in SPREADS:
        yield from spread_cases(512, spread)
    yield layer_case(512)


def dense_cases(size: int) -> Iterator[Case]:
    """Yield forward and forward + backward against a dense product of the same size."""
    a, b = (torch.randn(size, size, requires_grad=True) for _ in range(2))
    signs = [torch.randint(0, 2, (size, size), dtype=torch.int8) * 2 - 1 for _ in range(2)]
    cotangent = torch.randn(size, size)

    def unsigned() -> Tensor:
        return lns.logmatmulexp(a, b)

    def signed() -> Tensor:
        return lns.matmul(signs[0], a, signs[1], b)[1]

    def dense() -> Tensor:
        return a @ b

    def step(forward: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), (a, b), cotangent)

    for name, ours in (("unsigned", unsigned), ("signed", signed)):
        forward = Rival("so8t", without_graph(ours))
        rival = Rival("torch.matmul", without_graph(dense), must=1 / 3)
        yield Case(f"{name} fwd {size}³", shape(size, forward.run), "float32", (forward, rival), repeats=31)
        both, rival = Rival("so8t", step(ours)), Rival("torch.matmul", step(dense), must=1 / 2)
        yield Case(f"{name} fwd+bwd {size}³", shape(size, both.run), "float32", (both, rival), repeats=21)


def peers_case(size: int) -> Case:
    """Return the unsigned product against every installed peer; those that are not are named in the shape."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    peers: dict[str, Callable[[Tensor, Tensor], dict[str, Callable[[], Tensor]]]] = {
        "torch_struct": torch_struct_forms,
        "torch_semiring_einsum": semiring_einsum_forms,
        "pykeops": pykeops_forms,
    }
    forms = {"broadcast": lambda: torch.logsumexp(a[:, :, None] + b, 1)}
    absent = [name for name in peers if importlib.util.find_spec(name) is None]
    for name in peers.keys() - set(absent):
        forms |= peers[name](a, b)
    exact = torch.logsumexp(a.double()[:, :, None] + b.double(), 1)
    ours = without_graph(lambda: lns.logmatmulexp(a, b))
    rivals = [Rival("so8t", ours)]
    for name in sorted(forms):
        torch.testing.assert_close(forms[name]().double(), exact, rtol=1e-5, atol=1e-5)
        keops = name.startswith("pykeops")
        size_of = "" if keops else f" ({peak_bytes(forms[name]) / 2**20:.1f} MiB)"
        rivals.append(Rival(name + size_of, without_graph(forms[name]), must=10.0 if keops else 100.0))
    note = shape(size, ours) + "".join(f"; {name} absent" for name in absent)
    return Case(f"unsigned fwd {size}³", note, "float32", tuple(rivals), repeats=5)


def torch_struct_forms(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return torch-struct's log semiring product."""
    from torch_struct import LogSemiring

    return {"torch-struct": lambda: LogSemiring.matmul(a[None], b[None])[0]}


def semiring_einsum_forms(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return torch-semiring-einsum with its automatic block size and with one that stays near the cache."""
    import torch_semiring_einsum as einsum

    equation = einsum.compile_equation("ik,kj->ij")
    return {
        "semiring-einsum": lambda: einsum.log_einsum(equation, a, b),
        "semiring-einsum block 16": lambda: einsum.log_einsum(equation, a, b, block_size=16),
    }


def pykeops_forms(a: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the two forms of pykeops that compute the product; a vector log-sum-exp does not exist there.

    ``logsumexp`` reduces over k with every output (i, j) as a batch of its own. ``exp-sum`` makes k the vector axis,
    which is compiled into the formula, and has no shift, so that it overflows beyond logs of 88. Both compile with
    g++ at the first call, into pykeops' own cache folder, and print what they do.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    transposed = b.T.contiguous()
    with contextlib.redirect_stdout(sys.stderr):
        from pykeops.torch import LazyTensor

    def logsumexp() -> Tensor:
        left = LazyTensor(a.view(rows, 1, 1, inner, 1))
        return (left + LazyTensor(transposed.view(1, columns, 1, inner, 1))).logsumexp(dim=3).view(rows, columns)

    def exp_sum() -> Tensor:
        left = LazyTensor(a.view(1, rows, 1, inner))
        terms = (left + LazyTensor(transposed.view(columns, 1, 1, inner))).exp().sum(-1)
        return terms.sum(dim=2).view(columns, rows).T.log()

    def quietly(form: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with contextlib.redirect_stdout(sys.stderr):
                return form()

        return call

    return {"pykeops logsumexp": quietly(logsumexp), "pykeops exp-sum, unshifted": quietly(exp_sum)}


def spread_cases(size: int, spread: float) -> Iterator[Case]:
    """Yield both products of logs with this standard deviation; for the signed one, which share took which rung.

    A dense product has no place here: its factors would overflow. The rival is the formula over all terms at once.
    """
    a, b = (spread * torch.randn(size, size) for _ in range(2))
    left, right = (torch.randint(0, 2, (size, size), dtype=torch.int8) * 2 - 1 for _ in range(2))

    def signed_broadcast() -> Tensor:
        terms = a[:, :, None] + b
        largest = terms.amax(1)
        total = terms.sub_(largest[:, None]).exp_().mul_(left[:, :, None]).mul_(right).sum(1)
        return total.abs_().log_().add_(largest)

    shares = lns.matmul_report(left, a, right, b).shares()
    rungs = "; " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items() if share)
    unsigned = Rival("so8t", without_graph(lambda: lns.logmatmulexp(a, b)))
    signed = Rival("so8t", without_graph(lambda: lns.matmul(left, a, right, b)))
    broadcast = Rival("broadcast", without_graph(lambda: torch.logsumexp(a[:, :, None] + b, 1)))
    for name, ours, rival, note in (
        ("unsigned", unsigned, broadcast, ""),
        ("signed", signed, Rival("broadcast", without_graph(signed_broadcast)), rungs),
    ):
        title = f"{name} fwd {size}³, logs of std {spread:g}"
        yield Case(title, shape(size, ours.run) + note, "float32", (ours, rival), repeats=3)


def layer_case(size: int) -> Case:
    """Return one forward and backward of the layer against the dense layer's."""
    x, cotangent = torch.randn(size, size, requires_grad=True), torch.randn(size, size)
    ours, dense = LNSLinear(size, size), nn.Linear(size, size)

    def step(layer: nn.Linear) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layer(x), (x, layer.weight, layer.bias), cotangent)

    rivals = Rival("so8t", step(ours)), Rival("nn.Linear", step(dense))
    return Case(f"LNSLinear fwd+bwd {size}³", shape(size, rivals[0].run), "float32", rivals, repeats=21)


def without_graph(function: Callable[[], object]) -> Callable[[], object]:
    """Return a function that runs without recording derivatives."""
    return torch.no_grad()(function)


def shape(size: int, call: Callable[[], object]) -> str:
    """Return the size of a product and the peak of the bytes that one call allocates."""
    call()
    return f"{size}³, peak {peak_bytes(call) / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(run("benchmarks.lns"))
