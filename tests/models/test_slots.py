"""Sequences that are decoded together go on as they would alone, whoever joins and leaves meanwhile."""

import pytest
import torch

from so8t_torch.core.errors import ConfigError, ShapeError
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.slots import SlotPool

SMALL = {"vocab_size": 23, "d_model": 16, "n_layers": 2, "n_seq": 8, "dropout": 0.0, "seed": 1}
MODELS = {
    "phase 1": lambda: create_phase1_model(**SMALL, htt_rank=3, ar_ssm_max_rank=4),
    "phase 2": lambda: create_phase2_model(**SMALL, num_heads=2, head_dim=4, memory_chunk=4, snr_threshold=0.8),
}


def prompt(length):
    return torch.randint(23, (length,), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", MODELS)
def test_sequences_join_and_leave(name):
    model = MODELS[name]().double().eval()
    pool, read, found = SlotPool(model, 3), {}, {}
    size = pool.bytes

    def join(length):
        row, logits = pool.join(prompt(length))
        read[row], found[row] = prompt(length).tolist(), [logits]
        return row

    def go_on(rows):
        tokens = {row: int(found[row][-1].argmax()) for row in rows}
        for row, logits in pool.step(tokens).items():
            read[row].append(tokens[row])
            found[row].append(logits)

    def check(row):
        with torch.no_grad():
            logits = model(torch.tensor([read[row]]), use_cache=False).logits[0, -len(found[row]) :]
        torch.testing.assert_close(torch.stack(found[row]), logits, rtol=0, atol=1e-10)

    first = join(5)
    go_on([first])
    second = join(11)
    for _ in range(4):
        go_on([first, second])
    go_on([second])
    check(first)
    pool.leave(first)
    third, fourth = join(2), join(9)
    assert third == first
    for _ in range(6):
        go_on([fourth, second, third])
    for row in (second, third, fourth):
        check(row)
    assert pool.bytes == size


def test_rows_that_are_not_there_are_refused():
    model = MODELS["phase 2"]().eval()
    pool = SlotPool(model, 1)
    with pytest.raises(ConfigError, match=r"expected rows out of \[\], which are taken, got \[0\]"):
        pool.step({0: 1})
    with pytest.raises(ShapeError, match=r"ids \(N,\)"):
        pool.join(prompt(3)[None])
    row, _ = pool.join(prompt(3))
    with pytest.raises(ConfigError, match="all 1 are taken"):
        pool.join(prompt(3))
    with pytest.raises(ConfigError, match="at least one row"):
        pool.step({})
    pool.leave(row)
    with pytest.raises(ConfigError, match="which are taken"):
        pool.leave(row)
    with pytest.raises(ConfigError, match="slots ≥ 1"):
        SlotPool(model, 0)
    with pytest.raises(ConfigError, match=r"model\.eval"):
        SlotPool(model.train(), 1)
