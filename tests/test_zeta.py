"""The zeros against published values and mpmath's count, the table's seal, and what the formulas promise."""

import importlib.util
import math
from importlib.resources import files
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch

from so8t_torch.core.errors import ConfigError, DataError, DomainError
from so8t_torch.ops import zeta

# A. Odlyzko's table of zeros
PUBLISHED = """
14.134725142 21.022039639 25.010857580 30.424876126 32.935061588 37.586178159 40.918719012 43.327073281 48.005150881
49.773832478 52.970321478 56.446247697 59.347044003 60.831778525 65.112544048 67.079810529 69.546401711 72.067157674
75.704690699 77.144840069 79.337375020 82.910380854 84.735492981 87.425274613 88.809111208 92.491899271 94.651344041
95.870634228 98.831194218 101.317851006
"""


def table_text():
    return files("so8t_torch.ops").joinpath("zeta_zeros.csv").read_text(encoding="ascii")


def test_the_zeros_are_the_published_ones():
    published = torch.tensor([float(word) for word in PUBLISHED.split()], dtype=torch.float64)
    assert (zeta.zeros(30) - published).abs().max() <= 5.001e-10
    gamma = zeta.zeros(1000)
    assert abs(gamma[99] - 236.5242296658) < 1e-9
    assert abs(gamma[999] - 1419.4224809460) < 1e-9


@pytest.mark.parametrize("n", [29, 127, 500, 1024])
def test_no_zero_is_missing(n):
    gamma = zeta.zeros(n + 1)
    middle = float(gamma[n - 1]) + 1e-3
    assert mpmath.nzeros(middle) == n


def test_zeros_increase_strictly_and_the_smallest_gap_is_the_documented_one():
    spacing = zeta.zeros(4096).diff()
    assert spacing.min() > 0
    assert 0.16 < zeta.zeros(1024).diff().min() < 0.17
    assert spacing[1022:1026].min() > 0.5


@pytest.mark.parametrize("n", [1025, 1500])
def test_asymptotic_zeros_are_less_than_a_mean_spacing_off(n):
    exact = float(mpmath.zetazero(n).imag)
    spacing = 2 * math.pi / math.log(exact / (2 * math.pi))
    assert abs(float(zeta.zeros(n)[-1]) - exact) < spacing


def test_a_changed_table_is_refused():
    text = table_text()
    with pytest.raises(DataError, match="checksum"):
        zeta._read_table(text.replace("14.13", "14.14", 1))
    with pytest.raises(DataError, match="1023 numbers"):
        zeta._read_table("\n".join(text.split()[:-1]))
    assert len(zeta._read_table(text.replace("\n", "\r\n"))) == 1024


def test_what_is_returned_can_be_written_to_without_harm():
    zeta.zeros(3).zero_()
    assert zeta.zeros(1)[0] > 14


def test_the_script_makes_the_table(tmp_path, capsys):
    path = Path(__file__).parent.parent / "scripts" / "zeta_zeros.py"
    spec = importlib.util.spec_from_file_location("zeta_zeros", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--count", "5", "--output", str(tmp_path / "zeros.csv")])
    assert (tmp_path / "zeros.csv").read_text().split() == table_text().split()[:5]
    assert "5 zeros, sha256" in capsys.readouterr().out
    assert script.checksum(table_text().split()) == zeta.CHECKSUM


def test_unfolded_zeros_have_mean_spacing_one_and_repel_each_other():
    spacing = zeta.unfolded(1024).diff()
    assert abs(float(spacing.mean()) - 1.0) < 1e-3
    # a Poisson process of the same density has 10 % of its gaps below 0.1; random Hermitian matrices have 0.1 %
    assert float((spacing < 0.1).double().mean()) < 0.005


@pytest.mark.parametrize(("n", "condition"), [(8, 1.6), (16, 2.1), (32, 2.7), (64, 2.8), (128, 22.2)])
def test_the_basis_is_well_conditioned(n, condition):
    assert torch.linalg.cond(zeta.basis(n)) < condition


def test_positions_far_away_are_computed_not_clamped():
    far = zeta.embedding(torch.tensor([10**6, 10**6 + 1]), 8)
    assert far.dtype == torch.float32
    assert (far[0] - far[1]).abs().max() > 0.1
    omega = zeta.frequencies(4)
    expected = torch.stack([(10**6 * omega).sin(), (10**6 * omega).cos()], -1).flatten()
    assert torch.allclose(far[0].double(), expected, rtol=0, atol=1e-7)


def test_no_two_neighbouring_positions_look_alike():
    rows = zeta.embedding(torch.arange(2048.0, dtype=torch.float64), 64)
    distance = torch.cdist(rows, rows) + 10.0 * torch.eye(2048, dtype=torch.float64)
    assert distance.min() > 0.1
    assert zeta.frequencies(1)[0] == math.pi / 2


def test_one_seed_gives_one_weight_and_it_carries_no_gradient():
    left, right = (torch.from_numpy(np.random.default_rng(s).standard_normal((n, 16))) for s, n in ((0, 48), (1, 16)))
    weight = zeta.linear_init(left.requires_grad_(), right)
    assert not weight.requires_grad
    assert torch.equal(weight, zeta.linear_init(left, right))
    s = torch.linalg.svdvals(weight)
    assert torch.allclose(s / s[0], zeta.singular_values(16), rtol=1e-12, atol=0)
    assert torch.allclose(weight.norm(), torch.tensor(48.0, dtype=torch.float64).sqrt(), rtol=1e-12, atol=0)


def test_rescaling_the_noise_column_by_column_changes_nothing():
    noise = [torch.from_numpy(np.random.default_rng(s).standard_normal((n, 5))) for s, n in ((0, 9), (1, 5))]
    scaled = [x * torch.tensor([3.0, 0.5, 1.0, 7.0, 2.0], dtype=torch.float64) for x in noise]
    assert torch.allclose(zeta.linear_init(*noise), zeta.linear_init(*scaled), rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [0, -3, 1.0, "4", True])
def test_a_count_is_a_whole_number(n):
    for function in (zeta.zeros, zeta.unfolded, zeta.basis, zeta.frequencies, zeta.singular_values):
        with pytest.raises(ConfigError, match="whole number"):
            function(n)


def test_a_default_device_changes_nothing_that_is_found_on_the_host():
    noise = [torch.from_numpy(np.random.default_rng(s).standard_normal((4, 4))) for s in (0, 1)]
    text = table_text()
    counted = [lambda: zeta.zeros(1030), lambda: zeta.basis(7), lambda: zeta.frequencies(3)]
    for call in (*counted, lambda: zeta._read_table(text), lambda: zeta.linear_init(*noise)):
        with torch.device("meta"):
            found = call()
        assert torch.equal(found, call())


def test_noise_without_data_is_refused():
    with pytest.raises(DomainError, match="meta device"):
        zeta.linear_init(torch.ones(3, 3, device="meta"), torch.ones(3, 3, device="meta"))
