"""A damaged checkpoint is never loaded: it is named with what is wrong, and the one before is taken."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from so8t_torch.core.errors import CheckpointError
from so8t_torch.train import checkpoints
from so8t_torch.train.manifest import NAME, Health, Manifest, read_manifest
from so8t_torch.train.run import run_training
from tests.faults.damage import KINDS, damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_source, sentences):
    """A run with checkpoints of steps 2 and 4."""
    from so8t_torch.core.config import parse_config
    from so8t_torch.train.config import TrainConfig

    tree = {
        "output_dir": str(tmp_path_factory.mktemp("runs") / "run"),
        "threads": 1,
        "base": {"kind": "pretrained", "path": str(tiny_source)},
        "loading": {"dtype": "float32"},
        "data": {"train": str(sentences), "max_length": 96},
        "training": {"max_steps": 4, "batch_size": 2},
        "recording": {"every_steps": 1, "progress": False, "tensorboard": False},
        "checkpoint": {"every_steps": 2},
    }
    config = parse_config(TrainConfig, tree)
    return config, run_training(config).directory


@pytest.mark.parametrize("seed", range(50))
def test_every_damage_is_found_and_the_checkpoint_before_is_taken(finished, tmp_path, seed):
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished[1] / "checkpoints", folder)
    done = damage(folder / "checkpoint-4", seed)
    with pytest.raises(CheckpointError):
        checkpoints.verify(folder / "checkpoint-4")
    found, passed_over = checkpoints.newest(folder)
    assert found == folder / "checkpoint-2", done
    assert [name for name, _ in passed_over] == ["checkpoint-4"]
    assert passed_over[0][1], done


def test_every_bit_of_a_manifest_counts(tmp_path):
    health = Health(finite_parameters=True, finite_moments=True, loss=1.25)
    manifest = Manifest(step=12, config_hash="x", versions={"torch": None}, skipped=[(3, 7)], health=health)
    path = tmp_path / NAME
    whole = manifest.spelled()
    path.write_bytes(whole)
    assert read_manifest(tmp_path) == manifest
    for bit in range(8 * len(whole)):
        turned = bytearray(whole)
        turned[bit // 8] ^= 1 << bit % 8
        path.write_bytes(turned)
        with pytest.raises(CheckpointError):
            read_manifest(tmp_path)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_run_goes_on_from_the_checkpoint_before_and_says_why(finished, tmp_path, capsys, kind):
    config, directory = finished
    shutil.copytree(directory, tmp_path / "run")
    config = config.model_copy(update={"output_dir": tmp_path / "run"})
    damage(tmp_path / "run/checkpoints/checkpoint-4", KINDS.index(kind))
    resumed = run_training(config, resume="auto")
    assert "passed over checkpoint-4: " in capsys.readouterr().err
    left, right = (load_file(run / "adapter/adapter_model.safetensors") for run in (directory, resumed.directory))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert checkpoints.newest(tmp_path / "run/checkpoints") == (tmp_path / "run/checkpoints/checkpoint-4", [])


def test_when_all_are_damaged_nothing_is_loaded_and_nothing_begun(finished, tmp_path):
    config, directory = finished
    shutil.copytree(directory, tmp_path / "run")
    config = config.model_copy(update={"output_dir": tmp_path / "run"})
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/checkpoint-{step}/optimiser.safetensors").unlink()
    before = sorted(path for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(CheckpointError, match=r"checkpoint-4: optimiser\.safetensors is missing\n.*checkpoint-2: opt"):
        run_training(config, resume="auto")
    with pytest.raises(CheckpointError, match=r"checkpoint-2: optimiser\.safetensors is missing"):
        run_training(config, resume=str(tmp_path / "run/checkpoints/checkpoint-2"))
    assert sorted(path for path in (tmp_path / "run").rglob("*")) == before


@pytest.mark.parametrize("intruder", ["pytorch_model.bin", "adapter_model.bin", "deep/er.txt"])
def test_a_file_that_nobody_wrote_down_is_an_objection(finished, tmp_path, intruder):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(finished[1] / "checkpoints/checkpoint-4", folder)
    (folder / intruder).parent.mkdir(exist_ok=True)
    (folder / intruder).write_text("")
    with pytest.raises(CheckpointError, match=f"{intruder} is not in MANIFEST.json"):
        checkpoints.verify(folder)


def test_a_link_is_not_a_file(finished, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(finished[1] / "checkpoints/checkpoint-4", folder)
    (folder / "schedule.json").rename(tmp_path / "elsewhere")
    (folder / "schedule.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"schedule\.json is not a plain file"):
        checkpoints.verify(folder)
    (tmp_path / "checkpoint-5").symlink_to(finished[1] / "checkpoints/checkpoint-4")
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        checkpoints.verify(tmp_path / "checkpoint-5")


def test_a_checkpoint_holds_no_pickle(finished):
    names = {path.suffix for path in (finished[1] / "checkpoints").rglob("*") if path.is_file()}
    assert names == {".json", ".safetensors"}
