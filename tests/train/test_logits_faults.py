"""A disk that fails while logits are saved: training goes on, nothing half written is ever seen, nothing is damaged.

A failing case is run alone with ``python -m pytest tests/train/test_logits_faults.py -k <its name>``.
"""

import errno
import os
import shutil
from threading import Event
from time import sleep

import pytest
import torch
from safetensors.torch import load_file

from so8t_torch.train.folder import read_metrics
from so8t_torch.train.logits.store import WAITING, Store
from so8t_torch.train.logits.writer import Writer
from so8t_torch.train.run import run_training
from tests.faults.disk import Fault, broken_disk, trace
from tests.faults.logits_at_fault import capture, complaints, contents, fault_cases, killed_points, save, store, suffer
from tests.faults.logits_killed import STEPS, kill_at


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("fault", fault_cases(), ids=str)
def test_a_broken_disk_damages_nothing_and_saving_goes_on_when_it_is_mended(tmp_path, fault, form):
    folder = tmp_path / "logits"
    assert suffer(folder, form, fault) == []


def test_a_process_killed_at_any_call_leaves_whole_files_only(tmp_path):
    kept = tmp_path / "kept"
    save(kept, "safetensors", range(1, 4))
    before = contents(kept)
    rehearsal = shutil.copytree(kept, tmp_path / "rehearsal")
    calls = trace(rehearsal, lambda: save(rehearsal, "safetensors", STEPS))
    size = len(next(iter(contents(rehearsal).values())))
    points = killed_points(calls, size)[::3]
    assert len(points) >= 20
    folders = [shutil.copytree(kept, tmp_path / str(number)) for number in range(len(points))]
    statuses = kill_at(folders, "safetensors", points)
    for folder, point, status in zip(folders, points, statuses, strict=True):
        assert status == -9, point
        assert complaints(folder, before, alive=False) == [], point
        totals, _ = save(folder, "safetensors", range(20, 22))
        assert totals.saved == 2
        assert complaints(folder, before, alive=True) == [], point
    assert any("write" in str(point) for point in points)


def test_a_waiting_file_of_a_living_process_is_left_alone(tmp_path):
    gate = Event()
    fault = Fault("fsync", None, lasts=False, gate=gate)
    with broken_disk(tmp_path, fault):
        slow = Writer(store(tmp_path, "safetensors"), 1)
        slow.submit(capture(1))
        while not fault.met:
            sleep(0.001)
        assert any(WAITING.fullmatch(path.name) for path in tmp_path.iterdir())
        save(tmp_path, "safetensors", range(2, 4))
        gate.set()
        assert slow.close(60.0).saved == 1
    assert complaints(tmp_path, {}, alive=True) == []
    assert len(contents(tmp_path)) == 3


def test_a_slow_disk_holds_nobody_up_and_drops_what_cannot_wait(tmp_path):
    gate = Event()
    with broken_disk(tmp_path, Fault("write", None, gate=gate)):
        writer = Writer(store(tmp_path, "safetensors"), 9)
        for step in range(1, 10):
            writer.submit(capture(step))
        early = writer.close(0.0)
        assert early.unfinished == 3
        assert early.dropped in (6, 7)
        gate.set()
        writer.close(60.0)
    notes = writer.notes()
    assert [note.outcome for note in notes].count("dropped") == 1
    assert complaints(tmp_path, {}, alive=True) == []


def test_the_hundredth_failure_is_told_again(tmp_path):
    with broken_disk(tmp_path, Fault("write", errno.ENOSPC)):
        totals, told = save(tmp_path, "safetensors", range(1, 206))
    assert (totals.failed, told.count("failed")) == (205, 3)


def test_a_disk_of_a_limited_file_size_leaves_nothing(tmp_path):
    """The kernel's own partial write: a limit on the size of files, as of a quota."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save(tmp_path, "safetensors", range(1, 2))
    before = contents(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        totals, told = save(tmp_path, "safetensors", range(2, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (totals.failed, told) == (2, ["plan", "failed"])
    assert contents(tmp_path) == before
    assert len(os.listdir(tmp_path)) == 1


def weights(run):
    return load_file(run.directory / "adapter/adapter_model.safetensors")


def losses(run):
    return [(row["loss/total"].hex(), row["grad_norm"]) for row in read_metrics(run.directory / "metrics.jsonl")[:-1]]


@pytest.fixture(scope="module")
def saving():
    return {"save_logits": True, "save_logits_steps": 1}


@pytest.fixture
def plain(settings, tmp_path):
    return run_training(settings(output_dir=str(tmp_path / "plain"), checkpoint={"every_steps": None}))


@pytest.mark.usefixtures("none_dropped")
@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault("write", errno.ENOSPC, 1000),
        Fault("open", errno.EROFS),
        Fault("mkdir", errno.EACCES, 1),
        Fault("disk_usage", errno.EIO),
    ],
    ids=str,
)
def test_training_goes_on_and_is_the_same_to_the_bit(settings, tmp_path, plain, saving, fault, capsys):
    config = settings(logits={**saving, "save_logits_dir": "logits/here"})
    with broken_disk(tmp_path / "run/logits", fault):
        run = run_training(config)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(run).items())
    assert losses(run) == losses(plain)
    told = capsys.readouterr().err
    assert told.count("training goes on without saved logits") == (fault is not None)
    held = contents(tmp_path / "run/logits/here")
    assert len(held) == (4 if fault is None else 0)


def test_a_folder_removed_in_the_middle_is_made_again(tmp_path):
    keeper = Store(tmp_path / "logits", form="safetensors", max_files=9, max_bytes=1 << 30)
    keeper.write(capture(1).record())
    shutil.rmtree(tmp_path / "logits")
    keeper.write(capture(2).record())
    assert [name[:13] for name in contents(tmp_path / "logits")] == ["logits_step_2"]
    assert complaints(tmp_path / "logits", {}, alive=True) == []


def test_a_file_in_place_of_the_folder_stops_nothing(tmp_path):
    (tmp_path / "logits").write_text("precious")
    totals, told = save(tmp_path / "logits", "safetensors", range(1, 4))
    assert (totals.saved, totals.failed, told) == (0, 3, ["failed"])
    assert (tmp_path / "logits").read_text() == "precious"
