"""A run that is killed at any moment and gone on with equals the run that nobody disturbed, bit for bit."""

import json
import random

import pytest

from tests.faults import kills
from tests.faults.kills import Count, Zygote, differences, disturbed, settings, trace, undisturbed

CELLS = {
    "nothing": (),
    "everything": kills.FACTORS,
    "dropout, nf4": ("dropout", "nf4", "mid_epoch"),
    "accumulation, ramp": ("accumulation", "ramp"),
    "checkpointing, ramp": ("checkpointing", "ramp", "mid_epoch"),
    "lora alone": ("lora", "dropout", "accumulation"),
}
KILLS = {
    "nothing": 1,
    "everything": 3,
    "dropout, nf4": 2,
    "accumulation, ramp": 1,
    "checkpointing, ramp": 2,
    "lora alone": 1,
}


@pytest.fixture(scope="module")
def zygote():
    with Zygote() as process:
        yield process


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CELLS)
def test_kills_change_no_bit(zygote, tiny_source, sentences, tmp_path, name):
    quiet = undisturbed(zygote, settings(CELLS[name], tiny_source, sentences, tmp_path / "quiet"))
    source, count = random.Random(f"kills {name}"), Count()
    for trial in range(20):
        config = settings(CELLS[name], tiny_source, sentences, tmp_path / str(trial))
        disturbed(zygote, config, quiet, source, KILLS[name] - count.kills, count)
        assert not differences(quiet.trace, trace(config.output_dir)), f"seed 'kills {name}', trial {trial}"
        assert not list(config.output_dir.glob("checkpoints/*.tmp-*"))
        if count.kills >= KILLS[name]:
            break
    assert count.kills == KILLS[name]
