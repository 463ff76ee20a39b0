"""Metrics of a run: every field in the table, nothing half written, nothing lost to a disk that fails for a while."""

import csv
import errno
import json
import math
import os
import signal

import pytest
from transformers import TrainerCallback

from so8t_torch.core.errors import DataError, TrainingError
from so8t_torch.train import journal
from so8t_torch.train.curves import MARKS, draw_curves, read_marks
from so8t_torch.train.folder import cut_off_half_a_line, read_metrics
from so8t_torch.train.guard import TrainingStopped
from so8t_torch.train.journal import Journal, append_whole, read_rows
from so8t_torch.train.rollback import read_recovery
from so8t_torch.train.run import run_training
from so8t_torch.train.signals import Interrupted
from so8t_torch.train.table import write_table
from tests.faults.disk import Fault, broken_disk
from tests.faults.injection import injected


def append(path, *rows):
    for row in rows:
        append_whole(path, journal.json_line(row, path))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("text", ["", "whole\n", "whole\nhalf", "half", f"whole\n{'x' * 200_000}", "x" * 200_000])
def test_half_a_line_is_cut_off_and_the_rest_stays(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    cut_off_half_a_line(path)
    assert path.read_text() == ("whole\n" if "whole" in text else "")


def test_rows_come_back_with_every_character(tmp_path):
    rows = [{"text": "a\u2028b\x85c\x0bd\r\ne"}, {"text": "後"}]
    append(tmp_path / "rows.jsonl", *rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows


def test_rows_that_cannot_be_are_refused_with_their_place(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(DataError, match=r"rows\.jsonl: no such file"):
        read_rows(path)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:2: expected a JSON object, got a list"):
        read_rows(path)
    monkeypatch.setattr(journal, "MAX_BYTES", 15)
    with pytest.raises(DataError, match=r"rows\.jsonl: expected at most 15 bytes, got 16"):
        read_rows(path)


@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, after):
    path = tmp_path / "rows.jsonl"
    append(path, {"step": 1})
    before = path.read_bytes()
    with broken_disk(tmp_path, Fault("write", errno.ENOSPC, after)), pytest.raises(OSError, match="No space left"):
        append(path, {"step": 2, "text": "ü" * 40})
    assert path.read_bytes() == before
    append(path, {"step": 3})
    assert [row["step"] for row in lines(path)] == [1, 3]


def test_rows_wait_for_a_full_disk_and_come_in_order(tmp_path):
    told = []
    kept = Journal(tmp_path / "rows.jsonl", told.append)
    kept.add({"step": 1})
    with broken_disk(tmp_path, Fault("write", errno.ENOSPC, 5)):
        for step in (2, 3, 4):
            kept.add({"step": step})
        assert [row["step"] for row in lines(tmp_path / "rows.jsonl")] == [1]
    kept.add({"step": 5})
    assert [row["step"] for row in lines(tmp_path / "rows.jsonl")] == [1, 2, 3, 4, 5]
    assert len(told) == 1
    assert "wait in memory" in told[0]


def test_rows_that_wait_at_the_end_are_written_or_said_to_be_lost(tmp_path):
    told = []
    kept = Journal(tmp_path / "rows.jsonl", told.append)
    with broken_disk(tmp_path, Fault("write", errno.ENOSPC)):
        kept.add({"step": 1})
        kept.add({"step": 2})
        kept.close()
    assert "the last 2 rows for" in told[-1]
    assert "are lost: " in told[-1]
    with broken_disk(tmp_path, Fault("write", errno.ENOSPC)):
        kept.close()
    assert len(told) == 2
    kept.close()
    assert [row["step"] for row in lines(tmp_path / "rows.jsonl")] == [1, 2]
    kept.close()
    assert len(told) == 2


class At(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, _args, state, _control, **_):
        if state.global_step == self.step:
            self.act()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_ends_has_its_table_and_its_curves(settings, number, status):
    config = settings()
    with pytest.raises(Interrupted) as caught:
        run_training(config, callbacks=[At(2, lambda: os.kill(os.getpid(), number))])
    assert caught.value.exit_code == status
    with (config.output_dir / "metrics.csv").open(newline="", encoding="utf-8") as handle:
        assert [row["step"] for row in csv.DictReader(handle) if row["kind"] == "train"] == ["1", "2"]
    assert (config.output_dir / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_the_ladder_stops_has_its_table_and_its_curves(settings, step):
    """Also where it stops before anything was logged, and without a checkpoint."""
    config = settings(recovery={"recoveries": 0})
    with injected("loss", "nan", {step}) as injection, pytest.raises(TrainingStopped):
        run_training(config, callbacks=[injection])
    assert [row["step"] for row in read_metrics(config.output_dir / "metrics.jsonl")] == list(range(1, step))
    assert (config.output_dir / "metrics.csv").is_file()
    assert (config.output_dir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_disk_that_takes_no_curves_does_not_hide_why_the_run_stopped(settings, capsys):
    config = settings(recovery={"recoveries": 0})
    with (
        broken_disk(config.output_dir / "metrics.csv.part", Fault("open", errno.ENOSPC)),
        injected("weight", "nan", {2}) as injection,
        pytest.raises(TrainingStopped),
    ):
        run_training(config, callbacks=[injection])
    assert "are not up to date" in capsys.readouterr().err


@pytest.mark.parametrize("lasts", [False, True])
def test_a_record_of_a_roll_back_that_the_disk_refuses_is_written_later(settings, capsys, lasts):
    config = settings(checkpoint={"every_steps": 1})
    fault = Fault("open", errno.ENOSPC, lasts=lasts)
    with broken_disk(config.output_dir / "recovery.json.part", fault), injected("weight", "nan", {3}) as injection:
        run = run_training(config, callbacks=[injection])
    assert run.steps == 4
    told = capsys.readouterr().err
    assert told.count("recovery.json waits in memory") == 1
    assert told.count("recovery.json is lost") == lasts
    assert read_recovery(config.output_dir).rollbacks == (not lasts)


def test_waiting_rows_are_bounded_and_a_loss_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "WAITING", 3)
    told = []
    kept = Journal(tmp_path / "rows.jsonl", told.append)
    kept._waiting = type(kept._waiting)(maxlen=3)
    with broken_disk(tmp_path, Fault("open", errno.EROFS)):
        for step in range(5):
            kept.add({"step": step})
    assert ["are lost" in text for text in told] == [False, True], "said once, however many follow"
    kept.add({"step": 5})
    assert [row["step"] for row in lines(tmp_path / "rows.jsonl")] == [3, 4, 5]


def test_a_number_that_is_not_finite_is_no_row(tmp_path):
    kept = Journal(tmp_path / "rows.jsonl")
    with pytest.raises(TrainingError, match="not finite"):
        kept.add({"loss": math.nan})
    kept.add({"step": 1})
    assert lines(tmp_path / "rows.jsonl") == [{"step": 1}]


def test_a_descriptor_is_never_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with broken_disk(tmp_path, Fault("write", errno.EIO)):
        for _ in range(20):
            with pytest.raises(OSError, match="Input/output"):
                append_whole(tmp_path / "rows.jsonl", "row\n")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_run_outlives_a_disk_that_takes_no_metrics_for_a_while(settings, tmp_path, capsys):
    fault = Fault("open", errno.ENOSPC, lasts=False)
    with broken_disk(tmp_path / "run/metrics.jsonl", fault):
        run = run_training(settings())
    assert fault.met == 1
    rows = read_metrics(run.directory / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("rows for") == 1


def test_the_table_holds_every_entry_and_every_field(settings, sentences):
    run = run_training(settings(data={"eval": str(sentences)}, evaluation={"every_steps": 2}))
    rows = read_metrics(run.directory / "metrics.jsonl")
    with (run.directory / "metrics.csv").open(newline="", encoding="utf-8") as handle:
        table = list(csv.DictReader(handle))
    assert len(table) == len(rows)
    wanted = {"step", "kind", "epoch", "time", "loss/total", "loss/lm", "loss/pet", "loss/pet_weighted", "perplexity"}
    wanted |= {"grad_norm", "lr/gates", "lr/matrices", "pet_weight", "eval/lm", "eval/perplexity"}
    wanted |= {"gate/max_angle", "gate/mean_angle", "gate/commutator", "gate/orthogonality_error"}
    assert wanted <= table[0].keys()
    for row, cells in zip(rows, table, strict=True):
        assert {name: cells[name] for name in row} == {name: str(value) for name, value in row.items()}
        assert all(cells[name] == "" for name in cells.keys() - row.keys())
    train = [row for row in rows if row["kind"] == "train"]
    assert all(row["perplexity"] == pytest.approx(math.exp(row["loss/lm"])) for row in train)
    assert all(row["loss/total"] != row["loss/lm"] for row in train), "the penalty is part of the total"
    assert [row["time"] for row in train] == sorted(row["time"] for row in train)


def test_names_with_commas_and_quotes_come_back(tmp_path):
    rows = [{"step": 1, "kind": "train", 'lr/a,"b"': 0.1}, {"step": 2, "kind": "train", "note": "x\ny"}]
    append(tmp_path / "metrics.jsonl", *rows)
    write_table(tmp_path / "metrics.jsonl", tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as handle:
        table = list(csv.DictReader(handle))
    assert table[0]['lr/a,"b"'] == "0.1"
    assert table[1]["note"] == "x\ny"


EVENTS = [
    {"event": "start"},
    {"event": "recovery", "transition": "fault", "stage": "skip", "step": 3},
    {"event": "recovery", "transition": "learning rate returned", "step": 4},
    {"event": "recovery", "transition": "out of memory", "step": 5},
    {"event": "recovery", "transition": "fault", "stage": "rollback", "step": 9},
    {"event": "rollback", "step": 9, "checkpoint": "checkpoint-5"},
    {"event": "resume", "checkpoint": "run/checkpoints/checkpoint-6"},
    {"event": "resume", "checkpoint": None},
    {"event": "recovery", "transition": "post-mortem", "step": 12},
]


def test_recoveries_and_resumes_are_marked(tmp_path, monkeypatch):
    events = tmp_path / "events.jsonl"
    append(events, *EVENTS)
    marks = [(3, "skip"), (5, "out of memory"), (9, "rollback"), (9, "rollback"), (6, "resume"), (12, "stop")]
    assert read_marks(events) == marks
    assert {kind for _, kind in marks} <= MARKS.keys()
    for step in range(1, 13):
        append(tmp_path / "metrics.jsonl", {"step": step, "kind": "train", "loss/lm": 1 / step, "grad_norm": 1.0})
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.axvline", lambda _, step, color, **__: drawn.append((step, color)))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", events)
    assert set(drawn) == {(step, MARKS[kind]) for step, kind in marks}
    assert len(drawn) == 8 * len(set(marks)), "one line in each panel"


def test_every_stage_of_the_ladder_has_a_colour():
    from so8t_torch.train.ladder import Stage

    assert {stage.name.lower() for stage in Stage} <= MARKS.keys()
