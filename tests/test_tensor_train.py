"""What one pair cannot say about tensor trains: memory, bits, registration, refusals, and sizes beyond one tile."""

import functools
import itertools
import math
import tracemalloc

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from so8t_torch.core.errors import BackendError, DomainError
from so8t_torch.ops import tensor_train as room

# vocabulary factors, feature factors, ranks; V and D are cropped by 7 and by 5
SHAPES = {
    "two": ((31, 33), (6, 10), (4,)),
    "two_dense": ((31, 33), (6, 10), (48,)),
    "three": ((9, 10, 11), (4, 3, 5), (3, 4)),
}
MEGABYTE = 1 << 20


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def drawn_cores(v, w, inner, seed=0, dtype=torch.float64):
    ranks = (1, *inner, 1)
    return [
        drawn(v[k], ranks[k], ranks[k + 1], w[k], seed=seed + k, dtype=dtype) / ranks[k + 1] ** 0.5
        for k in range(len(v))
    ]


def dense_table(cores):
    """E as a sum of Kronecker products, one for every path of ranks."""
    paths = itertools.product(*(range(core.shape[2]) for core in cores))
    terms = []
    for path in paths:
        slices = [core[:, p, q] for core, p, q in zip(cores, (0, *path), path, strict=False)]
        terms.append(functools.reduce(torch.kron, slices))
    return torch.stack(terms).sum(0)


def leaves(cores):
    return [core.detach().clone().requires_grad_() for core in cores]


