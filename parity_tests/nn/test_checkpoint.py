"""Weights that cross from production to its definition and back, by function and by command, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

from parity_tests.harness import environment
from parity_tests.nn.models import FIRST_SMALL, SMALL
from so8t_jax.__main__ import main
from so8t_jax.nn.checkpoint import Layout, convert, load_model
from so8t_jax.nn.weights import load, tensors
from so8t_torch.models.configuration import Phase1Config, Phase2Config
from so8t_torch.models.phase1 import Phase1ForCausalLM
from so8t_torch.models.phase2 import Phase2ForCausalLM

TOKENS = 8
environment.prepare()


def saved(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Phase2ForCausalLM:
    torch.manual_seed(3)
    fields = SMALL | {"embedding": "tt", "tie_word_embeddings": True} | options
    model = Phase2ForCausalLM(Phase2Config(**fields)).to(dtype).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "torch"
    saved(path)
    return path


def test_there_and_back_is_the_same_file_of_numbers(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "flax", "flax")
    convert(tmp_path / "flax", tmp_path / "torch", "torch")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "torch"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    again = Phase2ForCausalLM.from_pretrained(tmp_path / "torch")
    assert again.config.to_dict().keys() == Phase2ForCausalLM.from_pretrained(folder).config.to_dict().keys()


def test_tokenizer_and_settings_of_generation_cross_and_an_index_of_shards_does_not(tmp_path: Path) -> None:
    saved(tmp_path / "torch").save_pretrained(tmp_path / "torch", max_shard_size="1KB")
    (tmp_path / "torch" / "model.safetensors").unlink(missing_ok=True)
    (tmp_path / "torch" / "tokenizer.json").write_text("{}")
    described = {"config.json", "generation_config.json", "tokenizer.json"}
    (tmp_path / "torch" / "model.safetensors.index.json").stat()
    routes: tuple[tuple[str, str, Layout, str], ...] = (
        ("torch", "flax", "flax", "flax_model.safetensors"),
        ("flax", "back", "torch", "model.safetensors"),
    )
    for source, target, layout, weights in routes:
        convert(tmp_path / source, tmp_path / target, layout)
        assert {path.name for path in (tmp_path / target).iterdir()} == {*described, weights}
        for name in described:
            assert (tmp_path / target / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()


def test_the_command_carries_the_model_of_a_run_to_its_definition(tmp_path: Path) -> None:
    model = saved(tmp_path / "run" / "model", dtype=torch.float64, n_layers=2)
    run = [sys.executable, "-m", "so8t_torch.cli", "convert-weights", "run", "flax", "--to", "jax"]
    root = Path(__file__).parents[2]
    environ = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(run, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    definition = load_model(tmp_path / "flax")
    ids = np.random.default_rng(0).integers(0, SMALL["vocab_size"], TOKENS)
    wanted = torch.from_numpy(np.array(definition(jnp.asarray(ids))[0]))
    padded = torch.from_numpy(np.concatenate([np.zeros(3, ids.dtype), ids]))[None]
    with torch.no_grad():
        plain = model(input_ids=padded[:, 3:]).logits[0]
        left_padded = model(input_ids=padded, attention_mask=(torch.arange(TOKENS + 3) >= 3)[None].long()).logits[0, 3:]
    for found in (plain, left_padded):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_half_precision_crosses_as_it_is(tmp_path: Path) -> None:
    saved(tmp_path / "torch", dtype=torch.bfloat16, embedding="dense")
    convert(tmp_path / "torch", tmp_path / "flax", "flax")
    convert(tmp_path / "flax", tmp_path / "back", "torch")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("torch", "back"))
    assert any(tensor.dtype == torch.bfloat16 for tensor in before.values())
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )


def first(**options: Any) -> Phase1ForCausalLM:
    torch.manual_seed(4)
    return Phase1ForCausalLM(Phase1Config(**FIRST_SMALL | options)).eval()


def test_a_phase_1_model_crosses_with_the_settings_of_its_gates(tmp_path: Path) -> None:
    model = first(ar_ssm_complex=True).double()
    for block in model.model.layers:
        block.mixer.update_rank_schedule(1, 3)
        block.mixer.set_gate_mode("ste")
    model.save_pretrained(tmp_path / "torch")
    convert(tmp_path / "torch", tmp_path / "flax", "flax")
    convert(tmp_path / "flax", tmp_path / "back", "torch")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("torch", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    definition = load_model(tmp_path / "flax")
    mixers = [block.mixer for block in definition.model.layers]
    assert [(mixer.gate_mode, mixer.active_rank) for mixer in mixers] == [("ste", 2)] * 2
    ids, mask = np.arange(TOKENS) % SMALL["vocab_size"], np.arange(TOKENS) >= 3
    loss = definition.model.aux_loss(jnp.asarray(ids), padding_mask=jnp.asarray(mask))
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(ids)[None], attention_mask=torch.from_numpy(mask)[None].long())
    assert float(loss) == pytest.approx(float(found.aux_loss), rel=1e-12)


def test_settings_that_a_gate_cannot_have_are_refused(tmp_path: Path) -> None:
    first().save_pretrained(tmp_path / "torch")
    bad = damaged(tmp_path / "torch", tmp_path / "bad", lambda t: t[next(k for k in t if "extra" in k)].fill_(9.0))
    with pytest.raises(ValueError, match=r"expected a gate mode 0 … 2, .* got \[9.0, 9.0, 9.0\]"):
        load_model(bad)


def damaged(folder: Path, target: Path, change: Any) -> Path:
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model.norm.weight: expected a tensor \(8,\), got none"),
        (lambda t: t.update(extra=torch.ones(2)), "extra: expected nothing of that name"),
        (lambda t: t.update({"model.norm.bias": torch.ones(9)}), r"model.norm.bias: expected a tensor \(8,\), got"),
        (lambda t: t["model.norm.bias"].fill_(float("nan")), "model.norm.bias: expected finite numbers, got 8"),
    ],
    ids=["missing", "unknown", "shape", "nan"],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, change: Any, text: str) -> None:
    source = damaged(folder, tmp_path / "damaged", change)
    with pytest.raises(ValueError, match=text):
        convert(source, tmp_path / "out", "flax")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_folder_that_cannot_be_converted_is_named(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    bad = damaged(folder, tmp_path / "bad", lambda _: None)
    for text, source, output, to in (
        ("has the layout 'torch' already", folder, "a", "torch"),
        ("empty folder", folder, "full", "jax"),
        ("config.json cannot be read", tmp_path / "absent", "a", "jax"),
    ):
        assert main(["convert-weights", str(source), str(tmp_path / output), "--to", to]) == 1
        assert text in capsys.readouterr().err
    for key, value, text in (("model_type", "llama", "so8t_phase2"), ("depth", 3, "no field depth")):
        tree = json.loads((folder / "config.json").read_text()) | {key: value}
        (bad / "config.json").write_text(json.dumps(tree))
        with pytest.raises(ValueError, match=text):
            load_model(bad)
    (bad / "config.json").write_bytes((folder / "config.json").read_bytes())
    (bad / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_model(bad)
    assert not (tmp_path / "a").exists()


def test_loading_leaves_the_module_that_gave_the_structure(folder: Path) -> None:
    model = load_model(folder)
    other = load(model, {name: value * 0 for name, value in tensors(model).items()})
    assert any(bool(value.any()) for value in tensors(model).values())
    assert not any(bool(value.any()) for value in tensors(other).values())
    assert isinstance(other, nnx.Module)
