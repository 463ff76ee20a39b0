"""Faults where the state has another form: moments in 8 bits, weights in shards."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from so8t_torch.train import checkpoint_state, checkpoints
from so8t_torch.train.config import RecoverySection
from so8t_torch.train.detection import trainable
from so8t_torch.train.guard import Guard
from so8t_torch.train.rollback import RollbackRequested
from so8t_torch.train.run import run_training
from so8t_torch.train.start import Start
from tests.faults.injection import injected


@pytest.mark.parametrize(
    ("place", "value", "stage"),
    [
        ("loss", "nan", "skip"),
        ("one_gradient", "inf", "skip"),
        ("learning_rate", "nan", "skip"),
        ("weight", "nan", "rollback"),
        ("moment", "inf", "rollback"),
    ],
)
def test_a_fault_beside_moments_in_8_bits_ends_in_its_stage(settings, place, value, stage):
    training = {"max_steps": 4, "optimiser": "adamw_8bit"}
    with injected(place, value, {3}) as injection:
        run = run_training(
            settings(training=training, adapter={"r": 64}, checkpoint={"every_steps": 1}), callbacks=[injection]
        )
    rows = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    assert [(row["step"], row["stage"]) for row in rows if row["event"] == "recovery"] == [(3, stage)]
    assert [row["checkpoint"] for row in rows if row["event"] == "rollback"] == ["checkpoint-2"] * (stage == "rollback")
    if stage == "skip":
        assert injection.moved == [[]]
    newest, passed_over = checkpoints.newest(run.directory / "checkpoints")
    assert (newest.name, passed_over) == ("checkpoint-4", [])
    state = load_file(newest / "optimiser.safetensors")
    assert torch.uint8 in {held.dtype for name, held in state.items() if "state1" in name}
    assert all(torch.isfinite(p).all() for p in trainable(run.model).values())


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()


def test_a_layer_in_shards_is_reset_and_the_checkpoint_of_it_is_whole(one_process, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    start = Start(model)
    fully_shard(model, mesh=one_process)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, optimizer)
    guard = Guard(RecoverySection(reinitialise=True))
    guard.initial, guard.go_back = start.numbers, lambda reason, _: RollbackRequested(None, (0, 1), reason)
    guard.examination.attach(model)
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}

    def breaks():
        with torch.no_grad():
            model[0].weight.to_local()[0, 0] = math.nan
        guard.check_state(optimizer)

    with pytest.raises(RollbackRequested):
        breaks()
    breaks()
    assert guard.ladder.recoveries == 2
    now = {name: p.full_tensor() for name, p in model.named_parameters()}
    for name, number in now.items():
        assert torch.equal(number, start.numbers[name] if name.startswith("0.") else before[name]), name
    assert {p for p in model.parameters() if p in optimizer.state} == set(model[1].parameters())
    step(model, optimizer)
    checkpoint_state.write_model(model, tmp_path, writes=True)
    stored = load_file(tmp_path / checkpoint_state.MODEL_WEIGHTS)
    assert all(torch.equal(stored[name], p.full_tensor()) for name, p in model.named_parameters())
    start.restore(model)
    checkpoint_state.load_model(model, tmp_path)
    assert all(torch.equal(stored[name], p.full_tensor()) for name, p in model.named_parameters())