def zipf_ids(count, size, seed=0):
    """Draw ids of which few are frequent, as those of text are."""
    weights = 1.0 / torch.arange(1, size + 1, dtype=torch.float64)
    return torch.multinomial(weights, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def close(found, wanted, eps=256.0):
    found, wanted = found.detach(), wanted.detach()
    unit = torch.finfo(wanted.dtype).eps * max(float(wanted.abs().max()), 1e-300)
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= eps * unit


def allocated(call):
    """Return the peak of bytes that PyTorch and NumPy allocate while ``call`` runs, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        # not earlier: the profiler loads the compiler when it starts
        tracemalloc.start()
        kept = call()
        outside = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    events, changes = list(recorded.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    del kept
    return max(itertools.accumulate((size for _, size in sorted(changes)), initial=0)) + outside


@pytest.mark.parametrize("kind", SHAPES)
def test_many_rows_and_their_gradients_are_those_of_the_dense_table(kind):
    v, w, inner = SHAPES[kind]
    size, width = math.prod(v) - 7, math.prod(w) - 5
    ids = zipf_ids(700, size)
    ours, plain = leaves(drawn_cores(v, w, inner)), leaves(drawn_cores(v, w, inner))
    found = room.rows(ids, *ours, vocab_size=size, d_model=width)
    wanted = dense_table(plain)[ids, :width]
    close(found, wanted)
    cotangent = drawn(*wanted.shape, seed=9)
    pulled = torch.autograd.grad(found, ours, cotangent)
    for ours_grad, plain_grad in zip(pulled, torch.autograd.grad(wanted, plain, cotangent), strict=True):
        close(ours_grad, plain_grad)


@pytest.mark.parametrize("kind", SHAPES)
def test_loss_over_many_slabs_is_that_of_the_dense_logits(kind):
    v, w, inner = SHAPES[kind]
    size, width = math.prod(v) - 7, math.prod(w) - 5
    targets = zipf_ids(600, size)
    targets[::7] = -100
    results = []
    for fused in (True, False):
        cores, hidden = leaves(drawn_cores(v, w, inner)), drawn(600, width, seed=5).requires_grad_()
        if fused:
            loss = room.cross_entropy(hidden, targets, *cores, vocab_size=size)
        else:
            dense = hidden @ dense_table(cores)[:size, :width].T
            loss = torch.nn.functional.cross_entropy(dense, targets, reduction="none")
        results.append((loss, *torch.autograd.grad(loss, (hidden, *cores), drawn(600, seed=6))))
    for ours, plain in zip(*results, strict=True):
        close(ours, plain, 1024.0)


@pytest.mark.parametrize("kind", SHAPES)
def test_largest_logits_over_many_slabs_are_those_of_a_stable_sort(kind):
    v, w, inner = SHAPES[kind]
    size = math.prod(v) - 7
    generator = torch.Generator().manual_seed(0)
    # whole numbers: sums are exact, and most logits are tied
    cores = [torch.randint(-1, 2, core.shape, generator=generator).double() for core in drawn_cores(v, w, inner)]
    hidden = torch.randint(-2, 3, (40, math.prod(w)), generator=generator).double()
    wanted = (hidden @ dense_table(cores)[:size].T).sort(dim=1, descending=True, stable=True)
    for k in (1, 50, size):
        values, ids = room.topk(hidden, *cores, k=k, vocab_size=size)
        assert torch.equal(ids, wanted.indices[:, :k])
        assert torch.equal(values, wanted.values[:, :k])
    assert torch.equal(room.logits(hidden, *cores, vocab_size=size), hidden @ dense_table(cores)[:size].T)


def test_head_is_the_transpose_of_the_embedding():
    v, w, inner = SHAPES["two"]
    cores = drawn_cores(v, w, inner)
    g, h = drawn(11, math.prod(v), seed=3), drawn(11, math.prod(w), seed=4)
    embedded = g @ room.rows(torch.arange(math.prod(v)), *cores)
    close((room.logits(h, *cores) * g).sum(), (h * embedded).sum(), 4096.0)


def test_very_large_logits_neither_overflow_nor_vanish():
    cores = [torch.eye(4, dtype=torch.float32).reshape(4, 1, 4, 1), torch.eye(4).T.reshape(4, 4, 1, 1)]
    # E[i1 4 + i2] = [i1 = i2]: one feature, and logits h or 0
    hidden = torch.tensor([[1e4], [-1e4], [3e38]])
    loss = room.cross_entropy(hidden, torch.tensor([0, 0, 1]), *cores)
    assert loss[0] == pytest.approx(math.log(4.0), abs=1e-3)
    assert loss[1] == pytest.approx(1e4 + math.log(12.0), rel=1e-6)
    assert loss[2] == pytest.approx(3e38, rel=1e-6)


def test_ignored_tokens_cost_nothing_whatever_they_hold():
    cores, hidden = leaves(drawn_cores(*SHAPES["two"])), drawn(5, 60)
    hidden[1], hidden[3] = torch.nan, torch.inf
    hidden.requires_grad_()
    targets = torch.tensor([3, -100, 7, -100, 1022])
    loss = room.cross_entropy(hidden, targets, *cores)
    loss.sum().backward()
    assert torch.equal(loss[[1, 3]], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(hidden.grad[[1, 3]], torch.zeros(2, 60, dtype=torch.float64))
    assert all(core.grad.isfinite().all() for core in cores)
    nothing = room.cross_entropy(hidden, torch.full((5,), -100), *cores)
    gradients = torch.autograd.grad(nothing.sum(), (hidden, *cores))
    assert torch.equal(nothing, torch.zeros_like(nothing))
    assert not any(gradient.any() for gradient in gradients)


def test_not_a_number_stays_in_the_rows_that_hold_it():
    v, w, inner = SHAPES["two"]
    cores = drawn_cores(v, w, inner)
    cores[1][2, 1, 0, 3] = torch.nan
    bad = room.rows(torch.arange(v[0] * v[1]), *cores).isnan()
    expected = torch.zeros_like(bad).view(*v, *w)
    expected[:, 2, :, 3] = True
    assert torch.equal(bad, expected.view_as(bad))


def test_padding_hides_what_its_slices_hold():
    cores = leaves(drawn_cores(*SHAPES["two"]))
    with torch.no_grad():
        cores[0][0] = torch.nan
    found = room.rows(torch.tensor([0, 40, 0]), *cores, padding_idx=0)
    assert torch.equal(found[[0, 2]], torch.zeros(2, 60, dtype=torch.float64))
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), cores))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_is_an_id(dtype):
    cores = drawn_cores(*SHAPES["two"])
    ids = torch.tensor([[3, 0], [99, 3]])
    assert torch.equal(room.rows(ids.to(dtype), *cores), room.rows(ids, *cores))
    hidden = drawn(2, 2, 60)
    assert torch.equal(room.cross_entropy(hidden, ids.to(dtype), *cores), room.cross_entropy(hidden, ids, *cores))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_any_number_of_axes_and_no_tokens_at_all(shape):
    cores = leaves(drawn_cores(*SHAPES["three"]))
    ids = torch.arange(math.prod(shape)).reshape(shape)
    found = room.rows(ids, *cores)
    assert found.shape == (*shape, 60)
    loss = room.cross_entropy(found, ids, *cores)
    assert loss.shape == shape
    assert room.logits(found, *cores).shape == (*shape, 990)
    assert room.topk(found, *cores, k=2)[1].shape == (*shape, 2)
    gradients = torch.autograd.grad(loss.sum(), cores)
    assert [g.shape for g in gradients] == [core.shape for core in cores]
    assert any(g.any() for g in gradients) == (math.prod(shape) > 0)


def test_a_wrong_id_is_named_with_its_place():
    cores = drawn_cores(*SHAPES["two"])
    with pytest.raises(DomainError, match=r"1023.*\(1, 0\)"):
        room.rows(torch.tensor([[4, 5], [1023, 7]]), *cores)
    with pytest.raises(DomainError, match=r"\[0, 1016\)"):
        room.rows(torch.tensor([1016]), *cores, vocab_size=1016)
    with pytest.raises(DomainError, match="targets"):
        room.cross_entropy(drawn(1, 60), torch.tensor([-1]), *cores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_the_same_bits_in_every_run_and_for_every_order_of_different_ids(dtype):
    v, w, inner = SHAPES["two"]
    ids, cores = zipf_ids(900, math.prod(v)), drawn_cores(v, w, inner, dtype=dtype)
    cotangent = drawn(900, math.prod(w), seed=3, dtype=dtype)
    # tokens of one id keep their order, different ids change places
    mixed = torch.argsort((ids * 7919) % 1021, stable=True)
    results = []
    for order in (torch.arange(900), torch.arange(900), mixed):
        used = leaves(cores)
        found = room.rows(ids[order], *used)
        results.append((found[torch.argsort(order)], *torch.autograd.grad(found, used, cotangent[order])))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_rows_of_equal_ids_are_equal_bits_wherever_they_stand():
    cores = drawn_cores(*SHAPES["three"], dtype=torch.float32)
    ids = zipf_ids(500, 990)
    found = room.rows(ids, *cores)
    _, first = torch.unique(ids, return_inverse=True)
    representative = torch.stack([found[ids == i][0] for i in torch.unique(ids)])
    assert torch.equal(found, representative[first])


@pytest.mark.parametrize("op", ["rows", "cross_entropy"])
def test_only_ids_and_parameters_are_kept_for_the_backward_pass(op):
    cores, ids = leaves(drawn_cores(*SHAPES["two"], dtype=torch.float32)), zipf_ids(800, 1023)
    hidden = drawn(800, 60, dtype=torch.float32).requires_grad_()
    kept = {}

    def record(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(record, lambda tensor: tensor):
        out = room.rows(ids, *cores) if op == "rows" else room.cross_entropy(hidden, ids, *cores)
    out.sum().backward()
    parameters = sum(core.nbytes for core in cores)
    # the loss keeps hidden, one log-sum-exp per token, and the ids as 64 bits with it
    allowed = ids.nbytes + parameters + (hidden.nbytes + 2 * 4 * ids.numel() if op == "cross_entropy" else 0)
    assert 0 < sum(kept.values()) <= allowed


def test_rows_take_less_than_four_megabytes_beyond_results():
    cores = leaves(drawn_cores((180, 180), (48, 64), (16,), dtype=torch.float32))
    ids = zipf_ids(1024, 32064)
    parameters = sum(core.nbytes for core in cores)
    found = room.rows(ids, *cores)
    cotangent = torch.ones_like(found)
    assert allocated(lambda: room.rows(ids, *cores)) - found.nbytes <= 4 * MEGABYTE
    backward = allocated(lambda: torch.autograd.grad(found, cores, cotangent, retain_graph=True))
    assert backward - parameters <= 4 * MEGABYTE


@pytest.mark.parametrize(("rank", "tokens"), [(4, 1536), (64, 3072)])
def test_head_and_loss_take_less_than_a_tenth_of_the_logits(rank, tokens):
    cores = leaves(drawn_cores((100, 100), (16, 16), (rank,), dtype=torch.float32))
    hidden, targets = drawn(tokens, 256, dtype=torch.float32).requires_grad_(), zipf_ids(tokens, 9990)

    def step():
        loss = room.cross_entropy(hidden, targets, *cores, vocab_size=9990)
        return torch.autograd.grad(loss.sum(), (hidden, *cores))

    assert allocated(step) < tokens * 9990 * 4 / 10


def test_the_smallest_rank_that_holds_a_cropped_table_is_found_by_least_squares():
    v, w, rank = (8, 9), (6, 6), (4,)
    table = dense_table(drawn_cores(v, w, rank))[:67, :35]

    def error(cores):
        return float((dense_table(cores)[:67, :35] - table).norm() / table.norm())

    cores = room.decompose(table, vocab_factors=v, feature_factors=w, ranks=rank)
    errors = [error(cores)]
    for _ in range(4):
        cores = room.refine(table, *cores, sweeps=5)
        errors.append(error(cores))
    assert errors[0] > 0.02
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


def test_operators_are_registered_soundly():
    cores, ids = leaves(drawn_cores((3, 4), (2, 3), (2,))), torch.tensor([0, 5, 5, 11])
    rows, loss = torch.ops.so8t.tensor_train_rows.default, torch.ops.so8t.tensor_train_cross_entropy.default
    torch.library.opcheck(rows, (ids, cores, 6, None, "tiled"))
    torch.library.opcheck(rows, (ids, cores, 5, 5, "tiled"))
    hidden = drawn(4, 6).requires_grad_()
    torch.library.opcheck(loss, (hidden, ids, cores, 12, -100, "tiled"))


def test_a_tangent_takes_plain_operations_or_is_refused():
    cores, ids, hidden = drawn_cores((3, 4), (2, 3), (2,)), torch.tensor([0, 5, 11]), drawn(3, 6)
    direction = drawn(*cores[0].shape, seed=7)

    def along(function):
        return torch.func.jvp(function, (cores[0],), (direction,))[1]

    close(along(lambda core: room.rows(ids, core, cores[1])), room.rows(ids, direction, cores[1]))
    close(along(lambda core: room.logits(hidden, core, cores[1])), room.logits(hidden, direction, cores[1]))
    probability = room.logits(hidden, *cores).softmax(1)
    slope = room.logits(hidden, direction, cores[1])
    wanted = (probability * slope).sum(1) - slope.gather(1, ids[:, None])[:, 0]
    close(along(lambda core: room.cross_entropy(hidden, ids, core, cores[1])), wanted)
    with pytest.raises(BackendError, match="tangent"):
        along(lambda core: room.rows(ids, core, cores[1], backend="tiled"))


def test_backends_explain_themselves():
    text = room.explain_backend(*drawn_cores((3, 4), (2, 3), (2,)))
    assert all(name in text for name in ("triton", "tiled", "eager"))
