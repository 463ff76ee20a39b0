import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from so8t_torch.core.errors import TrainingError
from so8t_torch.train.loss import LossAtHead, row_sums, supervised_nll

B, T, D, V = 3, 40, 16, 512


def example(dtype=torch.float64, share=0.5):
    source = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=source)
    labels[torch.rand(B, T, generator=source) > share] = -100
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=source))
    return hidden, labels, head


def whole(hidden, labels, head):
    """All logits at once, each position learning the next token."""
    logits = head(hidden)[:, :-1].reshape(-1, V)
    return functional.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_loss_and_gradients_equal_the_full_computation(chunk):
    hidden, labels, head = example()
    expected = torch.autograd.grad(whole(hidden, labels, head), [hidden, head.weight])
    nll, _ = supervised_nll(hidden, labels, head, chunk=chunk)
    actual = torch.autograd.grad(nll.sum(), [hidden, head.weight])
    torch.testing.assert_close(nll.sum(), whole(hidden, labels, head), rtol=1e-13, atol=0)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)


def test_float32_is_as_close_to_float64_as_the_full_computation():
    hidden, labels, head = example(torch.float32)
    exact = whole(hidden.double(), labels, example()[2])
    nll, _ = supervised_nll(hidden, labels, head, chunk=32)
    assert abs(nll.sum().item() - exact.item()) <= 1e-6 * exact.item()


def test_bfloat16_states_are_summed_in_float32():
    hidden, labels, head = example(torch.bfloat16)
    nll, _ = supervised_nll(hidden, labels, head, chunk=32)
    assert nll.dtype == torch.float32


def test_each_value_knows_its_row():
    hidden, labels, head = example()
    nll, rows = supervised_nll(hidden, labels, head, chunk=8)
    sums = row_sums(nll, rows, B)
    alone = torch.stack([whole(hidden[i : i + 1], labels[i : i + 1], head) for i in range(B)])
    torch.testing.assert_close(sums[:, 0], alone, rtol=1e-12, atol=0)
    assert sums[:, 1].tolist() == (labels[:, 1:] != -100).sum(1).tolist()


def test_the_first_position_is_never_learned():
    hidden, labels, head = example()
    labels[:, 0] = 5
    torch.testing.assert_close(supervised_nll(hidden, labels, head, chunk=9)[0].sum(), whole(hidden, labels, head))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_full_logits_never_exist_forward_or_backward():
    hidden, labels, head = example(torch.float32)
    head.weight.requires_grad_(False)
    with Largest() as largest:
        nll, _ = supervised_nll(hidden, labels, head, chunk=4)
        nll.sum().backward()
    assert largest.numbers == V * D  # the head's own weight, seen transposed
    with Largest() as full:
        whole(hidden, labels, head).backward()
    assert full.numbers >= B * (T - 1) * V


def test_no_logits_are_kept_between_forward_and_backward():
    hidden, labels, head = example(torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        supervised_nll(hidden, labels, head, chunk=4)
    assert max(kept) < V * 4


def test_the_host_is_asked_once_where_the_supervised_positions_are():
    """Every look-up of positions makes a device wait; a mask used as an index is a hidden one."""

    class LookUps(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            masks = [i for i in (args[1] if func is torch.ops.aten.index.Tensor else ()) if i is not None]
            self.count += func is torch.ops.aten.nonzero.default or any(i.dtype == torch.bool for i in masks)
            return func(*args, **(kwargs or {}))

    hidden, labels, head = example()
    with LookUps() as seen:
        supervised_nll(hidden, labels, head, chunk=9)
    assert seen.count == 1


def test_the_head_gives_losses_inside_the_block_and_logits_outside():
    hidden, labels, head = example()
    at_head = LossAtHead(head, 7, chunk=9)
    with at_head.open(labels, {7: hidden}) as losses:
        output = head(hidden[:, -1:])
    nll, rows = losses.result()
    torch.testing.assert_close(nll.sum(), whole(hidden, labels, head), rtol=1e-13, atol=0)
    assert output is nll
    assert rows.bincount(minlength=B).tolist() == (labels[:, 1:] != -100).sum(1).tolist()
    assert head(hidden).shape == (B, T, V)


def test_autocast_around_the_model_does_not_round_the_losses():
    hidden, labels, head = example(torch.float32)
    at_head = LossAtHead(head, 7, chunk=9)
    with torch.autocast("cpu", dtype=torch.bfloat16), at_head.open(labels, {7: hidden}) as losses:
        head(hidden[:, -1:])
    torch.testing.assert_close(losses.result()[0].sum(), whole(hidden, labels, head), rtol=1e-6, atol=0)


def test_a_model_that_skips_its_head_is_named():
    _, labels, head = example()
    with LossAtHead(head, 7, chunk=9).open(labels, {}) as losses:
        pass
    with pytest.raises(TrainingError, match="did not call its output embedding"):
        losses.result()


def test_uniform_logits_cost_log_v():
    hidden = torch.zeros(1, 5, D)
    labels = torch.tensor([[-100, 1, 2, 3, 4]])
    nll, _ = supervised_nll(hidden, labels, nn.Linear(D, V, bias=False), chunk=2)
    torch.testing.assert_close(nll, torch.full((4,), math.log(V)))
