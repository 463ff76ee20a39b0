from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from so8t_torch.core.errors import ConfigError, DataError
from so8t_torch.data import ngram, packing, text
from so8t_torch.data.text import TextSection

DOCUMENTS = (b"def f(x):\n    return x\n", "grün – 青い弁\n".encode(), b"", b"a" * 5)


@pytest.fixture
def folder(tmp_path):
    for number in range(60):
        path = tmp_path / f"{number % 4}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {number}\n" * (number + 1))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_a_document_is_in_one_part_and_stays_there(folder):
    section = TextSection(source=str(folder), held_out_share=0.2)
    whole = text.read(section)
    assert len(whole.train) + len(whole.held_out) == 60
    assert not set(whole.train) & set(whole.held_out)
    assert 4 <= len(whole.held_out) <= 24
    (folder / "another.txt").write_text("another document\n")
    assert set(whole.held_out) <= set(text.read(section).held_out)


def test_the_bound_holds_for_both_parts_and_takes_a_sample(folder):
    most = text.read(TextSection(source=str(folder), held_out_share=0.2, max_bytes=5000))
    assert sum(map(len, most.train)) == 4000
    assert sum(map(len, most.held_out)) == 1000
    numbers = [int(document.split()[1]) for document in most.train]
    assert numbers != sorted(numbers)


def test_the_end_of_a_file_is_held_out_behind_a_line(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"0123456\n" * 100)
    found = text.read(TextSection(source=str(path), held_out_share=0.1))
    assert found.train == (b"0123456\n" * 91,)
    assert found.held_out == (b"0123456\n" * 9,)


def test_the_standard_library_is_there_and_no_tests_of_it():
    found = text.read(TextSection(max_bytes=100_000))
    assert sum(map(len, found.train)) == 95_000
    assert b"import" in b"".join(found.train)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), (b"", "part is empty"), (b"\x1f\x8b0000000", "gzip"), (b"one line", "part is empty")],
)
def test_what_is_no_text_is_refused(tmp_path, content, said):
    path = tmp_path / "odd.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        text.read(TextSection(source=str(path)))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected files that end in \.md"):
        text.read(TextSection(source=str(tmp_path)))


def test_bytes_are_their_own_ids():
    tokenizer = packing.byte_tokenizer()
    everything = bytes(range(256)).decode("latin-1")
    assert tokenizer(everything).input_ids == list(everything.encode())
    assert tokenizer.decode(tokenizer(everything).input_ids) == everything
    assert (tokenizer.eos_token_id, len(tokenizer)) == (256, 257)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_rows_predict_every_token_once_and_count_its_bytes(kind):
    tokenizer = packing.byte_tokenizer() if kind == "bytes" else packing.pair_tokenizer(DOCUMENTS, 280)
    stream = packing.pack(DOCUMENTS, tokenizer).tolist()
    rows = packing.PackedRows(DOCUMENTS, tokenizer, 8, "these")
    predicted = [label for row in rows for label in row.labels[1:]]
    assert predicted == stream[1 : 8 * len(rows) + 1]
    assert len(stream) - 9 < 8 * len(rows)
    assert all(row.labels[0] == -100 and row.supervised == 8 for row in rows)
    assert rows.bytes == len(tokenizer.decode([i for i in predicted if i != rows.end]).encode())
    assert tokenizer.decode([i for i in stream if i != rows.end]) == b"".join(DOCUMENTS).decode()
    assert rows[-1] == rows[len(rows) - 1]


def test_segments_begin_at_documents():
    tokenizer = packing.byte_tokenizer()
    rows = packing.PackedRows([b"abc", b"de", b"fghi"], tokenizer, 5, "these")
    batch = packing.PackedCollator(rows.end)(rows[:])
    ends = [[256, 97, 98, 99, 256, 100], [100, 101, 256, 102, 103, 104]]
    assert batch["input_ids"].tolist() == ends
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert torch.equal(batch["attention_mask"], torch.ones(2, 6, dtype=torch.int64))


def test_too_little_text_for_a_row_is_refused():
    with pytest.raises(DataError, match=r"these: 3 tokens do not fill a row of 8"):
        packing.PackedRows([b"a"], packing.byte_tokenizer(), 8, "these")


def test_pairs_need_text_and_bytes_do_not():
    assert len(packing.pack([b"\xff\xfe"], packing.byte_tokenizer())) == 4
    with pytest.raises(DataError, match=r"not valid UTF-8 at byte 1; set data\.text\.tokenizer=bytes"):
        packing.pair_tokenizer([b"a\xff" * 4], 280)
    cut = packing.pair_tokenizer(["ab青".encode()[:-1]], 280)
    assert cut.decode(packing.pack(["ab青".encode()[:-1]], cut)[1:-1]) == "ab"


def by_hand(learned, order):
    """Interpolated Kneser–Ney from its definition, in dictionaries."""
    raw = [Counter(tuple(learned[i : i + n]) for i in range(len(learned) - n + 1)) for n in range(order + 1)]
    counts = {order: raw[order]}
    for n in range(order - 1, 0, -1):
        # different symbols before each n-gram, among the (n + 1)-grams of the text
        before = {gram: {longer[0] for longer in raw[n + 1] if longer[1:] == gram} for gram in raw[n]}
        counts[n] = Counter({gram: len(found) for gram, found in before.items() if found})
    followers = {n: defaultdict(dict) for n in counts}
    for n, grams in counts.items():
        for gram, count in grams.items():
            followers[n][gram[:-1]][gram[-1]] = count

    def probability(history, symbol, n):
        if n == 0:
            return 1 / 257
        context = tuple(history[len(history) - n + 1 :])
        lower = probability(history, symbol, n - 1)
        held = followers[n].get(context)
        if held is None or len(history) < n - 1:
            return lower
        once, twice = (sum(c == times for c in counts[n].values()) for times in (1, 2))
        discount = min(once / (once + 2 * twice), 0.99)
        total = sum(held.values())
        return max(held.get(symbol, 0) - discount, 0) / total + discount * len(held) / total * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_n_gram_model_is_the_definition(order):
    learned = [b"abracadabra", b"a cab, a bar, a car"]
    asked = ngram.stream([b"a bad cadabra", b"xyz"])
    model, probability = ngram.ByteNgram(learned, order), by_hand(ngram.stream(learned).tolist(), order)
    wanted = [probability(asked[:i].tolist(), int(asked[i]), order) for i in range(1, len(asked))]
    np.testing.assert_allclose(model.probabilities(asked), wanted, rtol=1e-12)


def test_probabilities_of_all_symbols_sum_to_one():
    model = ngram.ByteNgram([b"the cat sat on the mat", b"the rat"], 5)
    for history in (b"the ", b"zzzz"):
        total = sum(model.probabilities(np.array([*history, symbol]))[-1] for symbol in range(257))
        np.testing.assert_allclose(total, 1, rtol=1e-12)


def test_bits_of_random_bytes_are_eight_and_of_known_text_few():
    noise = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8).tobytes()
    known = b"the quick brown fox jumps over the lazy dog. " * 200
    assert ngram.ByteNgram([noise], 3).bits_per_byte([noise[::-1]]) > 7.9
    assert ngram.ByteNgram([known], 5).bits_per_byte([known]) < 0.1
    sizes = ngram.compressed([noise], [noise])
    assert sizes["gzip"] > 8
    assert sizes["xz_after_training_text"] < 1


@pytest.mark.parametrize("order", [0, 8])
def test_orders_that_cannot_be_packed_are_refused(order):
    with pytest.raises(ConfigError, match="must be from 1 to 7"):
        ngram.ByteNgram([b"abc"], order)
