"""Derivatives of a layer, as physics terms take them, are the same where parts of it are computed again."""

import pytest
import torch

from so8t_torch.models.factory import create_phase1_model
from so8t_torch.train.observation import Observer

SIZES = {"vocab_size": 30, "d_model": 16, "n_layers": 1, "n_seq": 16, "dropout": 0.0, "htt_rank": 4}


def gradients(mixer, block):
    sizes = {**SIZES, "ar_ssm_max_rank": 6, "ar_ssm_min_rank": 2, "checkpoint_ar_ssm": mixer}
    model = create_phase1_model(**sizes, dtype=torch.float64, seed=0).train()
    if block:
        model.activation_checkpointing_enable()
    observer, ids = Observer(model.model, {"maps"}), torch.arange(8)[None]
    with observer.open() as calls:
        model(ids)
    (place,) = observer.places("maps", calls, torch.ones(1, 8, dtype=torch.bool), torch.Generator().manual_seed(1), 1)
    _, along = torch.func.jvp(place["layer"], (place["x"],), (place["u"],))
    along.square().sum().backward()
    layer = model.model.layers[0]
    assert (layer.checkpoint_mixer, layer.gradient_checkpointing) == (mixer, block)
    return {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("mixer", "block"), [(True, False), (True, True)])
def test_a_derivative_along_a_direction_knows_no_checkpointing(mixer, block):
    plain, found = gradients(False, False), gradients(mixer, block)
    assert plain.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    assert any(gradient.any() for name, gradient in plain.items() if "mixer." in name)
