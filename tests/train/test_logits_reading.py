"""Saved logits read back: measures against formulas on whole distributions, damage named, tables and pictures."""

import io
import json
import math
import re
import struct
from dataclasses import replace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file
from torch.distributions import Categorical, kl_divergence
from typer.testing import CliRunner

from so8t_torch import cli
from so8t_torch.core.errors import CheckpointError, DataError
from so8t_torch.train.logits.capture import Capture
from so8t_torch.train.logits.measures import difference, judge, reliability, summarise, together, top_tokens
from so8t_torch.train.logits.reading import find_records, read_record
from so8t_torch.train.logits.record import LogitsRecord
from so8t_torch.train.logits.reports import compare, show
from tests.faults.logits_at_fault import capture

N, V = 200, 50


def example(seed=0, scale=3.0):
    source = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, V, generator=source, dtype=torch.float64)
    labels = torch.multinomial((0.5 * logits).softmax(1), 1, generator=source)[:, 0]
    return logits.float(), labels


def record_of(logits, labels, mode="full", top_k=8, step=1, dtype=torch.float32) -> LogitsRecord:
    taken = Capture(step, 0, mode=mode, top_k=top_k, dtype=dtype)
    taken.begin(torch.zeros(len(labels)), torch.arange(len(labels)), labels, (1, len(labels) + 1))
    taken.chunk(logits, labels, torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    return taken.record()


def test_full_measures_are_those_of_the_distribution():
    logits, labels = example()
    truth = Categorical(logits=logits.double())
    found = judge(record_of(logits, labels))
    torch.testing.assert_close(found.entropy[:, 0], truth.entropy(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.entropy[:, 0], found.entropy[:, 1])
    torch.testing.assert_close(found.nll, -truth.log_prob(labels), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.confidence, truth.probs.amax(1), rtol=1e-5, atol=0)
    assert torch.equal(found.predicted, logits.argmax(1))
    assert found.left_out == 0


@pytest.mark.parametrize("top_k", [1, 8, 49])
def test_entropy_lies_between_the_bounds_of_the_largest_logits(top_k):
    logits, labels = example()
    truth = Categorical(logits=logits.double()).entropy()
    found = judge(record_of(logits, labels, "topk", top_k))
    low, high = found.entropy.T
    rounding = 2e-5  # of logsumexp in float32, times −log p of the smallest
    assert (low <= truth + rounding).all()
    assert (truth <= high + rounding).all()
    if top_k == 49:
        torch.testing.assert_close(low, high, rtol=1e-3, atol=1e-3)


def test_all_logits_kept_as_the_largest_give_the_full_measures():
    logits, labels = example()
    full, every = judge(record_of(logits, labels)), judge(record_of(logits, labels, "topk", V))
    torch.testing.assert_close(full.entropy, every.entropy, rtol=1e-12, atol=1e-12)
    assert torch.equal(full.predicted, every.predicted)


def test_a_masked_token_is_no_damage_and_an_overflow_is_left_out():
    logits, labels = example()
    logits[:, 7] = -math.inf
    labels[labels == 7] = 8
    found = judge(record_of(logits, labels))
    assert found.left_out == 0
    assert torch.isfinite(found.entropy).all()
    logits[:3] *= 1e6
    assert judge(record_of(logits, labels, dtype=torch.float16)).left_out == 3
    assert summarise(judge(record_of(logits, labels, dtype=torch.float16))).positions == N - 3


def test_divergence_is_exact_in_full_and_a_lower_bound_of_the_largest():
    (a, labels), (b, _) = example(0), example(1)
    truth = kl_divergence(Categorical(logits=a.double()), Categorical(logits=b.double())).mean().item()
    whole = difference(record_of(a, labels), record_of(b, labels))
    assert whole.exact
    assert whole.divergence == pytest.approx(truth, rel=1e-5)
    assert whole.agreement == (a.argmax(1) == b.argmax(1)).double().mean().item()
    least = 0.0
    for top_k in (1, 5, 20, 50):
        part = difference(record_of(a, labels, "topk", top_k), record_of(b, labels, "topk", top_k))
        assert part.exact == (top_k == V)
        assert part.divergence <= truth * (1 + 1e-5)
        assert part.divergence >= least - 1e-9
        least = part.divergence
    assert least == pytest.approx(truth, rel=1e-5)
    itself = difference(record_of(a, labels, "topk", 5), record_of(a, labels, "topk", 5))
    assert (itself.divergence, itself.label_change, itself.agreement) == (0.0, 0.0, 1.0)


def test_a_change_of_the_labels_chance_is_measured_outside_the_kept_ones_too():
    (a, labels), (b, _) = example(0), example(1)
    change = [torch.log_softmax(x.double(), 1).gather(1, labels[:, None]) for x in (a, b)]
    found = difference(record_of(a, labels, "topk", 1), record_of(b, labels, "topk", 1))
    assert found.label_change == pytest.approx((change[1] - change[0]).abs().mean().item(), rel=1e-5)


def test_other_tokens_have_no_difference():
    (a, labels), (b, others) = example(0), example(1)
    with pytest.raises(DataError, match="about different tokens"):
        difference(record_of(a, labels), record_of(b, others))


def test_reliability_by_hand():
    judged = replace(
        judge(record_of(*example())),
        confidence=torch.tensor([0.05, 0.1, 0.95, 0.95, 1.0], dtype=torch.float64),
        labels=torch.tensor([1, 1, 1, 1, 1]),
        predicted=torch.tensor([0, 1, 1, 1, 0]),
    )
    found = [cell for bin_ in reliability(judged) for cell in bin_]
    assert found == pytest.approx([0.075, 0.5, 2, 2.9 / 3, 2 / 3, 3])
    assert top_tokens(judged, 1) == [(1, 0.6, 1.0)]


def test_records_together_weigh_by_positions():
    parts = [judge(record_of(*example(seed, scale))) for seed, scale in ((0, 1.0), (1, 5.0))]
    each = [summarise(part) for part in parts]
    whole = summarise(together(parts))
    assert whole.positions == 2 * N
    assert whole.loss == pytest.approx((each[0].loss + each[1].loss) / 2)


def write(folder, step, seed=0, mode="topk", time="20300101_000000"):
    folder.mkdir(parents=True, exist_ok=True)
    logits, labels = example(seed)
    record = replace(record_of(logits, labels, mode, step=step), timestamp=time)
    path = folder / f"logits_step_{step}_epoch_0_{time}.safetensors"
    path.write_bytes(b"".join(record.encode("safetensors")))
    return path


def test_files_are_found_in_order_of_step(tmp_path):
    paths = [write(tmp_path / "logits", step) for step in (100, 9, 20)]
    (tmp_path / "logits/.logits_step_1.part").write_text("half")
    assert find_records(tmp_path) == find_records(tmp_path / "logits") == [paths[1], paths[2], paths[0]]
    assert find_records(paths[0]) == [paths[0]]


@pytest.mark.parametrize(("place", "why"), [("absent", "no such file or folder"), ("empty", "holds no saved logits")])
def test_nothing_to_show_is_named(tmp_path, place, why):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=why):
        find_records(tmp_path / place)


def damaged(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "header":
        data[:8] = struct.pack("<Q", 1 << 60)
    elif how == "empty":
        data = bytearray()
    else:
        data = bytearray(len(data))
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "header", "empty", "zeros"])
def test_a_damaged_file_is_named(tmp_path, how):
    path = write(tmp_path, 1)
    damaged(path, how)
    with pytest.raises(DataError, match=r"logits_step_1_epoch_0_20300101_000000\.safetensors: not a complete"):
        read_record(path)


