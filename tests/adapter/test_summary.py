from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from peft import get_peft_model

from so8t_torch import SO8TConfig
from so8t_torch.adapter import gate_summary, gated_layers, rotation_angles


def plane_rotation(angles: list[float]) -> np.ndarray:
    """A rotation with these four angles, turned into a random basis by a QR factor."""
    blocks = [np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in angles]
    basis, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))
    return basis @ scipy.linalg.block_diag(*blocks) @ basis.T


@pytest.mark.parametrize(
    "angles", [[0, 0, 0, 0], [1e-4, 0.3, 1.0, 3.0], [0.5, 0.5, 0.5, 0.5], [0, 0, math.pi, math.pi]]
)
def test_angles_are_the_ones_the_rotation_was_made_of(angles) -> None:
    got = rotation_angles(torch.from_numpy(plane_rotation(angles)))
    np.testing.assert_allclose(got.numpy(), sorted(angles), rtol=0, atol=1e-6)


def test_a_new_gate_is_the_identity_in_every_figure(make_model) -> None:
    summary = gate_summary(get_peft_model(make_model(), SO8TConfig(layers_to_transform=[1])))
    assert list(summary) == ["model.layers.1.self_attn.o_proj"]
    (gate,) = summary.values()
    assert (gate.max_angle, gate.mean_angle, gate.commutator, gate.orthogonality_error) == (0, 0, 0, 0)


def test_known_generators_give_known_figures(make_model) -> None:
    model = get_peft_model(make_model(), SO8TConfig(target_modules=["o_proj"], layers_to_transform=[0]))
    layer = dict(gated_layers(model))["base_model.model.model.layers.0.self_attn.o_proj"]
    with torch.no_grad():
        layer.so8t_safe["default"][3, 0] = 0.7  # the plane of channels 0 and 1
        layer.so8t_cmd["default"][3, 27] = 0.2  # the plane of channels 6 and 7, which commutes with it
    (gate,) = model.gate_summary().values()
    assert gate.max_angle == pytest.approx(0.7, abs=1e-6)
    assert gate.mean_angle == pytest.approx((0.7 + 0.2) / (4 * 8), abs=1e-6)
    assert gate.commutator == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        layer.so8t_cmd["default"][3, 1] = 0.5  # the plane of channels 0 and 2, which does not
    (gate,) = model.gate_summary().values()
    safe, cmd = np.zeros((8, 8)), np.zeros((8, 8))
    safe[0, 1], cmd[0, 2], cmd[6, 7] = 0.7, 0.5, 0.2
    left, right = scipy.linalg.expm(cmd - cmd.T), scipy.linalg.expm(safe - safe.T)
    distance = np.linalg.norm(left @ right @ left.T @ right.T - np.eye(8))
    assert gate.commutator == pytest.approx(distance / 8, abs=1e-6)
    assert gate.orthogonality_error < 2e-6
