"""Checkpoints whose embedding becomes a tensor train: what is written, what loads, and what is refused."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM
from typer.testing import CliRunner

from so8t_torch import cli
from so8t_torch.core.errors import ConfigError, DataError, DomainError
from so8t_torch.models import compression
from so8t_torch.models.compression import CheckpointReport, compress_checkpoint, load_compressed, save_compressed
from so8t_torch.nn.holographic_embedding import HolographicTTEmbedding
from so8t_torch.nn.tensor_train_compression import compress_embedding, permutation_of, ranks_for_error
from so8t_torch.nn.tensor_train_head import TensorTrainHead

V, D, RANK = 250, 24, 3
SIZES = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"num_key_value_heads": 2, "pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 0}


def low_rank(permutation: str = "golden") -> Tensor:
    """A table that a train of rank 3 holds exactly, with 16 × 16 ids of which 250 exist."""
    side, generator = 16, torch.Generator().manual_seed(1)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((side * 4, RANK), (RANK, side * 6)))
    whole = (left @ right).reshape(side, 4, side, 6).transpose(1, 2).reshape(side * side, D)
    return whole[permutation_of(permutation, V).long()] * 0.1


@pytest.fixture
def checkpoint(tmp_path):
    def make(kind: str = "phi3", tied: bool = True, table: Tensor | None = None, **saving) -> Path:
        torch.manual_seed(0)
        config, model = {
            "phi3": (Phi3Config, Phi3ForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
        }[kind]
        made = model(config(vocab_size=V, tie_word_embeddings=tied, **SIZES, **SPECIAL))
        with torch.no_grad():
            made.model.embed_tokens.weight.copy_(low_rank() if table is None else table)
        folder = tmp_path / f"{kind}-{tied}"
        made.save_pretrained(folder, **saving)
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
        return folder

    return make


def fingerprint(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(40).reshape(2, 20) * 5).logits


@pytest.mark.parametrize("kind", ["phi3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_an_exactly_low_rank_embedding_gives_the_same_logits(checkpoint, tmp_path, kind, tied, shard):
    source = checkpoint(kind, tied, **({} if shard is None else {"max_shard_size": shard}))
    before = fingerprint(source)
    report = compress_checkpoint(source, tmp_path / "out", rank=RANK, sweeps=30)
    assert fingerprint(source) == before, "the source is only read"
    assert report.embedding.relative_error < 1e-6
    assert report.tied == tied

    model = load_compressed(tmp_path / "out")
    assert isinstance(model.get_input_embeddings(), HolographicTTEmbedding)
    assert isinstance(model.get_output_embeddings(), TensorTrainHead) == tied
    plain = AutoModelForCausalLM.from_pretrained(source)
    assert (logits(model) - logits(plain)).abs().max() < 1e-4 * logits(plain).abs().max()
    assert sum(p.numel() for p in model.parameters()) < 0.8 * sum(p.numel() for p in plain.parameters())
    ids = torch.tensor([[5, 6, 7]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **arguments), plain.generate(ids, **arguments))


@pytest.mark.parametrize("tied", [True, False])
def test_a_lossy_embedding_gives_the_logits_of_the_approximated_table(checkpoint, tmp_path, tied):
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(2)) * 0.1
    source = checkpoint("llama", tied, table)
    report = compress_checkpoint(source, tmp_path / "out", rank=8, max_relative_error=1.0)
    model = load_compressed(tmp_path / "out")
    approximated = model.get_input_embeddings().dense_table().detach()
    assert float((approximated - table).norm() / table.norm()) == pytest.approx(
        report.embedding.relative_error, rel=1e-5
    )
    plain = AutoModelForCausalLM.from_pretrained(source)
    plain.get_input_embeddings().weight.data.copy_(approximated)
    assert (logits(model) - logits(plain)).abs().max() < 1e-5 * logits(plain).abs().max()


def test_the_folder_holds_the_other_tensors_and_is_no_stock_checkpoint(checkpoint, tmp_path):
    source = checkpoint("phi3", False)
    compress_checkpoint(source, tmp_path / "out", rank=RANK)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "tensor_train.json", "tensor_train.safetensors"} < names
    rest, whole = load_file(tmp_path / "out/rest-00001-of-00001.safetensors"), load_file(source / "model.safetensors")
    assert set(whole) - set(rest) == {"model.embed_tokens.weight"}
    assert all(torch.equal(rest[key], whole[key]) for key in rest)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob(".out-*"))


def test_the_sizes_reported_are_those_on_disk(checkpoint, tmp_path):
    source = checkpoint("llama", True)
    report = compress_checkpoint(source, tmp_path / "out", rank=RANK)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert report.bytes_before == (source / "model.safetensors").stat().st_size
    assert abs(report.bytes_after - on_disk) < 1500, "up to the header of one more file"


def test_a_compression_above_the_gate_is_refused_with_the_rank_needed_and_writes_nothing(checkpoint, tmp_path):
    source = checkpoint()
    with pytest.raises(DomainError, match=r"at most 0\.05, got 0\.\d+ at rank 1; rank \d+ would do"):
        compress_checkpoint(source, tmp_path / "deep/out", rank=1, max_relative_error=0.05)
    assert not (tmp_path / "deep/out").exists()
    dry = compress_checkpoint(source, rank=1, max_relative_error=0.05, dry_run=True)
    assert (dry.output, dry.kept) == (None, False)


def test_the_rank_needed_is_the_least_that_reaches_the_error():
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(3))
    factors = {"vocab_factors": (16, 16), "feature_factors": (4, 6)}
    placed = torch.empty_like(table)
    placed[permutation_of("golden", V).long()] = table
    (needed,) = ranks_for_error(placed, 0.4, **factors)
    errors = [
        compress_embedding(table, r, sweeps=0, max_relative_error=None, **factors).report.relative_error
        for r in (needed - 1, needed)
    ]
    assert errors[1] <= 0.4 < errors[0]


def test_the_ranks_named_for_three_cores_are_enough():
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(5)) * torch.linspace(1, 0.01, D)
    with pytest.raises(DomainError, match=r"at ranks 2, 2; ranks \d+, \d+ would do") as refused:
        compress_embedding(table, 2, num_cores=3, max_relative_error=0.3)
    ranks = [int(n) for n in re.search(r"ranks (\d+), (\d+) would do", str(refused.value)).groups()]
    assert ranks[0] != ranks[1]
    compress_embedding(table, ranks, num_cores=3, sweeps=0, max_relative_error=0.3)
    with pytest.raises(DomainError, match=r"no rank goes below the rounding of torch\.float32"):
        compress_embedding(table, 2, max_relative_error=0.0)


@pytest.mark.parametrize("cores", [2, 3])
def test_least_squares_never_worsens_the_error_and_the_worst_row_is_the_worst(cores):
    table = torch.randn(V, D, generator=torch.Generator().manual_seed(4))
    found = compress_embedding(table, 6, num_cores=cores, sweeps=3, max_relative_error=None)
    layer = HolographicTTEmbedding.from_compressed(found)
    rows = (layer.dense_table().detach() - table).norm(dim=1)
    typical = table.norm() / math.sqrt(V)
    assert found.report.relative_error <= found.report.decomposition_error
    assert found.report.relative_error == pytest.approx(float(rows.norm() / table.norm()), rel=1e-5)
    assert found.report.worst_row == int(rows.argmax())
    assert found.report.worst_row_error == pytest.approx(float(rows.max() / typical), rel=1e-5)
    assert found.report.parameters_after == sum(core.numel() for core in found.cores)


def test_a_zero_padding_row_stays_zero_where_the_head_is_its_own(checkpoint, tmp_path):
    table = low_rank()
    table[3] = 0.0
    compress_checkpoint(checkpoint("phi3", False, table), tmp_path / "out", rank=8, max_relative_error=1.0)
    layer = load_compressed(tmp_path / "out").get_input_embeddings()
    assert layer.padding_idx == 3
    assert not layer(torch.tensor([3])).any()
    compress_checkpoint(checkpoint("phi3", False), tmp_path / "other", rank=RANK)
    assert load_compressed(tmp_path / "other").get_input_embeddings().padding_idx is None, "its row is not zero"


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_trains_and_is_saved_again(checkpoint, tmp_path, tied):
    compress_checkpoint(checkpoint("phi3", tied), tmp_path / "out", rank=RANK)
    model = load_compressed(tmp_path / "out").train()
    ids = torch.arange(20).reshape(1, 20)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(ids, labels=ids).loss
    first.backward()
    optimiser.step()
    assert all(c.grad is not None and bool(c.grad.any()) for c in model.get_input_embeddings().stored_cores())
    assert model(ids, labels=ids).loss < first
    save_compressed(model.eval(), tmp_path / "again")
    again = load_compressed(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert isinstance(again.get_output_embeddings(), TensorTrainHead) == tied


def test_transformers_own_saving_keeps_every_tensor_once(checkpoint, tmp_path):
    compress_checkpoint(checkpoint("llama", True), tmp_path / "out", rank=RANK)
    model = load_compressed(tmp_path / "out")
    before = logits(model)
    model.save_pretrained(tmp_path / "plain")
    model.tie_weights()
    assert torch.equal(logits(model), before)
    state = load_file(tmp_path / "plain/model.safetensors")
    assert {"model.embed_tokens.core1", "model.embed_tokens.id_permutation"} <= set(state)
    assert not [key for key in state if key.startswith("lm_head")]


def test_half_precision_weights_stay_half(checkpoint, tmp_path):
    source = checkpoint("llama", True)
    state = {key: tensor.bfloat16() for key, tensor in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", {"format": "pt"})
    report = compress_checkpoint(source, tmp_path / "out", rank=RANK, sweeps=10)
    assert report.embedding.relative_error < 2 * torch.finfo(torch.bfloat16).eps
    model = load_compressed(tmp_path / "out", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_an_output_that_is_taken_or_inside_the_source_is_refused(checkpoint, tmp_path):
    source = checkpoint()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine", encoding="utf-8")
    for output, match in ((taken, "empty folder"), (source / "out", "outside the source"), (None, "output folder")):
        with pytest.raises(ConfigError, match=match):
            compress_checkpoint(source, output, rank=RANK)
    assert (taken / "file").read_text(encoding="utf-8") == "mine"
    (tmp_path / "inward").symlink_to(source)
    with pytest.raises(ConfigError, match="outside the source"):
        compress_checkpoint(source, tmp_path / "inward/out", rank=RANK)
    with pytest.raises(ConfigError, match="another place"):
        compress_checkpoint(source, taken / "file/out", rank=RANK)


def test_a_linked_output_is_written_where_the_link_leads(checkpoint, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    report = compress_checkpoint(checkpoint(), tmp_path / "link", rank=RANK)
    assert report.output == str((tmp_path / "real").resolve())
    assert (tmp_path / "link").is_symlink()
    assert load_compressed(tmp_path / "link").get_input_embeddings().ranks == (RANK,)


def test_an_interrupted_run_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    source = checkpoint()
    before = {p.name for p in tmp_path.iterdir()}
    monkeypatch.setattr(compression, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(source, tmp_path / "out", rank=RANK)
    assert {p.name for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("gate", [-1.0, math.nan])
def test_a_gate_that_is_none_is_refused_in_a_dry_run_too(checkpoint, gate):
    with pytest.raises(ConfigError, match="max_relative_error"):
        compress_checkpoint(checkpoint(), rank=RANK, max_relative_error=gate, dry_run=True)


def test_an_incomplete_source_or_another_shape_is_named(checkpoint, tmp_path):
    source = checkpoint("llama", True)
    state = load_file(source / "model.safetensors")
    lacking = {key: tensor for key, tensor in state.items() if key != "model.norm.weight"}
    save_file(lacking, source / "model.safetensors", {"format": "pt"})
    compress_checkpoint(source, tmp_path / "out", rank=RANK)
    with pytest.raises(DataError, match=r"model\.norm\.weight"):
        load_compressed(tmp_path / "out")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1].clone()
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"\(250, 24\), the file holds \(249, 24\)"):
        compress_checkpoint(source, dry_run=True)


def test_an_index_that_does_not_say_the_truth_is_named(checkpoint):
    source = checkpoint("llama", False, max_shard_size="20KB")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    held = index["weight_map"]["model.embed_tokens.weight"]
    for wrong, match in (
        (next(name for name in index["weight_map"].values() if name != held), "index places there"),
        (3, "not a file"),
    ):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {"model.embed_tokens.weight": wrong}}))
        with pytest.raises(DataError, match=match):
            compress_checkpoint(source, dry_run=True)


def test_a_damaged_or_foreign_source_is_named(checkpoint, tmp_path):
    with pytest.raises(DataError, match=r"model\.safetensors"):
        compress_checkpoint(tmp_path, dry_run=True)
    source = checkpoint()
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:500])
    with pytest.raises(DataError, match="not a complete safetensors file"):
        compress_checkpoint(source, dry_run=True)


def test_configurations_that_cannot_be_replaced_are_refused(checkpoint):
    source = checkpoint()
    path = source / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for change, match in (
        ({"architectures": ["NobodysModel"]}, "NobodysModel"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised"),
    ):
        path.write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(ConfigError, match=match):
            compress_checkpoint(source, dry_run=True)
    path.unlink()
    with pytest.raises(ConfigError, match="configuration"):
        compress_checkpoint(source, dry_run=True)


def test_a_table_without_numbers_is_refused(checkpoint):
    table = low_rank()
    table[17, 3] = math.nan
    with pytest.raises(DomainError, match="NaN"):
        compress_checkpoint(checkpoint("phi3", True, table), dry_run=True)
    with pytest.raises(DomainError, match="zeros alone"):
        compress_checkpoint(checkpoint("llama", True, torch.zeros(V, D)), dry_run=True)


def test_a_tied_head_that_is_stored_must_be_the_same(checkpoint, tmp_path):
    source = checkpoint("llama", True)
    state = load_file(source / "model.safetensors")
    save_file(state | {"lm_head.weight": low_rank()}, source / "model.safetensors", {"format": "pt"})
    compress_checkpoint(source, tmp_path / "out", rank=RANK)
    assert "lm_head.weight" not in load_file(tmp_path / "out/rest-00001-of-00001.safetensors")
    save_file(state | {"lm_head.weight": low_rank() + 1}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="differ"):
        compress_checkpoint(source, tmp_path / "other", rank=RANK)


def test_what_does_not_belong_together_does_not_load(checkpoint, tmp_path):
    with pytest.raises(DataError, match=r"tensor_train\.json"):
        load_compressed(tmp_path)
    compress_checkpoint(checkpoint(), tmp_path / "out", rank=RANK)
    path = tmp_path / "out/tensor_train.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    for change, match in (({"format": 2}, "format 1"), ({"ranks": [4]}, "belong together")):
        path.write_text(json.dumps(record | change), encoding="utf-8")
        with pytest.raises(DataError, match=match):
            load_compressed(tmp_path / "out")


def test_the_command_prints_tables_and_says_by_its_status_whether_the_error_is_small_enough(checkpoint, tmp_path):
    source = checkpoint()
    run = CliRunner()
    done = run.invoke(cli.app, ["compress-embedding", str(source), "--out", str(tmp_path / "out"), "--rank", "3"])
    assert done.exit_code == 0
    assert "kept" in done.output
    assert load_compressed(tmp_path / "out").get_input_embeddings().ranks == (3,)
    dry = run.invoke(cli.app, ["compress-embedding", str(source), "--rank", "1", "--dry-run"])
    assert dry.exit_code == 1
    assert "refused" in dry.output
    more = ["--cores", "3", "--rank", "4", "--rank", "6", "--dry-run"]
    assert "4, 6" in run.invoke(cli.app, ["compress-embedding", str(source), *more]).output
    refused = run.invoke(cli.app, ["compress-embedding", str(source), "--out", str(tmp_path / "no"), "--rank", "1"])
    assert isinstance(refused.exception, DomainError)
    assert not (tmp_path / "no").exists()


def test_a_report_is_plain_data(checkpoint):
    report = compress_checkpoint(checkpoint(), rank=RANK, dry_run=True)
    assert isinstance(report, CheckpointReport)
    assert json.loads(json.dumps(report.embedding.to_dict()))["ranks"] == [RANK]
