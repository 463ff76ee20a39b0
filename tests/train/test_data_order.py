import itertools
import math

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from so8t_torch.core.errors import DataError
from so8t_torch.train.data_order import Consumption, Stream, before, merged
from tests.drawn import steadily

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)).map(lambda pair: (pair[0], sum(pair))), max_size=4)


def read(stream, epochs):
    """Return the samples of the first epochs of the loop."""
    samples = []
    for epoch in range(epochs):
        stream.set_epoch(epoch)
        samples += list(stream)
    return samples


def test_an_epoch_reads_every_sample_once_and_the_next_in_another_order():
    stream = Stream(50, seed=3)
    first, second = list(stream), read(stream, 2)[50:]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_the_seed_alone_decides():
    assert read(Stream(20, 1), 3) == read(Stream(20, 1), 3)
    assert read(Stream(20, 1), 3) != read(Stream(20, 2), 3)


@given(count=st.integers(1, 12), spans=SPANS)
@settings(steadily, max_examples=200)
def test_what_is_read_is_the_stream_without_the_spans(count, spans):
    whole = read(Stream(count, 0), 150 // count + 10)
    left = [sample for position, sample in enumerate(whole) if not any(a <= position < b for a, b in spans)]
    stream = Stream(count, 0, spans)
    got = read(stream, 4)
    assert got == left[: 4 * count]
    places = [p for p in range(len(whole)) if not any(a <= p < b for a, b in spans)]
    assert [stream.place(number) for number in range(40)] == places[:40]


@given(count=st.integers(1, 12), spans=SPANS, read_before=st.integers(0, 30), lost=st.integers(1, 15))
@settings(steadily, max_examples=200)
def test_a_roll_back_changes_nothing_before_the_checkpoint_and_repeats_nothing_after_it(
    count, spans, read_before, lost
):
    stream = Stream(count, 0, spans)
    total = 4 + math.ceil((read_before + lost) / count)
    first = read(stream, total)
    position = stream.place(read_before)
    stream.skip(stream.span(read_before, read_before + lost))
    again = read(stream, total)
    assert again[:read_before] == first[:read_before]
    rest = first[read_before + lost :]
    assert again[read_before : read_before + len(rest)] == rest
    assert before(stream.skipped, position) == before(merged(spans), position)


def test_spans_that_touch_become_one():
    assert merged([(5, 7), (1, 2), (7, 9), (2, 3)]) == ((1, 3), (5, 9))
    assert before([(1, 3), (5, 9)], 6) == ((1, 3), (5, 6))
    assert before([(1, 3), (5, 9)], 5) == ((1, 3),)


@pytest.mark.parametrize("span", [(3, 3), (4, 2), (-1, 2)])
def test_a_span_that_is_none_is_refused(span):
    with pytest.raises(DataError, match=f"got {span[0]}..{span[1]}"):
        Stream(5, 0, [span])


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(DataError, match="at least one, got 0"):
        Stream(0, 0)


@pytest.mark.parametrize(
    ("samples", "batch", "processes", "accumulation"),
    [(6, 2, 1, 1), (6, 2, 1, 2), (7, 2, 1, 3), (24, 2, 2, 3), (17, 2, 2, 2), (5, 4, 1, 4), (16, 2, 4, 1)],
)
def test_steps_read_as_many_samples_as_the_librarys_loaders_hand_out(samples, batch, processes, accumulation):
    batches = BatchSampler(range(samples), batch, drop_last=False)
    shards = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    assert len({len(shard) for shard in shards}) == 1
    steps = [
        list(itertools.chain(*(s[i : i + accumulation] for s in shards)))
        for i in range(0, len(shards[0]), accumulation)
    ]
    consumption = Consumption(samples, batch, processes, accumulation)
    assert consumption.steps_per_epoch == len(steps)
    seen = set()
    for step, read_in_it in enumerate(steps):
        assert consumption.after(step) == len(seen)
        assert consumption.after(step + len(steps)) == len(seen) + samples
        seen |= {index for rows in read_in_it for index in rows}
    assert consumption.after(len(steps)) == samples == len(seen)
