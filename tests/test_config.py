"""Reading of configuration sections: what is accepted, and what the errors say."""

from itertools import pairwise
from typing import Annotated, Literal

import pytest
from pydantic import Field

from so8t_torch.core.config import Section, dump_config, load_config, parse_config
from so8t_torch.core.errors import ConfigError


class OptimiserSection(Section):
    lr: float = 1e-3
    warmup: int = 0


class FolderSection(Section):
    kind: Literal["folder"] = "folder"
    path: str


class ScratchSection(Section):
    kind: Literal["scratch"]
    width: int = 64


class WholeSection(Section):
    optimiser: OptimiserSection = OptimiserSection()
    source: Annotated[FolderSection | ScratchSection, Field(discriminator="kind")] = FolderSection(path=".")
    note: str | None = None


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_a_file_with_byte_order_mark_and_windows_line_ends_is_read(tmp_path):
    path = write(tmp_path / "c.yaml", "optimiser:\r\n  lr: 0.5\r\nnote: 日本語\r\n", "utf-8-sig")
    config = load_config(WholeSection, path)
    assert (config.optimiser.lr, config.note) == (0.5, "日本語")


def test_scientific_notation_without_a_point_is_a_number(tmp_path):
    assert load_config(WholeSection, write(tmp_path / "c.yaml", "optimiser: {lr: 1e-4}")).optimiser.lr == 1e-4


def test_what_is_dumped_is_read_back(tmp_path):
    config = load_config(WholeSection, None, ["source.kind=scratch", "source.width=8", "note=x"])
    assert load_config(WholeSection, write(tmp_path / "c.yaml", dump_config(config))) == config


def test_an_override_wins_over_the_file(tmp_path):
    path = write(tmp_path / "c.yaml", "optimiser: {lr: 0.5, warmup: 3}")
    config = load_config(WholeSection, path, ["optimiser.lr=0.25"])
    assert (config.optimiser.lr, config.optimiser.warmup) == (0.25, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {lrr: 1}", r"optimiser\.lrr: unknown key; did you mean 'lr'\?"),
        ("optimizer: {lr: 1}", r"optimizer: unknown key; did you mean 'optimiser'\?"),
        ("zzzz: 1", r"zzzz: unknown key; valid keys here: note, optimiser, source"),
        ("source: {kind: scratch, widht: 2}", r"widht: unknown key; did you mean 'width'\?"),
        ("optimiser: {lr: fast}", r"optimiser\.lr: .*'fast'"),
        ("optimiser: {lr: .nan}", r"optimiser\.lr: .*finite"),
        ("optimiser: {lr: 1, lr: 2}", r"line 1: key 'lr' is given twice"),
        ("- 1", r"must hold a mapping"),
        ("a: [", r"not readable as UTF-8 YAML"),
        ("a: !!python/object/apply:os.system ['true']", r"line 1: tags \(!\) are not read"),
        ("note: *x", r"line 1: \*x stands for nothing"),
        ("note: &x [*x]", r"line 1: \*x stands for nothing"),
        ("<<: {note: x}", r"<<: unknown key"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(WholeSection, write(tmp_path / "c.yaml", text))


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_config(WholeSection, {"optimiser": {"lr": "x", "warmup": "y"}, "nota": 1})
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("override", ["lr", "=3", "a..b=1", "note=[", "note.inner=1"])
def test_a_malformed_override_is_refused(tmp_path, override):
    with pytest.raises(ConfigError, match=r"[Oo]verride"):
        load_config(WholeSection, write(tmp_path / "c.yaml", "note: x"), [override])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_config(WholeSection, tmp_path / "absent.yaml")


def test_a_huge_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="bytes"):
        load_config(WholeSection, write(tmp_path / "c.yaml", "#" * (1 << 16) + "\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("? [1]\n: 2", "a key must be a name, got a list"),
        ("note: " + "9" * 5000, "limit"),
        ("note: " + "[" * 5000 + "]" * 5000, "32 levels"),
        ("note: [" + "0," * 5000 + "]", "more than 2000 values"),
    ],
    ids=["list as key", "endless integer", "endless nesting", "endless list"],
)
def test_what_yaml_cannot_build_is_refused(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=reason):
        load_config(WholeSection, write(tmp_path / "c.yaml", text))
    with pytest.raises(ConfigError, match=reason):
        load_config(WholeSection, None, [f"source={{{text}}}" if text.startswith("?") else text.replace(": ", "=")])


def test_an_alias_is_the_value_it_stands_for(tmp_path):
    path = write(tmp_path / "c.yaml", "optimiser: {warmup: &n 3}\nsource: {kind: scratch, width: *n}")
    assert load_config(WholeSection, path).source.width == 3


def test_aliases_that_multiply_are_counted_as_what_they_stand_for(tmp_path):
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for inner, outer in pairwise("abcdefghi"):
        levels.append(f"{outer}: &{outer} [{', '.join(['*' + inner] * 9)}]")
    with pytest.raises(ConfigError, match="line 4: more than 2000 values"):
        load_config(WholeSection, write(tmp_path / "c.yaml", "\n".join([*levels, "note: *i"])))


def test_a_wrong_value_of_many_parts_is_shown_shortened(tmp_path):
    values = ", ".join("x" * 15 for _ in range(1900))
    with pytest.raises(ConfigError) as caught:
        load_config(WholeSection, write(tmp_path / "c.yaml", f"note: [{values}]"))
    assert "note: " in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("word", ["no", "on", "off", "010", "12:30", "1_000", "2001-01-01", "0x10", "1e3", "=", "<<"])
def test_a_word_stays_a_word(tmp_path, word):
    config = load_config(WholeSection, write(tmp_path / "c.yaml", f"note: {word}"))
    assert config.note == word
    assert load_config(WholeSection, write(tmp_path / "d.yaml", dump_config(config))) == config


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("+7", 7), ("0", 0), ("-3", -3), ("007", 7)])
def test_whole_numbers_are_decimal(tmp_path, text, value):
    path = write(tmp_path / "c.yaml", f"optimiser: {{warmup: {text}}}")
    assert load_config(WholeSection, path).optimiser.warmup == value


def test_a_section_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        OptimiserSection().lr = 1.0
