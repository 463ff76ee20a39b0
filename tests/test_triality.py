"""What one pair cannot say about triality: the three representations together, and their exact constants."""

import numpy as np
import pytest
import torch

from so8t_torch.core.errors import DomainError, ShapeError
from so8t_torch.ops import rotation, triality

UPPER = torch.triu_indices(8, 8, 1)
CONJUGATION = torch.diag(torch.tensor([1.0] + [-1.0] * 7, dtype=torch.float64))


def matrix(spinor):
    """The 28×28 matrix of a linear map of coordinates, column by column."""
    return spinor(torch.eye(28, dtype=torch.float64)).T


def conjugation_on_coordinates():
    basis = rotation.skew(torch.eye(28, dtype=torch.float64))
    return rotation.unskew(CONJUGATION @ basis @ CONJUGATION).T


@pytest.mark.parametrize("spinor", [triality.left_spinor, triality.right_spinor])
def test_the_constants_are_exact_halves(spinor):
    constant = matrix(spinor)
    assert set(constant.unique().tolist()) == {-0.5, 0.0, 0.5}
    assert torch.equal((constant != 0).sum(1), torch.full((28,), 4))


@pytest.mark.parametrize("spinor", [triality.left_spinor, triality.right_spinor])
def test_the_triality_automorphism_has_order_three_and_not_less(spinor):
    turn = conjugation_on_coordinates() @ matrix(spinor)
    assert torch.equal(turn @ turn @ turn, torch.eye(28, dtype=torch.float64))
    assert not torch.equal(turn, torch.eye(28, dtype=torch.float64))


def test_the_fixed_points_of_triality_are_the_derivations():
    turn = conjugation_on_coordinates() @ matrix(triality.left_spinor)
    assert 28 - torch.linalg.matrix_rank(turn - torch.eye(28, dtype=torch.float64)) == 14


def test_the_product_is_carried_in_full_through_the_group():
    generator = torch.Generator().manual_seed(3)
    coordinates = torch.randn(16, 28, dtype=torch.float64, generator=generator)
    x, y = torch.randn(2, 16, 8, dtype=torch.float64, generator=generator)
    g, plus, minus = triality.representations(coordinates).unbind(1)
    whole = torch.einsum("nij,nj->ni", g, triality.octonion_product(x, y))
    parts = triality.octonion_product(torch.einsum("nij,nj->ni", plus, x), torch.einsum("nij,nj->ni", minus, y))
    assert (whole - parts).abs().max() < 1e-13


def test_a_full_turn_is_one_on_vectors_and_minus_one_on_spinors():
    turns = 2 * torch.pi * torch.eye(28, dtype=torch.float64)
    expected = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)[:, None, None] * torch.eye(8, dtype=torch.float64)
    assert (triality.representations(turns) - expected).abs().max() < 1e-13


def test_the_three_representations_are_not_conjugate():
    angles = torch.zeros(28, dtype=torch.float64)
    angles[0] = 1.0
    spectra = [np.sort(np.angle(np.linalg.eigvals(g.numpy()))) for g in triality.representations(angles)]
    assert np.allclose(spectra[0], [-1.0, 0, 0, 0, 0, 0, 0, 1.0], atol=1e-12, rtol=0)
    for spectrum in spectra[1:]:
        assert np.allclose(spectrum, [-0.5] * 4 + [0.5] * 4, atol=1e-12, rtol=0)


def test_half_precision_coordinates_still_give_one_group_element():
    coordinates = torch.randn(28, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = triality.representations(coordinates.double())
    assert torch.equal(triality.representations(coordinates), exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_dtype_that_cannot_hold_the_result_is_refused(dtype):
    coordinates, octonion = torch.ones(1, 28).to(dtype), torch.ones(8).to(dtype)
    for call in (triality.left_spinor, triality.right_spinor, triality.representations):
        with pytest.raises(DomainError, match="real floating dtype"):
            call(coordinates)
    for pair in ((octonion, torch.ones(8)), (torch.ones(8), octonion)):
        with pytest.raises(DomainError, match="real floating dtype"):
            triality.octonion_product(*pair)


def test_a_number_has_no_channels_to_rotate():
    with pytest.raises(ShapeError, match="one row of coordinates per 24 channels"):
        triality.apply(torch.zeros(1, 28), torch.tensor(1.0))