HOSTILE = {
    "no metadata": (
        lambda _, facts: facts.clear(),
        "expected logits that a run saved .* the entries 'ids', ",
    ),
    "no step": (lambda _, facts: facts.pop("step"), "no 'step' in the metadata"),
    "no labels": (lambda tensors, _: tensors.pop("labels"), "labels are missing"),
    "no ids": (lambda tensors, _: tensors.pop("ids"), "ids are missing"),
    "step": (lambda _, facts: facts.update(step="__import__('os')"), "step must be a number"),
    "mode": (lambda _, facts: facts.update(mode="most"), "mode must be one of full, topk"),
    "negative": (lambda _, facts: facts.update(logits_shape="[-1, 3]"), "logits_shape must be list"),
    "huge": (lambda _, facts: facts.update(logits_shape="[" * 5000), "logits_shape must be a number or a list"),
    "count": (lambda _, facts: facts.update(logits_shape="[3, 50]"), r"must have shape \[3"),
    "ids": (lambda tensors, _: tensors["ids"].add_(V), "tokens outside the vocabulary of 50"),
    "dtype": (lambda tensors, _: tensors.update(ids=tensors["ids"].float()), "ids has the wrong dtype"),
}


@pytest.mark.parametrize(("change", "why"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_of_something_else_is_refused(tmp_path, change, why):
    record = record_of(*example(), "topk")
    tensors = dict(record.tensors)
    facts = {name: str(value) for name, value in record.facts().items()}
    change(tensors, facts)
    path = tmp_path / "logits_step_1_epoch_0_20300101_000000.safetensors"
    save_file(tensors, path, facts)
    with pytest.raises(DataError, match=why):
        read_record(path)


FOREIGN = {
    "model.pt": (
        lambda path: torch.save(torch.nn.Linear(2, 2).state_dict(), path),
        "the entries 'bias', 'weight'.",
    ),
    "model.safetensors": (
        lambda path: save_file({"w": torch.ones(2)}, path, {"format": "pt"}),
        "the entries 'w'.",
    ),
    "many.pt": (lambda path: torch.save(dict.fromkeys("edcba", 1), path), "the entries 'a', 'b', 'c' and 2 more. Name"),
    "nothing.pt": (lambda path: torch.save({}, path), "it holds nothing"),
    "module.pt": (lambda path: torch.save(torch.nn.Linear(2, 2), path), "Unsupported global: GLOBAL torch.nn.modules."),
    "notes.txt": (lambda path: path.write_text("hello"), "expected a file of saved logits, logits_step_*.safetensors"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_told_from_what_was_expected(tmp_path, name):
    make, why = FOREIGN[name]
    make(tmp_path / name)
    with pytest.raises((DataError, CheckpointError), match=re.escape(why)) as refused:
        show(tmp_path / name)
    assert str(refused.value).startswith(f"{tmp_path / name}")


def test_a_pickle_that_acts_is_refused(tmp_path):
    class Act:
        def __reduce__(self):
            return (open, (str(tmp_path / "acted"), "w"))

    torch.save({**capture(1).record().tensors, "step": Act()}, tmp_path / "one.pt")
    with pytest.raises(CheckpointError, match="not a file of tensors and plain values"):
        read_record(tmp_path / "one.pt")
    assert not (tmp_path / "acted").exists()


def texts(tables):
    return ["|".join(str(cell) for column in table.columns for cell in column._cells) for table in tables]


def test_show_tells_of_every_file_and_draws(tmp_path):
    for step, seed in ((10, 0), (20, 1)):
        write(tmp_path / "logits", step, seed)
    records, tokens = show(tmp_path, plot=tmp_path / "show.png")
    assert records.row_count == 2
    expected = summarise(judge(record_of(*example(0), "topk")))
    assert f"{expected.loss:.4f}" in texts([records])[0]
    assert tokens.row_count == 12
    assert (tmp_path / "show.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    show(find_records(tmp_path)[0], plot=tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000


def test_a_picture_or_tokenizer_that_cannot_be_is_refused(tmp_path):
    write(tmp_path / "logits", 1)
    with pytest.raises(DataError, match=r"show\.txt: expected the name of a picture, such as show\.png"):
        show(tmp_path, plot=tmp_path / "show.txt")
    with pytest.raises(DataError, match="absent: expected the folder of a tokenizer"):
        show(tmp_path, tokenizer=tmp_path / "absent")


def test_tokens_are_spelled_where_a_tokenizer_is_named(tmp_path, tiny_source, tokenizer):
    write(tmp_path / "logits", 1)
    _, tokens = show(tmp_path, tokenizer=tiny_source, plot=tmp_path / "one.png")
    ids = [int(str(cell)) for cell in tokens.columns[1]._cells]
    assert [str(cell) for cell in tokens.columns[0]._cells] == [repr(tokenizer.decode([token])) for token in ids]


def test_compare_pairs_steps_and_measures_the_same_tokens_only(tmp_path):
    for name, steps in (("a", (1, 2, 3)), ("b", (2, 3, 4))):
        for step in steps:
            write(tmp_path / name / "logits", step, seed=5 if name == "b" and step == 3 else 0)
    each, changes = compare(tmp_path / "a", tmp_path / "b", plot=tmp_path / "both.png")
    assert [str(cell) for cell in each.columns[1]._cells] == ["2", "2", "3", "3"]
    assert [str(cell) for cell in changes.columns[1]._cells] == ["1.000", "other tokens"]
    assert (tmp_path / "both.png").stat().st_size > 10_000
    with pytest.raises(DataError, match="No step is in both"):
        compare(tmp_path / "a", write(tmp_path / "c", 9))
    each, _ = compare(find_records(tmp_path / "a")[0], write(tmp_path / "c", 9))
    assert [str(cell) for cell in each.columns[1]._cells] == ["1", "9"]


@pytest.mark.parametrize("width", [80, 60])
def test_tables_fit_narrow_terminals_with_every_number_whole(tmp_path, width):
    for name, seed in (("a", 0), ("b", 1)):
        write(tmp_path / name, 123_456, seed)
    tables = [*show(tmp_path / "a"), *compare(tmp_path / "a", tmp_path / "b"), *compare(tmp_path / "a", tmp_path / "a")]
    for table in tables:
        screen = Console(width=width, file=io.StringIO(), legacy_windows=False)
        screen.print(table)
        lines = screen.file.getvalue().splitlines()
        assert max(map(cell_len, lines)) <= width
        for row in range(table.row_count):
            cells = [str(column._cells[row]) for column in table.columns]
            assert any(all(cell in line for cell in cells) for line in lines), cells


def test_a_table_of_overflowed_logits_says_how_many_were_left_out(tmp_path):
    logits, labels = example()
    for scale in (1.0, 1e6):
        logits[:3] *= scale
        path = tmp_path / "logits_step_1_epoch_0_20300101_000000.safetensors"
        path.write_bytes(b"".join(record_of(logits, labels, dtype=torch.float16).encode("safetensors")))
        columns = {str(column.header): [str(cell) for cell in column._cells] for column in show(path)[0].columns}
        assert columns.get("left out") == (["3"] if scale > 1 else None)


def test_the_commands_print_and_draw(tmp_path):
    write(tmp_path / "logits", 10)
    for arguments in (["show", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        picture = tmp_path / f"{arguments[0]}.png"
        done = CliRunner().invoke(cli.app, ["logits", *arguments, "--plot", str(picture)])
        assert done.exit_code == 0, done.output
        assert picture.is_file()
        assert "10" in done.output


def test_metadata_is_plain_json(tmp_path):
    path = write(tmp_path, 1)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    assert json.loads(header["logits_shape"]) == [N, V]
    assert json.loads(header["step"]) == 1
