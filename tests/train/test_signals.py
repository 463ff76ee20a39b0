"""SIGINT and SIGTERM finish the step, save and end with 130 or 143; the clock asks for checkpoints."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from so8t_torch.train import checkpoints
from so8t_torch.train.run import run_training
from so8t_torch.train.signals import SaveAndStop, StopSignals
from tests.faults.kills import differences, trace, undisturbed
from tests.faults.kills import settings as cell_settings

ONE = SimpleNamespace(world_size=1)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_stops(zygote, tiny_source, sentences, tmp_path, number, status):
    cell = ("dropout", "accumulation", "ramp")
    quiet = undisturbed(zygote, cell_settings(cell, tiny_source, sentences, tmp_path / "quiet"))
    config, log = cell_settings(cell, tiny_source, sentences, tmp_path / "run"), tmp_path / "log"
    # the first micro-batch of step 5, after two epochs of three; the schedule saves at even steps
    assert zygote.train(config, {"micro_batch": 7, "signal": int(number)}, log=log) == status
    assert f"{number.name}: stopped after step 5 with a checkpoint" in log.read_text()
    assert checkpoints.newest(tmp_path / "run/checkpoints") == (tmp_path / "run/checkpoints/checkpoint-5", [])
    assert not (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert zygote.train(config, {}, log=log) == 0, log.read_text()
    assert not differences(quiet.trace, trace(tmp_path / "run"))


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_says_what_happens_and_what_a_second_does(capfd):
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        said = "SIGINT: this step is finished and saved, then the run ends; once more ends it at once"
        assert capfd.readouterr().err.strip() == said
    with StopSignals(tells=False):
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_the_same_signal_once_more_has_its_usual_effect(interruptible):
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is interruptible


def test_outside_the_main_thread_nothing_is_watched():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def watch():
        with StopSignals() as signals:
            seen.append((signal.getsignal(signal.SIGTERM), signals.received))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [(before, 0)]


def test_the_clock_asks_for_a_checkpoint_and_counts_from_the_last():
    now = [0.0]
    callback = SaveAndStop(StopSignals(), every_minutes=3, clock=lambda: now[0])
    asked = []
    for seconds in (0, 100, 179, 180, 181, 300, 359.9, 361, 540):
        now[0] = seconds
        control = TrainerControl()
        callback.on_step_end(ONE, None, control)
        if control.should_save or seconds == 300:
            callback.on_save(ONE, None, control)
            asked += [seconds] if control.should_save else []
        assert not control.should_training_stop
    # 300 is a checkpoint of the schedule, from which the clock counts again
    assert asked == [180, 540]


def test_a_noted_signal_asks_for_a_checkpoint_and_the_end():
    signals, control = StopSignals(), TrainerControl()
    callback = SaveAndStop(signals, None)
    callback.on_step_end(ONE, None, control)
    assert not control.should_save
    signals.received = signal.SIGTERM
    callback.on_step_end(ONE, None, control)
    assert (control.should_save, control.should_training_stop) == (True, True)


def test_checkpoints_by_the_clock_alone_are_rotated(settings):
    sections = {"training": {"max_steps": 5}, "checkpoint": {"every_steps": None, "every_minutes": 1e-9, "keep": 2}}
    directory = run_training(settings(**sections)).directory
    # the first one will be the one behind the horizon of instability, which this run does not reach
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {f"checkpoint-{i}" for i in (1, 4, 5)}
