"""Segment numbers from cumulative lengths."""

import pytest
import torch

from so8t_torch.core.errors import DomainError, ShapeError
from so8t_torch.core.segments import segment_ids_from_cu_seqlens


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_token_gets_the_number_of_its_sequence(dtype):
    ids = segment_ids_from_cu_seqlens(torch.tensor([0, 3, 3, 4, 9], dtype=dtype), 9)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3]


def test_padding_is_a_segment_of_its_own():
    assert segment_ids_from_cu_seqlens(torch.tensor([0, 2, 4]), 7).tolist() == [0, 0, 1, 1, 2, 2, 2]


def test_a_row_of_nothing_has_no_numbers():
    assert segment_ids_from_cu_seqlens(torch.tensor([0, 0]), 0).shape == (0,)


@pytest.mark.parametrize(
    ("boundaries", "length", "error", "text"),
    [
        ([0], 3, ShapeError, "at least one sequence"),
        ([[0, 3]], 3, ShapeError, r"\(S \+ 1,\)"),
        ([0, 4], 3, ShapeError, "at least 4 tokens"),
        ([1, 3], 3, DomainError, "start with 0"),
        ([0, 3, 2], 3, DomainError, "never fall"),
        ([0.0, 3.0], 3, DomainError, "integer dtype"),
    ],
)
def test_what_is_no_list_of_boundaries_is_refused(boundaries, length, error, text):
    with pytest.raises(error, match=text):
        segment_ids_from_cu_seqlens(torch.tensor(boundaries), length)
