"""What is saved of the logits of a training step, against the logits of the whole model; names, bounds, the plan."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerState

from so8t_torch.core.errors import ConfigError
from so8t_torch.train import building
from so8t_torch.train.config import LogitsSection
from so8t_torch.train.folder import RunFolder, read_metrics
from so8t_torch.train.logits.capture import Capture, _largest
from so8t_torch.train.logits.reading import find_records, read_record
from so8t_torch.train.logits.recorder import LogitsRecorder
from so8t_torch.train.logits.store import NAME, Projection, Store
from so8t_torch.train.logits.writer import Writer
from so8t_torch.train.loss import LossAtHead
from so8t_torch.train.run import run_training
from so8t_torch.train.trainer import SO8TTrainer
from tests.faults.logits_at_fault import capture, contents

pytestmark = pytest.mark.usefixtures("none_dropped")

ON = {"save_logits": True, "save_logits_steps": 1}


def run_once(settings, **sections):
    return run_training(settings(**sections))


@pytest.fixture
def batches(monkeypatch):
    """The micro-batches of a run, in order."""
    kept = []
    real = SO8TTrainer._forward
    monkeypatch.setattr(
        SO8TTrainer, "_forward", lambda self, model, inputs: kept.append(inputs) or real(self, model, inputs)
    )
    return kept


def by_whole_model(config, batch):
    """All logits of the untrained model, each beside the token it is judged by."""
    model = building.build(config).model.train()
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in names}).logits[:, :-1]
    there = batch["labels"][:, 1:] != -100
    rows, places = there.nonzero(as_tuple=True)
    return logits[rows, places], batch["labels"][:, 1:][there], rows, places + 1


@pytest.mark.parametrize("mode", ["full", "topk"])
def test_a_record_holds_the_logits_of_the_last_micro_batch(settings, batches, mode):
    logits = {**ON, "save_logits_mode": mode, "save_logits_top_k": 7}
    training = {"max_steps": 1, "batch_size": 2, "accumulation": 3, "loss_chunk": 5}
    run = run_once(settings, logits=logits, training=training)
    record = read_record(find_records(run.directory)[0])
    whole, labels, rows, places = by_whole_model(settings(training=training), batches[2])
    found = record.tensors
    assert torch.equal(found["labels"], labels)
    assert torch.equal(found["rows"], rows.int())
    assert torch.equal(found["positions"], places.int())
    torch.testing.assert_close(found["logsumexp"], whole.logsumexp(1))
    torch.testing.assert_close(found["label_logits"], whole.gather(1, labels[:, None])[:, 0])
    if mode == "full":
        torch.testing.assert_close(found["logits"], whole)
    else:
        torch.testing.assert_close(found["values"], whole.topk(7).values)
        torch.testing.assert_close(whole.gather(1, found["ids"].long()), found["values"])
    assert (record.mode, record.step, record.epoch) == (mode, 1, 0)
    assert record.logits_shape == list(whole.shape)
    assert record.batch_shape == list(batches[2]["labels"].shape)
    assert record.logits_dtype == "torch.float32"


def test_the_saved_logits_give_the_logged_loss(settings):
    """With one micro-batch a step, the record is about the tokens of the log entry."""
    run = run_once(settings, logits=ON, training={"max_steps": 5, "batch_size": 6})
    rows = {row["step"]: row for row in read_metrics(run.directory / "metrics.jsonl") if row["kind"] == "train"}
    records = [read_record(path) for path in find_records(run.directory)]
    assert [record.step for record in records] == [1, 2, 3, 4, 5]
    for record in records:
        nll = record.tensors["logsumexp"].double() - record.tensors["label_logits"].double()
        assert nll.mean().item() == pytest.approx(rows[record.step]["loss/lm"], rel=2e-6)


def test_no_logits_are_computed_for_the_record(settings):
    """As many products with the head as without saving: no second forward pass, no product repeated."""

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    counts = []
    for saving in (False, True):
        with Products() as seen:
            run_training(settings(output_dir=f"{settings().output_dir}/{saving}", logits={**ON, "save_logits": saving}))
        counts.append(seen.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("mode", ["full", "topk"])
def test_no_block_is_kept_and_one_computed_again_changes_nothing(mode):
    head = nn.Linear(8, 1000, bias=False)
    hidden, labels = torch.randn(1, 40, 8, requires_grad=True), torch.randint(0, 1000, (1, 40))
    watch = capture(1, mode)
    with LossAtHead(head, 0, chunk=13).open(labels, {0: hidden}, watch) as losses:
        head(hidden[:, -1:])
    parts = [value for part in watch._parts for value in part.values()]
    assert sum(part["logsumexp"].numel() for part in watch._parts) == 39
    assert all(value.untyped_storage().nbytes() == value.nbytes and not value.requires_grad for value in parts)
    record = watch.record()
    losses.result()[0].sum().backward()
    watch.chunk(torch.zeros(13, 1000), labels[0, :13], torch.zeros(13))
    assert all(torch.equal(value, watch.record().tensors[name]) for name, value in record.tensors.items())


def test_names_and_steps(settings):
    run = run_once(
        settings,
        logits={**ON, "save_logits_steps": 2, "save_logits_dir": "deep/logits"},
        training={"max_steps": 7, "batch_size": 2, "accumulation": 2},
    )
    names = sorted(path.name for path in (run.directory / "deep/logits").iterdir())
    assert [re.sub(r"_\d{8}_\d{6}", "_TIME", name) for name in names] == [
        f"logits_step_{step}_epoch_{epoch}_TIME.safetensors" for step, epoch in ((2, 0), (4, 1), (6, 2))
    ]
    assert not list((run.directory / "logits").iterdir())


def test_a_pt_file_holds_plain_values_only(settings):
    run = run_once(settings, logits={**ON, "save_logits_format": "pt", "save_logits_mode": "full"})
    path = find_records(run.directory)[0]
    held = torch.load(path, weights_only=True)
    assert {"logits", "labels", "step", "epoch", "timestamp", "logits_shape", "logits_dtype", "labels_shape"} <= set(
        held
    )
    assert held["logits_shape"] == list(held["logits"].shape)
    assert held["labels_shape"] == list(held["labels"].shape)
    assert re.fullmatch(r"\d{8}_\d{6}", held["timestamp"])
    assert path.name == f"logits_step_{held['step']}_epoch_{held['epoch']}_{held['timestamp']}.pt"
    facts = read_record(path).facts()
    assert facts == {name: held[name] for name in facts}


@pytest.mark.parametrize("form", ["safetensors", "pt"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_form_and_dtype_comes_back_as_it_was(tmp_path, form, dtype):
    taken = capture(3)
    taken._dtype = getattr(torch, dtype)
    taken = again(taken)
    record = taken.record()
    path = tmp_path / f"one.{form}"
    path.write_bytes(b"".join(record.encode(form)))
    back = read_record(path)
    assert back.facts() == record.facts()
    assert back.tensors.keys() == record.tensors.keys()
    for name, value in record.tensors.items():
        assert back.tensors[name].dtype == value.dtype
        assert torch.equal(back.tensors[name], value)
    assert back.tensors["values"].dtype == getattr(torch, dtype)


@pytest.mark.parametrize("count", [24, 3, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_what_the_library_would_have_written(count, dtype):
    record = again(capture(3)).record()
    tensors = {name: value[:count] for name, value in record.tensors.items()}
    tensors["values"] = tensors["values"].to(dtype)
    record = replace(record, tensors=tensors, logits_shape=[count, 300])
    written = b"".join(record.encode("safetensors"))
    texts = {name: str(value) for name, value in record.facts().items()}
    by_library = safetensors.torch.save(tensors, texts)
    lengths = [8 + int.from_bytes(content[:8], "little") for content in (written, by_library)]
    assert json.loads(written[8 : lengths[0]]) == json.loads(by_library[8 : lengths[1]])
    assert written[lengths[0] :] == by_library[lengths[1] :]
    assert lengths[0] == lengths[1]


def again(taken):
    """Show the same random logits to a capture once more."""
    source = torch.Generator().manual_seed(taken.step)
    logits = torch.randn(24, 300, generator=source)
    labels = torch.randint(0, 300, (24,), generator=source)
    taken.begin(torch.zeros(24), torch.arange(24), labels, (1, 25))
    taken.chunk(logits, labels, functional.cross_entropy(logits, labels, reduction="none"))
    return taken


@pytest.mark.parametrize("vocabulary", [1, 5, 64, 65, 1536, 4096, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logits_are_the_largest(vocabulary, dtype):
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    if vocabulary > 5:
        logits[0, 3], logits[1, 4] = -math.inf, math.inf
    count = min(64, vocabulary)
    values, ids = _largest(logits, count)
    assert torch.equal(values, logits.sort(1, descending=True).values[:, :count])
    assert torch.equal(logits.gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())


def test_a_pass_that_is_repeated_replaces_the_first():
    taken = capture(3)
    first = taken.record()
    second = again(taken).record()
    assert torch.equal(first.tensors["values"], second.tensors["values"])
    assert second.logits_shape == [24, 300]


def test_too_little_memory_gives_the_record_up_and_nothing_else(monkeypatch, tmp_path):
    def none_left(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Capture, "_keep", none_left)
    taken = capture(1)
    assert not taken.complete
    writer = Writer(Store(tmp_path, form="safetensors", max_files=1, max_bytes=10), 1)
    writer.submit(taken)
    assert writer.close(1.0).failed == 1
    assert [note.outcome for note in writer.notes()] == ["failed"]


def store(folder, files=3, size=1 << 30):
    return Store(folder, form="safetensors", max_files=files, max_bytes=size)


def test_two_files_of_one_second_get_two_names(tmp_path):
    record = replace(capture(5).record(), timestamp="20300101_000000")
    keeper = store(tmp_path)
    names = [keeper.write(record).name for _ in range(3)]
    assert names == [f"logits_step_5_epoch_0_20300101_000000{tail}.safetensors" for tail in ("", "_2", "_3")]
    assert all(NAME.fullmatch(name) for name in names)


def test_the_oldest_files_go_and_a_restart_knows_them(tmp_path):
    for step in range(1, 6):
        store(tmp_path).write(capture(step).record())  # a new store each time: nothing is remembered
    assert sorted(int(NAME.fullmatch(name)[1]) for name in contents(tmp_path)) == [3, 4, 5]
    store(tmp_path, files=1).prune()
    assert [name[:14] for name in contents(tmp_path)] == ["logits_step_5_"]


def test_a_clock_that_goes_back_costs_no_fresh_file(tmp_path):
    keeper = store(tmp_path)
    for step, year in ((1, 2030), (2, 2031), (3, 2032), (4, 2001), (3, 2000)):
        keeper.write(replace(capture(step).record(), timestamp=f"{year}0101_000000"))
    assert [name[29 - 7 : 26] for name in keeper.files()] == ["2032", "2001", "2000"]


def test_bytes_are_bounded_too_and_strangers_are_left_alone(tmp_path):
    one = sum(piece.nbytes for piece in capture(1).record().encode("safetensors"))
    for name in ("notes.txt", "logits_step_1.safetensors", "logits_step_x_epoch_0_20300101_000000.pt"):
        (tmp_path / name).write_text("precious")
    keeper = store(tmp_path, files=100, size=int(2.5 * one))
    for step in range(1, 6):
        keeper.write(capture(step).record())
    assert sorted(int(NAME.fullmatch(name)[1]) for name in contents(tmp_path)) == [4, 5]
    assert sum((tmp_path / name).read_text() == "precious" for name in ("notes.txt", "logits_step_1.safetensors")) == 2


def test_two_processes_share_a_folder(tmp_path):
    left, right = store(tmp_path, files=4), store(tmp_path, files=4)
    for step in range(1, 5):
        left.write(capture(step).record())
        right.write(capture(10 + step).record())
    assert sorted(int(NAME.fullmatch(name)[1]) for name in contents(tmp_path)) == [3, 4, 13, 14]


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (Projection(file=2 << 30, files=5, at_once=2 << 30, free=1 << 40), "larger than the 1.0 GiB granted"),
        (Projection(file=1 << 20, files=500, at_once=500 << 20, free=600 << 20), "more than half of what is free"),
        (Projection(file=900 << 20, files=2000, at_once=1 << 30, free=1 << 40), "writes more than 1.0 TiB"),
        (Projection(file=1 << 20, files=10_000, at_once=100 << 20, free=1 << 30), None),
    ],
)
def test_an_absurd_plan_is_refused(tmp_path, plan, why):
    found = store(tmp_path).refusal(plan)
    assert found is None if why is None else why in found


def test_the_first_save_announces_and_a_refused_plan_saves_nothing(settings, capsys):
    config = settings(logits={**ON, "save_logits_max_mb": 0.001})
    run = run_training(config)
    assert run.steps == 4
    told = capsys.readouterr().err
    assert told.count("no logits are saved in this run: ") == 1
    assert "4 files in this run" in told
    assert "larger than the 1.0 KiB granted by save_logits_max_mb" in told
    assert not contents(run.directory / "logits")


def test_events_announce_the_plan_and_end_with_the_totals(settings, capsys):
    run = run_training(settings(logits=ON))
    told = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    found = [event for event in told if event["event"] == "logits"]
    assert [event["outcome"] for event in found] == ["plan", "closed"]
    assert re.match(r"[\d.]+ KiB a file, 4 files in this run", found[0]["text"])
    assert (found[1]["saved"], found[1]["failed"], found[1]["dropped"], found[1]["unfinished"]) == (4, 0, 0, 0)
    assert capsys.readouterr().err.count("logits are saved: ") == 1


def state(step, *, first=True):
    found = TrainerState(global_step=step, max_steps=10, epoch=1.75)
    found.is_world_process_zero = first
    return found


def test_only_process_zero_saves_only_when_due_and_never_at_step_0(tmp_path):
    recorder = LogitsRecorder(LogitsSection(save_logits_steps=4), RunFolder(tmp_path))
    due = [step + 1 for step in range(10) if recorder.watch(state(step)) is not None]
    assert due == [4, 8]
    assert recorder.watch(state(3, first=False)) is None
    assert recorder.watch(state(3)).epoch == 1


def test_evaluation_is_not_watched(settings, sentences):
    logits = {**ON, "save_logits_steps": 2}
    run = run_once(settings, logits=logits, data={"eval": str(sentences)}, evaluation={"every_steps": 1})
    assert [read_record(path).step for path in find_records(run.directory)] == [2, 4]


def test_a_resumed_run_may_save_otherwise_and_prunes_what_it_finds(settings):
    sections = {"training": {"max_steps": 4}, "checkpoint": {"every_steps": 2}}
    first = run_training(settings(**sections, logits={**ON, "save_logits_max_files": 3}))
    assert [read_record(path).step for path in find_records(first.directory)] == [2, 3, 4]
    checkpoint = str(first.directory / "checkpoints/checkpoint-2")
    run_training(settings(**sections, logits={**ON, "save_logits_max_files": 2}), resume=checkpoint)
    assert sorted(read_record(path).step for path in find_records(first.directory)) == [3, 4]


@pytest.mark.parametrize(
    "wrong", [{"save_logits_steps": 0}, {"save_logits_mode": "most"}, {"save_logits_max_mb": math.inf}]
)
def test_settings_that_make_no_sense_are_refused(settings, wrong):
    with pytest.raises(ConfigError, match=f"logits.{next(iter(wrong))}"):
        settings(logits=wrong)


def test_a_plan_counts_the_steps_that_are_left(tmp_path):
    recorder = LogitsRecorder(LogitsSection(save_logits_steps=3), RunFolder(tmp_path))
    for step, left in ((3, 3), (6, 2), (9, 1)):
        assert recorder._open(SimpleNamespace(max_steps=10, global_step=step))._planned == left
        recorder._writer = None
