"""No future in any sequence operation, on any path: edits, poison, halves, prefill, packed documents, padding."""

from __future__ import annotations

import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from parity_tests.mixers import DEFINITION, MIXERS, Mixer

DOCUMENTS, EDITS = (40, 50, 60), (1, 63, 64, 100, 149)
FEW = (20, 22, 30), (1, 63, 64)
"""The same for kernels: an interpreter takes a second for what they do in microseconds."""
VALUES = pytest.mark.parametrize("value", [None, np.inf, np.nan], ids=["finite", "inf", "nan"])
PAIRS = [(mixer, path) for mixer in MIXERS for path in (DEFINITION, *mixer.paths)]


def listed(pairs: list[tuple[Mixer, str]]) -> list[Any]:
    """Name the parameters of a test, and mark those that run kernels."""
    marks = {"triton": [pytest.mark.interpreter]}
    return [pytest.param(*pair, id=f"{pair[0].name}-{pair[1]}", marks=marks.get(pair[1], [])) for pair in pairs]


PATHS = listed(PAIRS)
CHUNKED = listed([(mixer, path) for mixer, path in PAIRS if mixer.chunk and path not in ("eager", DEFINITION)])


def generator_of(mixer: Mixer) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(mixer.name.encode()))


def sizes_of(path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the lengths of three documents, and the tokens to edit."""
    return FEW if path == "triton" else (DOCUMENTS, EDITS)


def drawn(mixer: Mixer, length: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Draw tokens in a precision."""
    tokens = mixer.draw(generator_of(mixer), length)
    kinds = {"f": np.dtype(dtype), "c": np.result_type(dtype, np.complex64)}
    return {name: x.astype(kinds[x.dtype.kind]) for name, x in tokens.items()}


def edited(mixer: Mixer, tokens: dict[str, np.ndarray], at: Any, value: float | None) -> dict[str, np.ndarray]:
    """Return other numbers in some tokens: drawn again, or one value wherever any is allowed."""
    again = mixer.draw(np.random.default_rng(99), len(next(iter(tokens.values()))))
    changed = {name: x.copy() for name, x in tokens.items()}
    for name, x in changed.items():
        if value is None:
            x[at] = again[name][at]
        elif name in mixer.values:
            x[at] = value
    return changed


def ids_of(lengths: tuple[int, ...]) -> np.ndarray:
    """Number three documents; numbers need not grow."""
    return np.repeat([7, 3, 5], lengths)


def pieces(tokens: dict[str, np.ndarray], *edges: int) -> list[dict[str, np.ndarray]]:
    """Cut tokens into pieces."""
    bounds = (0, *edges, len(next(iter(tokens.values()))))
    return [{n: x[a:b] for n, x in tokens.items()} for a, b in pairwise(bounds)]


def cuts(mixer: Mixer, length: int, number: int) -> list[int]:
    """Draw where to cut."""
    return sorted(generator_of(mixer).choice(np.arange(1, length), number, replace=False).tolist())


def streamed(mixer: Mixer, path: str, parts: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Run piece after piece with the state carried."""
    outputs, state = [], None
    for part in parts:
        y, state = mixer.run(path, part, state)
        outputs.append(y)
    assert state is not None
    return np.concatenate(outputs), state


def close(found: np.ndarray, expected: np.ndarray, dtype: str) -> bool:
    """Whether two results differ by rounding: 32 ulp of the largest entry."""
    return bool(np.abs(found - expected).max() <= 32 * np.finfo(dtype).eps * max(1.0, np.abs(expected).max()))


@VALUES
@pytest.mark.parametrize(("mixer", "path"), PATHS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_edit_changes_no_bit_before_it(mixer: Mixer, path: str, value: float | None) -> None:
    documents, edits = sizes_of(path)
    tokens = drawn(mixer, sum(documents))
    y, _ = mixer.run(path, tokens)
    for at in edits:
        other, _ = mixer.run(path, edited(mixer, tokens, at, value))
        assert np.array_equal(y[:at], other[:at]), at
        assert not np.array_equal(y[at:], other[at:]), at


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("mixer", "path"), PATHS)
def test_pieces_of_any_length_give_what_one_run_gives(mixer: Mixer, path: str, dtype: str) -> None:
    length = sum(sizes_of(path)[0])
    tokens = drawn(mixer, length, dtype)
    y, state = mixer.run(path, tokens)
    several = (2,) if path == DEFINITION else (2, 7)  # JAX compiles every length anew
    for edges in [[length // 2], *(cuts(mixer, length, n) for n in several)]:
        found, last = streamed(mixer, path, pieces(tokens, *edges))
        assert close(found, y, dtype), edges
        assert close(last, state, dtype), edges


@pytest.mark.parametrize(("mixer", "path"), PATHS)
def test_token_by_token_gives_what_one_run_gives(mixer: Mixer, path: str) -> None:
    length = sizes_of(path)[0][0]
    tokens = drawn(mixer, length)
    y, state = mixer.run(path, tokens)
    found, last = streamed(mixer, path, pieces(tokens, *range(1, length)))
    assert close(found, y, "float32")
    assert close(last, state, "float32")


@pytest.mark.parametrize(("mixer", "path"), CHUNKED)
def test_pieces_of_whole_chunks_give_the_same_bits(mixer: Mixer, path: str) -> None:
    assert mixer.chunk is not None
    tokens = drawn(mixer, 3 * mixer.chunk)
    y, state = mixer.run(path, tokens)
    found, last = streamed(mixer, path, pieces(tokens, mixer.chunk, 2 * mixer.chunk))
    assert np.array_equal(found, y)
    assert np.array_equal(last, state)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("mixer", "path"), PATHS)
def test_a_packed_document_is_what_it_is_alone(mixer: Mixer, path: str, dtype: str) -> None:
    lengths = sizes_of(path)[0]
    tokens = drawn(mixer, sum(lengths), dtype)
    y, state = mixer.run(path, tokens, segment_ids=ids_of(lengths))
    alone = [mixer.run(path, part) for part in pieces(tokens, *np.cumsum(lengths)[:-1])]
    assert close(y, np.concatenate([found for found, _ in alone]), dtype)
    assert close(state, alone[-1][1], dtype)


@VALUES
@pytest.mark.parametrize(("mixer", "path"), PATHS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_another_document_or_padding_changes_no_bit(mixer: Mixer, path: str, value: float | None) -> None:
    """Padding, left or right, is a document of its own: here the first, the middle and the last one in turn."""
    ids = ids_of(sizes_of(path)[0])
    tokens = drawn(mixer, len(ids))
    y, _ = mixer.run(path, tokens, segment_ids=ids)
    for other in np.unique(ids):
        found, _ = mixer.run(path, edited(mixer, tokens, other == ids, value), segment_ids=ids)
        assert np.array_equal(found[other != ids], y[other != ids]), other
        assert not np.array_equal(found[other == ids], y[other == ids]), other
