"""The estimate of memory against models that were built and run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from so8t_torch.core.errors import ConfigError
from so8t_torch.models import head_loss, memory
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.memory import estimate_memory, kept_bytes
from so8t_torch.models.states import state_bytes

SIZES = {"vocab_size": 120, "d_model": 32, "n_layers": 3, "n_seq": 128, "dropout": 0.1}
CASES = {
    "phase 1": (create_phase1_model, Phase1Config(**SIZES, htt_enabled=False, ar_ssm_max_rank=8)),
    "phase 1 rotating": (
        create_phase1_model,
        Phase1Config(**SIZES, htt_rank=4, ar_ssm_max_rank=8, ar_ssm_complex=True),
    ),
    "phase 2": (create_phase2_model, Phase2Config(**SIZES, num_heads=2, head_dim=16, memory_chunk=32)),
}
cases = pytest.mark.parametrize(("create", "config"), CASES.values(), ids=CASES)


@cases
def test_parameters_and_states_are_counted(create, config):
    model, found = create(config, seed=0), estimate_memory(config)
    assert found.parameter_count == sum(p.numel() for p in model.parameters())
    assert found.parameters == sum(p.numel() * p.element_size() for p in model.parameters())
    cache = model(torch.zeros(1, 5, dtype=torch.int64), use_cache=True).past_key_values
    assert found.decode_state == state_bytes(cache)


@cases
@pytest.mark.parametrize("again", [False, True], ids=["kept", "twice"])
def test_activations_are_near_what_a_model_keeps(create, config, again):
    model, ids = create(config, seed=0).train(), torch.zeros(2, 128, dtype=torch.int64)
    found = estimate_memory(config, batch_size=2, gradient_checkpointing=again)
    estimated = found.activations
    if again:
        model.activation_checkpointing_enable()
        # the block that is computed again holds its share in the backward pass, not here
        estimated -= estimate_memory(config, batch_size=2).activations // config.n_layers
    kept = kept_bytes(model, lambda: model(ids, labels=ids, skip_logits=True))
    assert estimated == pytest.approx(kept, rel=0.1 if not again else 0.35)


class Widest(TorchDispatchMode):
    """Keeps the bytes of the largest tensor whose rows are as long as the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.bytes = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("length", [64, 400])
def test_the_loss_alone_holds_logits_of_a_chunk(length, monkeypatch):
    for module in (head_loss, memory):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 300 * 120)
    create, config = CASES["phase 2"]
    model, ids = create(config, seed=0).train(), torch.zeros(1, length, dtype=torch.int64)
    with Widest(120) as widest:
        model(ids, labels=ids, skip_logits=True)
    assert estimate_memory(config, length=length).logits == widest.bytes + length * config.d_model * 4


def test_the_loss_alone_holds_all_logits_in_float16():
    create, config = CASES["phase 2"]
    model, ids = create(config, seed=0).train(), torch.zeros(1, 64, dtype=torch.int64)
    with Widest(120) as widest, torch.autocast("cpu", dtype=torch.float16):
        model(ids, labels=ids, skip_logits=True)
    assert widest.bytes == 64 * 120 * 4
    assert estimate_memory(config, length=64, autocast=torch.float16).logits == 2 * widest.bytes + 64 * 120 * 2


def test_more_rows_need_more_and_half_precision_less():
    config = CASES["phase 2"][1]
    one = estimate_memory(config)
    assert estimate_memory(config, batch_size=4).activations == 4 * one.activations
    assert estimate_memory(config, autocast=torch.bfloat16).activations < one.activations
    assert estimate_memory(config, optimiser_bytes=0).total == one.total - one.optimiser
    assert one.total == one.parameters + one.gradients + one.optimiser + one.activations + one.logits


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"length": 0}, {"optimiser_bytes": -1}])
def test_no_rows_and_no_tokens_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected batch_size and length > 0"):
        estimate_memory(CASES["phase 1"][1], **wrong)
