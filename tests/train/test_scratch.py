"""A base in a tiny form: it builds, loads as a stock model, repeats itself, and its tokenizer loses nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM

from so8t_torch.data.chat import marked_template
from so8t_torch.data.scenarios import ScenarioSection, scenario_records
from so8t_torch.train.scratch import LOG, RECORD, ScratchBase, build_base

TINY = ScratchBase(
    hidden_size=32, layers=1, vocabulary=600, tellings=1, steps=4, batch_size=8, text_rows=2, text_characters=50_000
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_base(TINY, tmp_path_factory.mktemp("bases"), threads=1)


def test_the_folder_loads_as_a_stock_phi3_with_a_tokenizer_that_pads_left(built):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(built), AutoTokenizer.from_pretrained(built)
    assert type(model) is Phi3ForCausalLM
    assert tokenizer.padding_side == "left"
    assert model.config.vocab_size == len(tokenizer)
    stops = set(tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id))
    assert "<|end|>" in stops


def test_the_tokenizer_gives_back_every_telling_and_characters_it_never_saw(built):
    tokenizer = AutoTokenizer.from_pretrained(built)
    texts = [m.content for r in scenario_records(ScenarioSection(), "held_out") for m in r.messages]
    for text in [*dict.fromkeys(texts), "漢字と絵文字🧭、ｶﾅ", "tab\tand  blanks"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_chat_template_is_phi3s_and_can_be_marked(built):
    tokenizer = AutoTokenizer.from_pretrained(built)
    turns = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|system|>\ns<|end|>\n<|user|>\nu<|end|>\n<|assistant|>\na<|end|>\n<|endoftext|>"
    marked = marked_template(tokenizer.chat_template)
    assert tokenizer.apply_chat_template(turns, tokenize=False, chat_template=marked) == text
    controls = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    assert tokenizer("<|end|>\n<|assistant|>\n").input_ids == controls


def test_log_and_record_say_what_was_done(built):
    record = json.loads((built / RECORD).read_text())
    log = [json.loads(line) for line in (built / LOG).read_text().splitlines()]
    assert log[-1]["step"] == TINY.steps
    assert log[0]["notes_loss"] > 0
    assert set(record["reading"]) == {"none", "state", "frame", "both"}
    model = AutoModelForCausalLM.from_pretrained(built)
    assert record["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_same_settings_reuse_the_folder_and_rebuild_the_same_weights(built, tmp_path):
    stamp = (built / RECORD).stat().st_mtime_ns
    assert build_base(TINY, built.parent, threads=1) == built
    assert (built / RECORD).stat().st_mtime_ns == stamp
    again = build_base(TINY, tmp_path, threads=1)
    assert again.name == built.name
    one, two = (load_file(folder / "model.safetensors") for folder in (built, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_build_is_done_again_and_other_settings_go_elsewhere(built, tmp_path):
    (tmp_path / built.name).mkdir()
    (tmp_path / built.name / "half.txt").write_text("interrupted")
    again = build_base(TINY, tmp_path, threads=1)
    assert (again / RECORD).is_file()
    assert not (again / "half.txt").exists()
    other = build_base(TINY.model_copy(update={"seed": 1}), tmp_path, threads=1)
    assert other != again
