"""The loss of a dense head without logits, against the logits' own; and when it is taken."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from so8t_torch.core.errors import TrainingError
from so8t_torch.models import head_loss as room
from so8t_torch.models.head_loss import head_loss, is_plain

IGNORED = -100


@pytest.fixture
def small_chunks(monkeypatch):
    """Let three tokens go through the head at once, and the last chunk be a smaller one."""
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 3 * 11 + 5)


def case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(11, (2, 4), generator=generator)
    targets[0, 1] = targets[1, 3] = IGNORED
    return hidden, weight, targets


def whole(hidden, weight, targets):
    scores = (hidden.double() @ weight.double().mT).flatten(0, 1)
    return cross_entropy(scores, targets.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients_are_those_of_whole_logits(dtype):
    hidden, weight, targets = case(dtype)
    found, wanted = head_loss(hidden, weight, targets, IGNORED), whole(hidden, weight, targets)
    eps = torch.finfo(dtype).eps
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=8 * eps, atol=0)
    pairs = (torch.autograd.grad(3.0 * loss, (hidden, weight)) for loss in (found, wanted))
    for mine, theirs in zip(*pairs, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=0, atol=8 * eps * float(theirs.abs().max()))
    assert not torch.autograd.grad(head_loss(hidden, weight, targets, IGNORED), hidden)[0][0, 1].any()


@pytest.mark.usefixtures("small_chunks")
def test_logits_of_any_size_and_padding_that_is_no_number():
    hidden, weight, targets = case()
    with torch.no_grad():
        hidden.mul_(1e4)
        hidden[0, 1] = torch.nan
    found = head_loss(hidden, weight, targets, IGNORED)
    clean = torch.where(torch.isnan(hidden.detach()), 0.0, hidden.detach())
    torch.testing.assert_close(found, whole(clean, weight, targets))
    for gradient in torch.autograd.grad(found, (hidden, weight)):
        assert gradient.isfinite().all()


def test_one_backward_pass_and_no_derivative_of_it():
    hidden, weight, targets = case()
    loss = head_loss(hidden, weight, targets, IGNORED)
    with pytest.raises(TrainingError, match="to be differentiated"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(TrainingError, match="a second"):
        loss.backward()


def test_only_what_is_asked_for_has_a_gradient():
    hidden, weight, targets = case()
    assert not head_loss(hidden.detach(), weight.detach(), targets, IGNORED).requires_grad
    with torch.no_grad():
        assert not head_loss(hidden, weight, targets, IGNORED).requires_grad
    head_loss(hidden, weight.detach(), targets, IGNORED).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(whole(hidden, weight, targets), hidden)[0])


def test_a_head_that_is_more_than_a_linear_map_is_called():
    hidden = torch.randn(2, 6)
    assert is_plain(nn.Linear(6, 11, bias=False), hidden)
    assert not is_plain(nn.Linear(6, 11), hidden)
    assert not is_plain(nn.Sequential(nn.Linear(6, 11, bias=False)), hidden)
    watched = nn.Linear(6, 11, bias=False)
    watched.register_forward_hook(lambda *_: None)
    assert not is_plain(watched, hidden)
    replaced = nn.Linear(6, 11, bias=False)
    replaced.forward = lambda x: x
    assert not is_plain(replaced, hidden)
    assert not is_plain(nn.Linear(6, 11, bias=False), hidden.half())
    assert is_plain(nn.Linear(6, 11, bias=False), hidden.bfloat16())
    for dtype, plain in ((torch.float16, False), (torch.bfloat16, True)):
        with torch.autocast("cpu", dtype=dtype):
            assert is_plain(nn.Linear(6, 11, bias=False), hidden) is plain
    seen = []
    torch.func.grad(lambda x: seen.append(is_plain(nn.Linear(6, 11, bias=False), x)) or x.sum())(hidden)
    assert seen == [False]
