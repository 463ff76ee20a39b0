"""What one pair cannot say about the resolvent: causality, segments, precision, bounds, registration, transforms."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from so8t_torch.core.errors import BackendError, DomainError
from so8t_torch.ops import tridiagonal as room
from so8t_torch.ops.tridiagonal import eager

RATIOS = torch.ops.so8t.tridiagonal_ratios.default
SCAN = torch.ops.so8t.tridiagonal_linear_scan.default
BACKENDS = ["blocked", "eager"]


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def complex_drawn(*shape, seed=0):
    return torch.complex(drawn(*shape, seed=seed), drawn(*shape, seed=seed + 100))


def chains(batch, n, seed=0, dtype=torch.complex128):
    """Return complex potentials with Γ > 0, couplings b ≠ c and z of some chains."""
    h = torch.complex(drawn(batch, n, seed=seed), -0.05 - drawn(batch, n, seed=seed + 1).abs())
    b, c = (0.4 * complex_drawn(batch, n - 1, seed=seed + k) for k in (2, 3))
    z = torch.complex(drawn(batch, seed=seed + 4), 0.3 + drawn(batch, seed=seed + 5).abs())
    return [x.to(dtype) for x in (h, b, c, z)]


def hopping(n, imaginary, seed=0):
    """Return a real chain with β ≥ 0 and z at a given height."""
    b = drawn(1, n - 1, seed=seed + 1)
    return drawn(1, n, seed=seed), b, b, torch.tensor([0.1 + imaginary * 1j], dtype=torch.complex128)


def to_single(chain):
    return [x.to(torch.complex64 if x.is_complex() else torch.float32) for x in chain]


def by_recurrence(h, b, c, z):
    """Return L of one chain in complex128, site by site."""
    d = h.numpy().astype(np.complex128) - complex(z)
    found = [d[0]]
    for beta, d_i in zip((b * c).numpy(), d[1:], strict=True):
        found.append(d_i - beta / found[-1])
    return np.asarray(found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [5, 40, 300])
def test_a_later_site_changes_no_bit_of_the_causal_part(backend, n):
    h, b, c, z = chains(2, n, dtype=torch.complex64)
    before = room.green(h, b, c, z, backend=backend)
    for j in (1, n // 2, n - 1):
        h_edited, b_edited, c_edited = h.clone(), b.clone(), c.clone()
        h_edited[:, j:] += 1.0
        b_edited[:, j - 1 :] *= 2.0
        c_edited[:, j - 1 :] *= 1j
        after = room.green(h_edited, b_edited, c_edited, z, backend=backend)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j:], before[:, j:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan])
def test_a_later_infinity_does_not_reach_the_past(backend, poison):
    h, b, c, z = chains(2, 70, dtype=torch.complex64)
    before = room.green(h, b, c, z, backend=backend)
    for j in (1, 33, 69):
        edited = h.clone()
        edited[:, j:] = torch.complex(torch.tensor(poison), torch.tensor(-0.5))
        after = room.green(edited, b, c, z, backend=backend)
        assert torch.equal(after[:, :j], before[:, :j])


@pytest.mark.parametrize("mode", ["causal", "full"])
def test_a_segment_never_sees_another_one_nor_gets_its_gradient(mode):
    h, b, c, z = (x.requires_grad_() for x in chains(2, 90, dtype=torch.complex64))
    ids = torch.tensor([3] * 20 + [0] * 47 + [3] * 23).expand(2, -1)
    own = slice(20, 67)

    def result(h, b, c):
        g = room.green(h, b, c, z, ids, mode=mode)
        return g, torch.autograd.grad(g[:, own].abs().square().sum(), (h, b, c))

    before, slopes = result(h, b, c)
    poison = torch.full_like(h, complex(torch.nan, torch.nan))
    poisoned = [torch.cat([poison[:, :20], h[:, own], poison[:, 67:]], 1)]
    poisoned += [torch.cat([poison[:, :20], x[:, 20:66], poison[:, 66 : x.shape[1]]], 1) for x in (b, c)]
    after, found = result(*poisoned)
    assert torch.equal(after[:, own], before[:, own])
    for slope, expected in zip(found, slopes, strict=True):
        assert torch.equal(slope[:, 20:66], expected[:, 20:66])
        assert torch.equal(expected[:, :20], torch.zeros_like(expected[:, :20]))
    plain = room.green(*poisoned, z, ids, mode=mode, backend="eager")[:, own]
    assert torch.allclose(plain, before[:, own], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["causal", "full"])
def test_segments_and_padding_give_what_each_chain_gives_alone(mode):
    lengths = (20, 47, 23)
    alone = [chains(2, n, seed=10 * n) for n in lengths]
    z = alone[0][3]
    padding = complex_drawn(2, 6, seed=9).abs().to(torch.complex128)
    h = torch.cat([chain[0] for chain in alone] + [padding], 1)
    b, c = (torch.cat([x for chain in alone for x in (chain[k], padding[:, :1])] + [padding[:, 1:]], 1) for k in (1, 2))
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate((*lengths, 6))])
    together = room.green(h, b, c, z, ids.expand(2, -1), mode=mode)[:, :90].split(lengths, 1)
    for found, chain in zip(together, alone, strict=True):
        expected = room.green(*chain[:3], z, mode=mode)
        assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_off_diagonals_of_a_segment_ignore_what_is_not_a_number_in_another():
    h, b, c, z = chains(1, 12)
    ids = torch.tensor([[0] * 5 + [1] * 7])
    before = room.off_diagonals(h, b, c, z, ids)
    h[:, :5] = torch.nan
    for found, expected in zip(room.off_diagonals(h, b, c, z, ids), before, strict=True):
        assert torch.equal(found[:, 5:], expected[:, 5:])
        assert torch.equal(found[:, 4], torch.zeros_like(found[:, 4]))


@pytest.mark.parametrize("pieces", [(1,) * 23, (23,), (7, 1, 15), (11, 12)])
def test_any_pieces_of_a_stream_give_what_one_chain_gives(pieces):
    h, b, c, z = chains(2, 23)
    d = h - z[:, None]
    beta = torch.cat([torch.zeros_like(b[:, :1]), b * c], 1)
    expected = room.green(h, b, c, z)
    state, found = torch.zeros_like(z), []
    for part_d, part_beta in zip(d.split(pieces, 1), beta.split(pieces, 1), strict=True):
        if part_d.shape[1] == 1:
            g, state = room.step(state, part_d[:, 0], part_beta[:, 0])
            g = g[:, None]
        else:
            g, state = room.advance(state, part_d, part_beta)
        found.append(g)
    assert torch.allclose(torch.cat(found, 1), expected, rtol=1e-13, atol=0)


def test_a_stream_restarts_where_the_coupling_is_zero_whatever_came_before():
    d, beta = complex_drawn(1, 5) - 1j, torch.zeros(1, 5, dtype=torch.float64)
    lost = torch.full((1,), complex(torch.nan, 0), dtype=torch.complex128)
    assert torch.equal(room.advance(lost, d, beta)[0], 1 / d)
    assert torch.equal(room.step(lost, d[:, 0], beta[:, 0])[0], 1 / d[:, 0])


@pytest.mark.parametrize("imaginary", [1.0, 0.1, 0.01])
def test_single_precision_keeps_five_digits_of_a_long_chain(imaginary):
    chain = hopping(65536, imaginary)
    single = to_single(chain)
    exact = 1 / by_recurrence(*(x[0].double() if not x.is_complex() else x[0].to(torch.complex128) for x in single))
    found = room.green(*single).numpy()[0]
    assert np.abs(found - exact).max() <= 1e-5 * np.abs(exact).max()
    assert (np.abs(found - exact) / np.abs(exact)).max() <= 1e-5


def test_hopping_chains_obey_the_herglotz_bound():
    for imaginary in (0.01, 1.0):
        h, b, c, z = hopping(4096, imaginary)
        rates = 0.1 * drawn(1, 4096, seed=7).abs()
        for mode in ("causal", "full"):
            g = room.green(torch.complex(h, -rates), b, c, z, mode=mode)
            assert (g.abs() * (rates + imaginary)).max() <= 1 + 1e-12
            assert g.imag.min() >= 0


def test_the_ward_identity_in_linear_time():
    n = 200
    rates = 0.2 * drawn(1, n, seed=3).abs()
    h, b, c, z = hopping(n, 0.05, seed=5)
    h = torch.complex(h, -rates)
    left, right = (x[0] for x in room.ratios(h, b, c, z))
    full = room.green(h, b, c, z, mode="full")[0]
    lost = (rates[0] + 0.05).clone()
    weight_left, weight_right = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for i in range(1, n):
        weight_left[i] = (b[0, i - 1] / left[i - 1]).abs().square() * (lost[i - 1] + weight_left[i - 1])
    for i in range(n - 2, -1, -1):
        weight_right[i] = (b[0, i] / right[i + 1]).abs().square() * (lost[i + 1] + weight_right[i + 1])
    total = full.abs().square() * (lost + weight_left + weight_right)
    assert torch.allclose(full.imag, total, rtol=1e-10, atol=0)


def test_the_gradient_is_that_of_a_dense_inverse():
    n = 24
    chain = [x.requires_grad_() for x in chains(2, n)]
    weight = complex_drawn(2, n, seed=50)

    def dense(h, b, c, z):
        matrix = torch.diag_embed(h - z[:, None]) + torch.diag_embed(b, 1) + torch.diag_embed(c, -1)
        return torch.linalg.inv(matrix).diagonal(dim1=1, dim2=2)

    expected = torch.autograd.grad(dense(*chain), chain, weight)
    found = torch.autograd.grad(room.green(*chain, mode="full"), chain, weight)
    for slope, wanted in zip(found, expected, strict=True):
        assert (slope - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_a_later_site_gets_its_credit_from_the_last_one_and_an_earlier_one_too():
    h, b, c, z = chains(1, 30)
    h.requires_grad_()
    (slope,) = torch.autograd.grad(room.green(h, b, c, z)[:, -1].abs().sum(), h)
    assert (slope != 0).all()


@pytest.mark.parametrize("size", [8, 32, 256])
def test_the_size_of_a_block_changes_the_last_digits_at_most(monkeypatch, size):
    chain = chains(2, 333)
    expected = room.green(*chain, mode="full", backend="eager")
    monkeypatch.setattr(eager, "block_size", lambda _: size)
    assert torch.allclose(room.green(*chain, mode="full"), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reverse", [[False], [True], [True, False]])
def test_the_linear_scan_is_a_loop(reverse):
    m, s = (complex_drawn(len(reverse), 3, 50, seed=k).numpy() for k in (1, 2))
    m[:, 1, [7, 30]] = 0
    expected = np.array(s)
    for side, backwards in enumerate(reverse):
        order = range(50)[:: -1 if backwards else 1]
        for before, i in pairwise(order):
            expected[side, :, i] += m[side, :, i] * expected[side, :, before]
    found = SCAN(torch.from_numpy(m), torch.from_numpy(s), reverse, "blocked").numpy()
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_no_scale_of_energy_leaves_the_range_of_single_precision(scale):
    h, b, c, z = hopping(3000, 0.5)
    expected = room.green(h, b, c, z)
    h, b, z = (x * scale for x in (h, b, z))
    found = room.green(h.float(), b.float(), b.float(), z.to(torch.complex64)) * scale
    assert torch.allclose(found.to(torch.complex128), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_coupling_whose_product_leaves_the_range_spoils_its_segment_from_there_on(backend):
    h, b, c, z = to_single(hopping(60, 0.5))
    ids = torch.tensor([0] * 40 + [1] * 20)
    before = room.green(h, b, c, z, ids, backend=backend)
    for scale, fate in ((2.0**70, "lost"), (2.0**-90, "parted")):
        b[:, 20] = c[:, 20] = scale
        found = room.green(h, b, c, z, ids, backend=backend)
        assert torch.equal(found[:, :21], before[:, :21])
        assert torch.equal(found[:, 40:], before[:, 40:])
        alone = room.green(h[:, 21:40], b[:, 21:39], c[:, 21:39], z, backend=backend)
        if fate == "lost":
            assert found[:, 21:40].isnan().all()
        else:
            assert torch.allclose(found[:, 21:40], alone, rtol=1e-6, atol=0)


def test_other_units_of_energy_bring_a_chain_into_the_range():
    large = [2.0**66 * x for x in to_single(hopping(60, 0.5))]
    expected = room.green(*(x.to(torch.complex128) for x in large))
    assert room.green(*large).isnan().any()
    found = room.green(*(x * 2.0**-66 for x in large)) * 2.0**-66
    assert torch.allclose(found.to(torch.complex128), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [2.0**-249, 2.0**-133, 2.0**126, 2.0**249])
def test_no_scale_of_energy_leaves_the_range_of_double_precision(scale):
    h, b, c, z = hopping(100, 0.5)
    dense = np.diag(h[0]) + np.diag(b[0], 1) + np.diag(c[0], -1) - complex(z) * np.eye(100)
    expected = np.diag(np.linalg.inv(dense))
    found = room.green(*(scale * x for x in (h, b, c, z)), mode="full")[0] * scale
    assert np.abs(found.numpy() - expected).max() <= 1e-12 * np.abs(expected).max()


def test_exact_zeros_of_a_minor_stay_in_their_segment():
    h = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    one = torch.ones(1, 5, dtype=torch.float64)
    z = torch.zeros(1, dtype=torch.complex128)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    for backend in BACKENDS:
        g = room.green(h, one, one, z, ids, require_dissipation=False, backend=backend)
        with pytest.raises(DomainError, match="Im z > 0"):
            room.green(h, one, one, z, ids, backend=backend)
        assert torch.isfinite(torch.view_as_real(g[:, 3])).all()


def test_compiled_graphs_answer_nan_where_there_is_no_dissipation():
    h, b, c, z = chains(2, 5)
    compiled = torch.compile(lambda *chain: room.green(*chain), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(h, b, c, z), room.green(h, b, c, z), rtol=1e-12, atol=0)
    z[1] = z[1].conj()
    found = compiled(h, b, c, z)
    assert torch.isfinite(torch.view_as_real(found[0])).all()
    assert found[1].isnan().all()


def test_forward_mode_takes_the_plain_form_and_is_never_silently_zero():
    h, b, c, z = chains(2, 9)
    direction = complex_drawn(2, 9, seed=30)
    _, slope = torch.func.jvp(lambda x: room.green(x, b, c, z, mode="full"), (h,), (direction,))
    step = 1e-5
    ahead, behind = (room.green(h + s * 0.02 * direction, b, c, z, mode="full") for s in (step, -step))
    assert torch.allclose(0.02 * slope, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)
    with pytest.raises(BackendError, match="forward-mode tangent"):
        torch.func.jvp(lambda x: room.green(x, b, c, z, backend="blocked"), (h,), (direction,))


@pytest.mark.parametrize("reverse", [[False], [True], [False, True]])
def test_the_registered_operations_pass_opcheck(reverse):
    d, beta = complex_drawn(2, 6).requires_grad_(), complex_drawn(2, 6, seed=5).requires_grad_()
    torch.library.opcheck(RATIOS, (d, beta, reverse, "blocked"))
    torch.library.opcheck(RATIOS, (d.detach().mT.contiguous().mT.requires_grad_(), beta, reverse, "blocked"))
    m, s = (complex_drawn(len(reverse), 2, 6, seed=k).requires_grad_() for k in (1, 2))
    torch.library.opcheck(SCAN, (m, s, reverse, "blocked"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_agree_with_finite_differences(backend):
    chain = [x.requires_grad_() for x in chains(1, 4)]
    for mode in ("causal", "full"):
        assert torch.autograd.gradgradcheck(lambda *x, m=mode: room.green(*x, mode=m, backend=backend), chain)


def test_six_complex_numbers_per_site_are_kept_for_backward():
    kept = {}
    chain = [x.requires_grad_() for x in chains(2, 1000, dtype=torch.complex64)]
    inputs = {x.untyped_storage().data_ptr() for x in chain}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda t: t):
        room.green(*chain, mode="full")
    assert sum(size for where, size in kept.items() if where not in inputs) <= 6 * 8 * 2 * 1000


def test_couplings_and_z_are_shared_by_broadcasting():
    h, b, c, z = chains(3, 8)
    shared = room.green(h, b[0], c[:1], z[1], mode="full")
    written = room.green(h, b[:1].expand(3, -1), c[:1].expand(3, -1), z[1].expand(3), mode="full")
    assert torch.equal(shared, written)


def test_autocast_leaves_the_precision_alone():
    h, b, c, z = to_single(hopping(50, 0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = room.green(h, b, c, z)
    assert torch.equal(inside, room.green(h, b, c, z))


def test_the_transforms_of_torch_func_take_the_plain_form():
    h, b, c, z = hopping(9, 0.5)

    def loss(x, backend="auto"):
        return room.green(x, b, c, z, mode="full", backend=backend).abs().sum()

    given = h.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(given), given)
    assert torch.allclose(torch.func.grad(loss)(h), expected, rtol=1e-10)
    with pytest.raises(BackendError, match=r"torch\.func differentiates"):
        torch.func.grad(lambda x: loss(x, "blocked"))(h)


def test_the_choice_of_backend_can_be_explained():
    lines = room.explain_backend(torch.zeros(3)).splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["triton", "blocked", "eager"]
