"""A base that changed between two halves of a run is noticed, whatever changed in it that the fingerprint can see."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from so8t_torch.core.errors import CheckpointError, ConfigError
from so8t_torch.train import checkpointed, fingerprint
from so8t_torch.train.building import base_fingerprint, load_model
from so8t_torch.train.config import LoadingSection
from so8t_torch.train.fingerprint import changes, of_folder
from so8t_torch.train.run import run_training


def rewritten(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def one_number(tensors):
    tensors["lm_head.weight"][-1, -1] += 1e-3


def header(path):
    """Turn one byte of a name in the header, so that the file stays one that loads."""
    content = path.read_bytes()
    assert content.count(b'"format":"pt"') == 1
    path.write_bytes(content.replace(b'"format":"pt"', b'"format":"np"'))


CHANGES = {
    "header": ("model.safetensors", header, "model.safetensors (other header)"),
    "number": ("model.safetensors", lambda p: rewritten(p, one_number), "model.safetensors (other numbers)"),
    "size": (
        "model.safetensors",
        lambda p: rewritten(p, lambda tensors: tensors.update(more=torch.ones(4))),
        "model.safetensors (other bytes, header, numbers)",
    ),
    "config": (
        "config.json",
        lambda p: p.write_text(json.dumps(json.loads(p.read_text()) | {"rope_theta": 5.0})),
        "config.json (other bytes, content)",
    ),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_change_of_the_base_is_named(tiny_source, tmp_path, how):
    name, change, told = CHANGES[how]
    shutil.copytree(tiny_source, tmp_path / "base")
    before = of_folder(tmp_path / "base")
    assert not changes(json.loads(json.dumps(before)), of_folder(tiny_source))
    change(tmp_path / "base" / name)
    assert changes(before, of_folder(tmp_path / "base")) == [told]


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_of_a_large_file_pieces_are_read_and_what_lies_between_is_not(tmp_path, monkeypatch, place):
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "PIECES", 3)
    monkeypatch.setattr(fingerprint, "PIECE", 8)
    numbers = torch.zeros(1001, dtype=torch.uint8)
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": numbers}, tmp_path / "model.safetensors")
    before = of_folder(tmp_path)
    numbers[round(place * 1000)] = 1
    save_file({"w": numbers}, tmp_path / "model.safetensors")
    assert changes(before, of_folder(tmp_path)) == ["model.safetensors (other numbers)"]
    numbers[round(place * 1000)] = 0
    numbers[250] = 1
    save_file({"w": numbers}, tmp_path / "model.safetensors")
    assert not changes(before, of_folder(tmp_path))


def test_shards_come_and_go_and_a_repository_has_its_commit(tiny_source):
    shard = {"bytes": 1, "header": "a", "numbers": "b"}
    assert changes({"1": shard}, {"2": shard}) == ["1 (there before, absent now)", "2 (absent before, there now)"]
    loaded = load_model(str(tiny_source), None, LoadingSection(dtype="float32"))
    loaded.config._commit_hash = "abc"
    found = base_fingerprint("owner/name", loaded)
    assert found == {"repository": "owner/name", "commit": "abc"}
    assert changes(found | {"commit": "xyz"}, found) == ["commit (xyz before, abc now)"]


def test_a_folder_without_weights_has_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"expected model\.safetensors"):
        of_folder(tmp_path)


def test_a_run_does_not_go_on_upon_another_base(settings, tiny_source, tmp_path, monkeypatch):
    shutil.copytree(tiny_source, tmp_path / "base")
    sections = {
        "base": {"path": str(tmp_path / "base")},
        "training": {"max_steps": 2},
        "checkpoint": {"every_steps": 1},
    }
    directory = run_training(settings(**sections)).directory
    shutil.rmtree(directory / "checkpoints/checkpoint-2")
    before = {path: path.read_bytes() for path in directory.rglob("checkpoint-1/*")}
    path = tmp_path / "base/model.safetensors"
    whole = path.read_bytes()
    rewritten(path, one_number)
    with pytest.raises(CheckpointError, match=r"another base: model\.safetensors \(other numbers\)\. What was learned"):
        run_training(settings(**sections), resume="auto")
    assert before == {path: path.read_bytes() for path in directory.rglob("checkpoint-1/*")}
    path.write_bytes(whole)
    with monkeypatch.context() as later:
        later.setattr(checkpointed, "VERSION", 3)
        with pytest.raises(CheckpointError, match=r"expected a state of version 3, got 2"):
            run_training(settings(**sections), resume="auto")
    assert run_training(settings(**sections), resume="auto").steps == 2
