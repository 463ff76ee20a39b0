"""Folders of models: what is damaged, missing or not finite is refused by name, before anything is done with it."""

import ast
import json
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from so8t_torch.core.errors import CheckpointError, ConfigError
from so8t_torch.models.conversion import convert_folder
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.models.stored import model_folder, read_config, read_model
from so8t_torch.models.streaming import load

SIZES = {"vocab_size": 24, "d_model": 16, "n_layers": 1, "n_seq": 8}
MODELS = {
    "train": lambda: create_phase1_model(**SIZES, htt_rank=3, seed=1),
    "tied table": lambda: create_phase1_model(**SIZES, htt_enabled=False, seed=1),
    "phase 2": lambda: create_phase2_model(**SIZES, num_heads=2, head_dim=4, seed=1),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folders = {}
    for name, create in MODELS.items():
        folders[name] = tmp_path_factory.mktemp("model") / "model"
        create().save_pretrained(folders[name])
    return folders


@pytest.fixture
def folder(written, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(written["phase 2"], tmp_path / "model")


def rewritten(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def spoiled(value):
    def change(tensors):
        tensors["model.layers.0.ffn.0.weight"][3, 2] = value

    return change


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_folder_is_read_as_it_was_written(name, written):
    model = read_model(model_folder(written[name].parent))
    assert all(map(torch.equal, model.state_dict().values(), MODELS[name]().state_dict().values()))
    half = read_model(written[name], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


WEIGHTS = {
    "missing": (lambda t: t.pop("model.norm.bias"), r"model\.norm\.bias missing"),
    "left over": (lambda t: t.update(more=torch.ones(2)), "more left over"),
    "shape": (lambda t: t.update({"model.norm.bias": torch.ones(3)}), r"model\.norm\.bias \(3,\) for \(16,\)"),
    "NaN": (spoiled(float("nan")), r"NaN or infinity in model\.layers\.0\.ffn\.0\.weight; take"),
    "infinity": (spoiled(float("-inf")), r"NaN or infinity in model\.layers\.0\.ffn\.0\.weight; take"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_not_those_of_the_model_are_refused(case, folder):
    change, told = WEIGHTS[case]
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=told):
        load(folder)


@pytest.mark.parametrize("kept", [50, -7])
def test_a_file_that_was_cut_off_is_refused(kept, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="copy it again"):
        load(folder)


def test_the_library_s_own_reader_refuses_broken_weights(folder):
    rewritten(folder, spoiled(float("nan")))
    with pytest.raises(CheckpointError, match=r"model: expected finite weights, got NaN or infinity"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"d_modell": 3}, {"model_type": "unheard_of"}, {"n_layers": "many"}])
def test_a_configuration_that_is_none_is_refused(change, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=f"{next(iter(change.values()))}|{next(iter(change))}"):
        read_config(folder)


def test_a_folder_is_converted_in_one_step_or_not_at_all(written, folder, tmp_path):
    report = convert_folder(written["train"], tmp_path / "out", seed=3)
    model = read_model(tmp_path / "out")
    assert model.config.model_type == "so8t_phase2"
    core = load_file(written["train"] / "model.safetensors")["model.embed_tokens.core1"]
    assert torch.equal(model.model.embed_tokens.core1, core)
    assert "model.embed_tokens.core1" in report.copied
    with pytest.raises(ConfigError, match="not to exist or to be an empty folder"):
        convert_folder(written["train"], tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a model of Phase 1 to convert, got a Phase2ForCausalLM"):
        convert_folder(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_table_can_have_more_rows_and_a_train_says_why_not():
    model = MODELS["tied table"]()
    rows = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(30)
    assert torch.equal(model.model.embed_tokens.weight[:24], rows)
    assert model(torch.tensor([[29]])).logits.shape == (1, 1, 30)
    train = MODELS["train"]()
    assert train.resize_token_embeddings() is train.resize_token_embeddings(24) is train.model.embed_tokens
    assert train.resize_token_embeddings(24, 8) is train.model.embed_tokens
    for arguments in ((30,), (None, 32)):
        with pytest.raises(ConfigError, match=r"a tensor train, whose factors .* its 24 ids.*Create a model"):
            train.resize_token_embeddings(*arguments)


TRAINS = {
    "phase 1": MODELS["train"],
    "phase 1, complex": lambda: create_phase1_model(
        **SIZES, htt_rank=3, htt_complex=True, tie_word_embeddings=False, seed=1
    ),
    "phase 2": lambda: create_phase2_model(**SIZES, num_heads=2, head_dim=4, embedding="tt", htt_rank=3, seed=1),
    "phase 2, complex": lambda: create_phase2_model(
        **SIZES, num_heads=2, head_dim=4, embedding="complex_tt", htt_rank=3, seed=1
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TRAINS)
def test_what_is_said_of_a_train_that_cannot_be_resized_leads_to_one_that_can(name):
    train = TRAINS[name]().eval()
    with pytest.raises(ConfigError, match="one with a table, which can be resized") as refused:
        train.resize_token_embeddings(30)
    (fields,) = re.findall(r"config\.replace\((.*?)\)", str(refused.value))
    changes = {key: ast.literal_eval(value) for key, value in (part.split("=") for part in fields.split(", "))}
    model = type(train)(train.config.replace(**changes)).eval()
    rows = train.get_input_embeddings().dense_table()
    rows = torch.cat([rows.real, rows.imag], -1) if rows.is_complex() else rows
    model.load_state_dict(train.state_dict(), strict=False)
    model.get_input_embeddings().weight.copy_(rows)
    ids = torch.arange(24)[None]
    torch.testing.assert_close(model(ids).logits, train(ids).logits)
    model.resize_token_embeddings(30)
    assert model(ids).logits.shape == (1, 24, 30)


@pytest.mark.parametrize("change", ["missing", "shape", "cut off"])
def test_the_library_s_own_reader_does_as_for_any_model(change, folder):
    """What docs/presets.md leaves to it: a missing tensor is drawn, with a warning, the rest is its error."""
    name, path = "model.norm.bias", folder / "model.safetensors"
    if change == "cut off":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        rewritten(folder, lambda t: t.pop(name) if change == "missing" else t.update({name: torch.zeros(3)}))
    if change == "missing":
        _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert found["missing_keys"] == {name}
    else:
        with pytest.raises(RuntimeError if change == "shape" else SafetensorError):
            AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(CheckpointError):
        read_model(model_folder(folder))
