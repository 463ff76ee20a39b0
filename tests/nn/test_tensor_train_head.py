"""The tied head against logits of the dense table, and its loss against PyTorch's."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.tensor_train_head import TensorTrainHead

V, D = 90, 24


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


def tied(cores: int = 2, **arguments) -> TensorTrainHead:
    arguments = {"init_scale": 0.5, "dtype": torch.float64, **arguments}
    return TensorTrainHead(HolographicTTEmbedding(V, D, 4, cores, **arguments))


def dense(head: TensorTrainHead) -> torch.Tensor:
    """The rows of all ids, looked up one by one: what the head must be the transpose of."""
    return torch.stack([head.embedding(torch.tensor(i)) for i in range(V)])


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("permutation", ["golden", "identity"])
def test_the_head_is_the_transpose_of_the_embedding(cores, permutation):
    head, hidden = tied(cores, id_permutation=permutation), torch.randn(3, 5, D, dtype=torch.float64)
    wanted = hidden @ dense(head).T
    assert relative(head(hidden), wanted) < 1e-12
    assert torch.equal(head.last_logits(hidden), head(hidden[:, -1]))
    assert head.last_logits(hidden).shape == (3, V)


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [-100, 0, 17])
def test_the_loss_and_its_gradients_are_those_of_dense_logits(cores, reduction, ignored):
    head = tied(cores)
    hidden = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (3, 5))
    labels[0, :2] = ignored
    leaves = (hidden, *head.parameters())
    found = head.loss(hidden, labels, ignore_index=ignored, reduction=reduction)
    wanted = cross_entropy(
        (hidden @ dense(head).T).flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction=reduction
    ).view(found.shape)
    assert relative(found, wanted) < 1e-12
    mine, theirs = (torch.autograd.grad(loss.sum(), leaves) for loss in (found, wanted))
    assert all(relative(a, b) < 1e-10 for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("cores", [2, 3])
def test_the_largest_logits_come_with_the_ids_that_the_user_knows(cores):
    head, hidden = tied(cores), torch.randn(4, 6, D, dtype=torch.float64)
    values, ids = head.topk(hidden, 7)
    logits = hidden @ dense(head).T
    assert relative(values, logits.topk(7).values) < 1e-12
    assert torch.equal(ids, logits.topk(7).indices)


def test_embedding_and_head_train_one_set_of_parameters():
    head = tied()
    assert [id(p) for p in head.parameters()] == [id(p) for p in head.embedding.parameters()]
    ids = torch.randint(V, (2, 6))
    head.loss(head.embedding(ids), ids).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in head.parameters())
    again = tied()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.embedding.dense_table(), head.embedding.dense_table())


def test_what_has_no_tied_meaning_is_refused():
    with pytest.raises(DomainError, match="real cores"):
        tied(complex_cores=True)
    with pytest.raises(ConfigError, match="padding_idx"):
        tied(padding_idx=0)


def test_labels_widths_and_options_are_checked():
    head, hidden = tied(), torch.randn(3, D, dtype=torch.float64)
    for wrong in (-1, V, -(2**31), 10**9):
        with pytest.raises(DomainError, match="targets"):
            head.loss(hidden, torch.tensor([0, 1, wrong]))
    with pytest.raises(DomainError, match="width 24"):
        head(hidden[:, :-1])
    with pytest.raises(ConfigError, match="reduction"):
        head.loss(hidden, torch.tensor([0, 1, 2]), reduction="median")
    with pytest.raises(ConfigError, match="k"):
        head.topk(hidden, V + 1)
    assert head.loss(hidden, torch.full((3,), -100)).isnan(), "as PyTorch: the mean over nothing"


def test_under_autocast_it_computes_as_a_linear_layer_does():
    head = tied(dtype=torch.float32)
    hidden = torch.randn(3, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(hidden).dtype == torch.bfloat16
        assert head.loss(hidden, torch.tensor([1, 2, 3])).dtype == torch.float32
    assert relative(head(hidden.bfloat16()).float(), hidden @ dense(head).T) < 4 * torch.finfo(torch.bfloat16).eps
