"""Text as it is written: it ends where nobody reads on, and the model is left as it was found."""

import contextlib
import signal
import subprocess
import sys
from threading import active_count

import pytest
import torch
from transformers import TextIteratorStreamer

from so8t_torch.data.packing import byte_tokenizer
from so8t_torch.models.factory import create_phase2_model
from so8t_torch.models.streaming import Drawing, Writing, cache_bytes, cache_of

LONG = Drawing(50_000)
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from so8t_torch.cli import main
main()
"""


@pytest.fixture(scope="module")
def model():
    sizes = {"vocab_size": 257, "d_model": 16, "n_layers": 1, "num_heads": 2, "head_dim": 4, "memory_chunk": 4}
    return create_phase2_model(**sizes, seed=0)


def test_an_iterator_that_is_closed_ends_the_writing(model):
    model.train()
    model.model.norm.eval()
    modes, before, threads = [part.training for part in model.modules()], torch.get_rng_state(), active_count()
    writing = Writing(model, byte_tokenizer(), "one two three ", LONG)
    with contextlib.closing(iter(writing)) as pieces:
        assert next(pieces).startswith("one ")
    assert active_count() == threads
    assert 0 < writing.tokens < LONG.tokens
    assert writing.state_bytes > 0
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert list(pieces) == []


def test_an_interrupt_of_the_reader_ends_the_writing(model, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextIteratorStreamer, "__next__", interrupted)
    writing = Writing(model, byte_tokenizer(), "x", LONG)
    with pytest.raises(KeyboardInterrupt):
        next(iter(writing))
    assert writing.tokens < LONG.tokens


def test_the_command_that_is_interrupted_keeps_what_it_wrote(model, tmp_path):
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    words = ["generate", str(tmp_path), "--prompt", "one two three ", "--tokens", str(LONG.tokens)]
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate()
    assert process.returncode == 130
    assert (first + rest).startswith(b"one ")
    assert told == b""


def test_a_cache_is_found_under_either_name(model):
    ids = torch.zeros(1, 3, dtype=torch.int64)
    found = model.eval()(ids, use_cache=True)
    assert cache_of(found) == {"past_key_values": found.past_key_values}
    assert cache_bytes(found.past_key_values) > 0
    assert cache_of(model(ids, use_cache=False)) == {}
