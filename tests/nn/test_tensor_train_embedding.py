"""The tensor-train embedding against dense tables built by hand from its cores."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.tensor_train_compression import compress_embedding, permutation_of
from so8t_torch.nn.tensor_train_embedding import (
    calculate_htt_memory_savings,
    create_htt_embedding,
    replace_embedding_with_htt,
    tt_contraction_memory_efficient,
    verify_compression_ratio,
    verify_gradient_flow,
)

V, D = 90, 24


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def by_hand(layer: HolographicTTEmbedding, factor: torch.Tensor | None = None) -> torch.Tensor:
    """The dense table in the order of the ids, from sums over digits and ranks alone."""
    cores = [c.detach().double() for c in layer.stored_cores()]
    if layer.complex_cores:
        cores = [torch.complex(c[..., 0], c[..., 1]) for c in cores]
    angle = layer.phase_shift.detach().double()
    if factor is None:
        factor = torch.exp(1j * angle) if layer.complex_cores else angle.cos()
    cores = [c.to(torch.promote_types(c.dtype, factor.dtype)) for c in cores]
    cores[0] = cores[0] * factor[None, None, :, None]
    if len(cores) == 2:
        whole = torch.einsum("ipra,jrqb->ijab", *cores)
    else:
        whole = torch.einsum("ipra,jrsb,ksqc->ijkabc", *cores)
    rows = math.prod(layer.vocab_factors)
    return whole.reshape(rows, -1)[layer.id_permutation, : layer.d_model]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("permutation", ["golden", "identity"])
def test_rows_are_those_of_the_dense_table(cores, permutation):
    layer = HolographicTTEmbedding(V, D, 4, cores, id_permutation=permutation, dtype=torch.float64)
    ids = torch.randint(V, (3, 7))
    assert relative(layer(ids), by_hand(layer)[ids]) < 1e-12
    assert relative(layer.dense_table(), by_hand(layer)) < 1e-12
    assert layer(ids).shape == (3, 7, D)


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_forward_complex_has_the_full_phase(cores, whole):
    layer = HolographicTTEmbedding(V, D, 4, cores, complex_cores=whole, dtype=torch.float64)
    nn.init.normal_(layer.phase_shift)
    ids = torch.arange(V).reshape(9, 10)
    wanted = by_hand(layer, torch.exp(1j * layer.phase_shift.detach()))[ids]
    found = layer.forward_complex(ids)
    assert found.dtype == torch.complex128
    assert relative(found, wanted) < 1e-12
    if not whole:
        assert relative(found.real, layer(ids)) < 1e-12, "the real part of real cores is the cosine"


def test_complex_rows_are_never_made_real_by_dropping_a_part():
    ids = torch.arange(6)
    layer = HolographicTTEmbedding(V, D, 4, complex_cores=True)
    with pytest.raises(DomainError, match="forward_complex"):
        layer(ids)
    pair = HolographicTTEmbedding(V, D, 4, complex_cores=True, emit="pair")
    found, whole = pair(ids), pair.forward_complex(ids)
    assert found.shape == (6, 2 * D)
    assert torch.equal(found, torch.cat([whole.real, whole.imag], -1))
    with pytest.raises(ConfigError, match="complex_cores"):
        HolographicTTEmbedding(V, D, 4, emit="pair")
    with pytest.raises(DomainError, match="float32 or float64"):
        HolographicTTEmbedding(V, D, 4, complex_cores=True, dtype=torch.bfloat16)
    with pytest.raises(DomainError, match="float32 or float64"):
        pair.bfloat16()(ids)


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_the_initial_output_has_the_standard_deviation_asked_for(cores, whole):
    layer = HolographicTTEmbedding(4096, 256, 12, cores, init_scale=0.05, complex_cores=whole)
    assert float(layer.dense_table().detach().abs().square().mean().sqrt()) == pytest.approx(0.05, rel=0.06)


def test_gradients_are_those_of_the_dense_table():
    layer = HolographicTTEmbedding(V, D, (3, 5), 3, dtype=torch.float64)
    ids, cotangent = torch.randint(V, (4, 9)), torch.randn(4, 9, D, dtype=torch.float64)
    layer(ids).backward(cotangent)
    leaves = [p.detach().clone().requires_grad_() for p in (*layer.stored_cores(), layer.phase_shift)]
    first = leaves[0] * leaves[3].cos()[None, None, :, None]
    whole = torch.einsum("ipra,jrsb,ksqc->ijkabc", first, *leaves[1:3]).flatten(3).flatten(0, 2)
    whole[layer.id_permutation[ids]].backward(cotangent)
    for parameter, leaf in zip((*layer.stored_cores(), layer.phase_shift), leaves, strict=True):
        assert relative(parameter.grad, leaf.grad) < 1e-12


def test_a_real_phase_at_zero_gets_no_gradient_a_complex_one_does():
    ids = torch.arange(V)
    real = HolographicTTEmbedding(V, D, 4)
    whole = HolographicTTEmbedding(V, D, 4, complex_cores=True, emit="pair")
    for layer in (real, whole):
        nn.init.zeros_(layer.phase_shift)
        (layer(ids) * torch.randn(V, 1)).sum().backward()
    assert float(real.phase_shift.grad.abs().max()) == 0.0
    assert float(whole.phase_shift.grad.abs().max()) > 0.0


@pytest.mark.parametrize("whole", [False, True])
def test_padding_is_a_zero_row_without_gradient(whole):
    arguments = {"complex_cores": whole, "emit": "pair" if whole else "real"}
    layer = HolographicTTEmbedding(V, D, 4, padding_idx=7, **arguments)
    twin = HolographicTTEmbedding(V, D, 4, **arguments)
    twin.load_state_dict(layer.state_dict())
    ids = torch.tensor([3, 7, 11, 7])
    kept = torch.tensor([True, False, True, False])
    found = layer(ids)
    assert torch.equal(found[~kept], torch.zeros_like(found[~kept]))
    assert torch.equal(found[kept], twin(ids[kept]))
    found.sum().backward()
    twin(ids[kept]).sum().backward()
    for mine, other in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("wrong", [-1, V, -100, 10**9])
@pytest.mark.parametrize("padding", [None, 0])
def test_an_id_out_of_range_is_refused(wrong, padding):
    layer = HolographicTTEmbedding(V, D, 4, padding_idx=padding)
    with pytest.raises(DomainError, match="ids"):
        layer(torch.tensor([[1, wrong]]))


def test_ids_that_are_no_whole_numbers_are_refused():
    layer = HolographicTTEmbedding(V, D, 4)
    for ids in (torch.tensor([1.0]), torch.tensor([True])):
        with pytest.raises(DomainError, match="integer"):
            layer(ids)
        with pytest.raises(DomainError, match="integer"):
            tt_contraction_memory_efficient(ids, ids, *layer.cores(), D)


def test_narrow_ids_do_not_wrap_around():
    layer = HolographicTTEmbedding(300, D, 4, padding_idx=200)
    ids = torch.tensor([127, 5, -56], dtype=torch.int8)
    assert torch.equal(layer(ids[:2]), layer(ids[:2].long()))
    with pytest.raises(DomainError, match="ids"):
        layer(ids)
    wide = torch.randn(300, 1, 3, 4), torch.randn(2, 3, 1, 6)
    with pytest.raises(DomainError, match="ids"):
        tt_contraction_memory_efficient(ids[2:], torch.zeros_like(ids[2:]), *wide, D)


def test_a_complex_table_is_not_compressed_by_its_real_part():
    for table in (torch.randn(V, D, dtype=torch.complex64), torch.ones(V, D, dtype=torch.long), torch.randn(V)):
        with pytest.raises(DomainError, match="real floating-point table"):
            compress_embedding(table)


@pytest.mark.parametrize("size", [1, 2, 3, 90, 97, 32064])
def test_the_golden_permutation_is_a_bijection_that_spreads_neighbours(size):
    found = permutation_of("golden", size)
    assert found.sort().values.tolist() == list(range(size))
    if size > 1000:
        slices = found[:1000] // math.isqrt(size)
        counts = torch.bincount(slices)
        assert int(counts.max()) <= 2 * 1000 / len(counts), "frequent ids share no slice"


def test_a_permutation_must_be_a_bijection():
    for wrong in (torch.zeros(V, dtype=torch.long), torch.arange(V - 1), torch.arange(V).float(), "random"):
        with pytest.raises(ConfigError, match="id_permutation"):
            HolographicTTEmbedding(V, D, 4, id_permutation=wrong)


def test_a_state_dict_carries_everything():
    source = HolographicTTEmbedding(V, D, 4, 3, id_permutation=torch.randperm(V))
    target = HolographicTTEmbedding(V, D, 4, 3)
    target.load_state_dict(source.state_dict())
    assert set(source.state_dict()) == {"core1", "core2", "core3", "phase_shift", "id_permutation"}
    assert torch.equal(target.dense_table(), source.dense_table())
    assert torch.equal(copy.deepcopy(source).dense_table(), source.dense_table())


def test_without_phase_encoding_the_phase_is_a_zero_buffer():
    layer = HolographicTTEmbedding(V, D, 4, phase_encoding=False)
    assert "phase_shift" in dict(layer.named_buffers())
    assert not layer.phase_shift.any()
    assert layer.get_parameter_counts() == (V * D, sum(c.numel() for c in layer.stored_cores()))


@pytest.mark.parametrize(
    ("size", "width", "rank", "wanted"),
    [(50_257, 1024, 16, 229_904), (50_000, 1024, 16, 229_392), (10_000, 1024, 8, 100 * 8 * 32 * 2 + 8)],
)
def test_parameter_counts_are_those_of_the_formula(size, width, rank, wanted):
    layer = HolographicTTEmbedding(size, width, rank, device="meta")
    assert layer.get_parameter_counts() == (size * width, wanted)
    assert layer.get_compression_ratio() == wanted / (size * width)


def test_the_same_generator_gives_the_same_layer():
    first, second = (HolographicTTEmbedding(V, D, 4) for _ in range(2))
    for layer in (first, second):
        layer.reset_parameters(torch.Generator().manual_seed(5))
    assert torch.equal(first.dense_table(), second.dense_table())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_stay_near_the_table(dtype):
    layer = HolographicTTEmbedding(V, D, 4, phase_encoding=False, dtype=dtype)
    ids = torch.arange(V)
    assert layer(ids).dtype == dtype
    assert relative(layer(ids).double(), by_hand(layer)) < torch.finfo(dtype).eps
    assert layer.forward_complex(ids).dtype == torch.complex64


def test_autocast_leaves_the_rows_in_the_dtype_of_the_cores():
    layer, ids = HolographicTTEmbedding(V, D, 4), torch.arange(9)
    plain = layer(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(ids), plain)


def test_checkpointing_changes_nothing():
    layer, ids = HolographicTTEmbedding(V, D, 4, padding_idx=2), torch.randint(V, (2, 5))
    layer(ids).square().sum().backward()
    direct = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    checkpoint(lambda i: layer(i), ids, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), direct, strict=True))


def test_compiled_whole_it_gives_the_same_rows_and_gradients():
    layer, ids = HolographicTTEmbedding(V, D, 4, padding_idx=2), torch.randint(V, (2, 5))
    plain = layer(ids)
    plain.square().sum().backward()
    direct = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    found = torch.compile(layer, fullgraph=True)(ids)
    found.square().sum().backward()
    assert torch.allclose(found, plain, rtol=1e-5, atol=1e-7)
    assert all(torch.allclose(p.grad, g, rtol=1e-4, atol=1e-7) for p, g in zip(layer.parameters(), direct, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0, D), ConfigError, "vocab_size"),
        ((V, D, 4, 1), ConfigError, "num_cores"),
        ((V, D, 4, 4), ConfigError, "num_cores"),
        ((V, D, 10**6), ConfigError, "rank"),
        ((V, D, 0), ConfigError, "rank"),
        ((V, D, (4, 4)), ConfigError, "ranks"),
        ((V, 23), ConfigError, "23"),
        ((90.0, D), ConfigError, "whole numbers"),
        ((V, D, 4, 2, True, math.inf), ConfigError, "init_scale"),
        ((V, D, 4, 2, True, 0.0), ConfigError, "init_scale"),
    ],
)
def test_impossible_layers_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        HolographicTTEmbedding(*arguments)


def test_factors_may_be_given_and_must_cover_the_table():
    layer = HolographicTTEmbedding(V, 23, 2, vocab_factors=(9, 10), feature_factors=(1, 23), dtype=torch.float64)
    assert relative(layer.dense_table(), by_hand(layer)) < 1e-12
    with pytest.raises(ShapeError, match="cover"):
        HolographicTTEmbedding(V, D, 2, vocab_factors=(9, 9))
    for padding in (V, 1.5):
        with pytest.raises(ConfigError, match="padding_idx"):
            HolographicTTEmbedding(V, D, 2, padding_idx=padding)


@pytest.mark.parametrize("kernel", [True, False])
def test_the_contraction_of_two_cores_is_the_sum_over_the_rank(kernel):
    core1 = torch.randn(5, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    core2 = torch.randn(6, 3, 1, 4, dtype=torch.float64, requires_grad=True)
    idx1, idx2 = torch.randint(5, (2, 7)), torch.randint(6, (2, 7))
    found = tt_contraction_memory_efficient(idx1, idx2, core1, core2, 15, use_triton=kernel)
    wanted = torch.einsum("blra,blrc->blac", core1[idx1, 0], core2[idx2, :, 0]).flatten(2)[..., :15]
    assert relative(found, wanted) < 1e-12
    cotangent = torch.randn_like(wanted)
    mine = torch.autograd.grad(found, (core1, core2), cotangent)
    theirs = torch.autograd.grad(wanted, (core1, core2), cotangent)
    assert all(relative(a, b) < 1e-12 for a, b in zip(mine, theirs, strict=True))


def test_a_digit_out_of_range_is_not_carried_into_the_next_row():
    core1, core2 = torch.randn(5, 1, 3, 4), torch.randn(6, 3, 1, 4)
    for one, two in ((0, 6), (5, 0), (0, -1), (1, -1)):
        with pytest.raises(DomainError, match="ids"):
            tt_contraction_memory_efficient(torch.tensor([one]), torch.tensor([two]), core1, core2, 16)
    with pytest.raises(ShapeError, match="one shape"):
        tt_contraction_memory_efficient(torch.tensor([1]), torch.tensor([1, 2]), core1, core2, 16)
    with pytest.raises(ConfigError, match="block_size"):
        tt_contraction_memory_efficient(torch.tensor([1]), torch.tensor([1]), core1, core2, 16, block_size=0)


def test_the_builders_of_the_original_are_there():
    class Settings:
        htt_rank = 5
        htt_phase_encoding = False

    layer = create_htt_embedding(V, D, Settings())
    assert (layer.ranks, layer.phase_encoding, layer.num_cores) == ((5,), False, 2)
    assert create_htt_embedding(V, D, {"htt_num_cores": 3, "htt_rank": 2}).num_cores == 3
    assert create_htt_embedding(V, D).ranks == (16,)
    counted = verify_compression_ratio(layer, target_ratio=1.0)
    assert counted["parameter_reduction"] == counted["standard_params"] - counted["tt_params"]
    assert counted["meets_target"] == (layer.get_compression_ratio() <= 1.0)
    saved = calculate_htt_memory_savings(50_257, 1024, 16, torch.float16)
    assert saved["standard_mb"] == pytest.approx(50_257 * 1024 * 2 / 2**20)
    assert saved["tt_mb"] == pytest.approx(229_904 * 2 / 2**20)


def test_gradient_flow_is_measured_and_nothing_is_left_behind():
    layer = HolographicTTEmbedding(V, D, 4)
    found = verify_gradient_flow(layer, torch.arange(V))
    assert found["all_have_grad"]
    assert {"core1_grad_norm", "core2_has_grad", "phase_shift_grad_norm"} <= set(found)
    assert all(p.grad is None for p in layer.parameters())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(V, D)
        self.position_embedding = nn.Embedding(16, D)
        left, right = torch.randn(10 * 4, 3), torch.randn(3, 9 * 6)
        whole = (left @ right).reshape(10, 4, 9, 6).transpose(1, 2).reshape(V, D)
        with torch.no_grad():
            self.token_embedding.weight.copy_(whole[permutation_of("golden", V)])


def test_an_embedding_is_replaced_by_the_decomposition_of_its_table():
    model = Model()
    table, positions = model.token_embedding.weight.detach().clone(), model.position_embedding
    assert replace_embedding_with_htt(model, config={"htt_rank": 3}) is model
    assert model.position_embedding is positions
    assert relative(model.token_embedding.dense_table(), table) < 1e-5


def test_a_table_that_does_not_fit_is_refused_with_the_rank_that_would_and_nothing_changes():
    model = Model()
    nn.init.normal_(model.position_embedding.weight)
    before = model.token_embedding
    with pytest.raises(DomainError, match=r"got 0\.\d+ at rank 1; rank \d+ would do"):
        replace_embedding_with_htt(model, config={"htt_rank": 1}, predicate=lambda *_: True)
    assert model.token_embedding is before
    fresh = replace_embedding_with_htt(model, "position_embedding", {"htt_rank": 1}, initialise="random")
    assert isinstance(fresh.position_embedding, HolographicTTEmbedding)


def test_what_is_no_plain_embedding_is_not_replaced():
    class Scaled(nn.Embedding):
        pass

    model = Model()
    with pytest.raises(ValueError, match="token_embedding"):
        replace_embedding_with_htt(model, "absent")
    model.other, model.head = Scaled(4, 4), nn.Linear(4, 4)
    for name in ("other", "head"):
        with pytest.raises(TypeError, match=r"plain nn\.Embedding"):
            replace_embedding_with_htt(model, name)
    with pytest.raises(ConfigError, match="initialise"):
        replace_embedding_with_htt(model, initialise="magic")
    with pytest.raises(ConfigError, match="choose"):
        replace_embedding_with_htt(model, predicate=lambda *_: False)
