"""The short filter beside sums over single tokens."""

import pytest
import torch

from so8t_torch.core.errors import ConfigError
from so8t_torch.nn.short_convolution import ShortConvolution

WIDTH, TAPS = 3, 4


def filtered(taps, x):
    """Return y_t = Σ_j taps_j ⊙ x_{t−j} of one document."""
    zero = torch.zeros(WIDTH, dtype=x.dtype)
    return torch.stack([sum(taps[j] * (x[t - j] if t >= j else zero) for j in range(len(taps))) for t in range(len(x))])


@pytest.fixture
def module():
    torch.manual_seed(2)
    return ShortConvolution(WIDTH, TAPS, dtype=torch.float64)


def test_it_starts_as_the_token_before(module):
    x = torch.randn(1, 6, WIDTH, dtype=torch.float64)
    y, _ = module(x, torch.zeros(1, TAPS - 1, WIDTH, dtype=torch.float64))
    assert (y[:, 1:] - x[:, :-1]).abs().max() < 0.2 < (y[:, 1:] - x[:, 1:]).abs().max()
    assert ShortConvolution(WIDTH, 1).taps.eq(1).all()


def test_documents_padding_and_states(module):
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1, 1]])
    real = torch.arange(9) < torch.tensor([[9], [6]])
    zero = torch.zeros(2, TAPS - 1, WIDTH, dtype=torch.float64)
    y, state = module(x, zero, documents, padding_mask=real)
    with torch.no_grad():
        assert torch.allclose(y[0], torch.cat([filtered(module.taps, x[0, :3]), filtered(module.taps, x[0, 3:])]))
        assert torch.allclose(y[1, :6], torch.cat([filtered(module.taps, x[1, :5]), filtered(module.taps, x[1, 5:6])]))
    assert torch.equal(state[0], x[0, 6:])
    assert torch.equal(state[1], torch.stack([zero[1, 0], zero[1, 0], x[1, 5]]))


def test_pieces_are_one_call_and_empty_rows_keep_their_state(module):
    x = torch.randn(2, 9, WIDTH, dtype=torch.float64)
    zero = torch.zeros(2, TAPS - 1, WIDTH, dtype=torch.float64)
    whole, last = module(x, zero)
    first, state = module(x[:, :2], zero)
    second, state = module(x[:, 2:], state)
    assert torch.allclose(torch.cat([first, second], 1), whole)
    assert torch.equal(state, last)
    kept = module(x[:, :3], last, padding_mask=torch.zeros(2, 3, dtype=torch.bool))[1]
    assert torch.equal(kept, last)


def test_sizes_below_one_are_refused():
    with pytest.raises(ConfigError, match="taps of 1 or more"):
        ShortConvolution(WIDTH, 0)
