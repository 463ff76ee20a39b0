"""Phase 1 to Phase 2: what is copied is the same to the bit, what is new trains, and the report says which is which."""

import copy
import io

import pytest
import torch
from rich.console import Console

from so8t_torch.core.errors import ConfigError, DomainError
from so8t_torch.models.configuration import Phase2Config
from so8t_torch.models.conversion import convert_phase1_to_phase2, phase2_config_of
from so8t_torch.models.factory import create_phase1_model, create_phase2_model
from so8t_torch.nn.tensor_train_head import TensorTrainHead

SIZES = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_seq": 32, "dropout": 0.0, "htt_rank": 4}
KINDS = {
    "train, tied": {},
    "train of three cores, head of its own": {"htt_num_cores": 3, "d_model": 8, "tie_word_embeddings": False},
    "complex train": {"htt_complex": True, "tie_word_embeddings": False},
    "table, tied": {"htt_enabled": False, "ffn_compression_enabled": False},
    "table, head and positions of its own": {
        "htt_enabled": False,
        "tie_word_embeddings": False,
        "position_embedding": "zeta",
        "zeta_embedding_trainable": True,
        "lns_enabled": True,
    },
}
kinds = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def phase1(fields, seed=4):
    model = create_phase1_model(**SIZES | fields, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # norms and biases, which all models begin with alike, are told apart too
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.01)
    return model


def head(model):
    return model.lm_head or TensorTrainHead(model.model.embed_tokens)


def tensors(model):
    return dict(model.state_dict(keep_vars=True))


@kinds
def test_what_is_copied_is_the_same_to_the_bit(fields):
    model = phase1(fields)
    new, report = convert_phase1_to_phase2(model)
    one, two = tensors(model), tensors(new)
    assert report.copied
    for target, sources in report.copied.items():
        if target not in report.computed:
            (source,) = sources
            assert torch.equal(two[target], one[source])
        elif ".ffn." in target:
            inner, outer = (one[name] for name in sources)
            assert torch.equal(two[target], outer @ inner)
    norms = [f"model.layers.{i}.ffn_norm.{part}" for i in range(2) for part in ("weight", "bias")]
    assert {*norms, "model.norm.weight", "model.norm.bias"} <= report.copied.keys()


@kinds
def test_the_report_names_every_tensor_once(fields):
    model = phase1(fields)
    new, report = convert_phase1_to_phase2(model)
    named = {*dict(new.named_parameters()), *(n for n, _ in new.named_buffers() if n in tensors(new))}
    assert sorted([*report.copied, *report.initialised]) == sorted(named)
    came = {name for sources in report.copied.values() for name in sources}
    assert not came & set(report.unmatched)
    assert {name for name, _ in model.named_parameters()} <= came | set(report.unmatched)
    assert all(".mixer" in name for name in report.unmatched)
    printed = [cell for column in report.table().columns for cell in column.cells]
    assert all(name in printed for name in named)


@kinds
def test_embedding_feed_forward_and_head_compute_what_they_did(fields):
    model = phase1(fields).eval()
    new, _ = convert_phase1_to_phase2(model)
    new.eval()
    ids, x = torch.arange(40)[None], torch.randn(1, 5, model.config.d_model)
    assert torch.equal(new.model.embed_tokens(ids), model.model.embed_tokens(ids))
    assert torch.equal(head(new)(x), head(model)(x))
    for i in range(2):
        assert torch.allclose(new.model.layers[i].ffn(x), model.model.layers[i].ffn(x), rtol=1e-4, atol=1e-5)


def test_a_train_is_written_out_where_a_table_is_wanted():
    model = phase1({})
    config = phase2_config_of(model.config).replace(embedding="dense", tie_word_embeddings=False)
    new, report = convert_phase1_to_phase2(model, config)
    table = model.model.embed_tokens.dense_table()
    assert torch.equal(new.model.embed_tokens.weight, table)
    assert torch.equal(new.lm_head.weight, table)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(report.computed)


def test_only_what_was_copied_is_frozen_and_the_rest_learns():
    model = phase1({})
    config = phase2_config_of(model.config).replace(memory_chunk=8)
    new, report = convert_phase1_to_phase2(model, config, freeze_phase1_weights=True)
    frozen = {name for name, parameter in new.named_parameters() if not parameter.requires_grad}
    assert frozen == set(report.frozen) == set(report.copied) & dict(new.named_parameters()).keys()
    before = {name: parameter.clone() for name, parameter in new.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in new.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.arange(24).reshape(1, 24)
    losses = []
    for _ in range(8):
        losses.append(new(ids, labels=ids).loss)
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    moved = {name for name, parameter in new.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == before.keys() - frozen


def test_phase_1_and_the_global_generator_are_left_alone():
    model = phase1({})
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    one, first = convert_phase1_to_phase2(model)
    two, second = convert_phase1_to_phase2(model)
    three, _ = convert_phase1_to_phase2(model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert first == second
    assert all(torch.equal(tensors(two)[name], tensor) for name, tensor in tensors(one).items())
    assert not all(torch.equal(tensors(three)[name], tensor) for name, tensor in tensors(one).items())


def test_nothing_is_copied_where_that_is_asked_for():
    new, report = convert_phase1_to_phase2(
        phase1({}), copy_compatible_weights=False, freeze_phase1_weights=True, seed=3
    )
    drawn = create_phase2_model(new.config, seed=3)
    assert all(torch.equal(tensors(drawn)[name], tensor) for name, tensor in tensors(new).items())
    assert (report.copied, report.frozen, report.computed) == ({}, (), ())


@pytest.mark.parametrize(("layers", "copied"), [(1, 1), (3, 2)])
def test_blocks_that_only_one_side_has_are_reported(layers, copied):
    model = phase1({})
    _, report = convert_phase1_to_phase2(model, phase2_config_of(model.config).replace(n_layers=layers))
    assert {name.split(".")[2] for name in report.copied if ".layers." in name} == {str(i) for i in range(copied)}
    assert any(name.startswith("model.layers.1.ffn") for name in report.unmatched) == (layers == 1)
    assert any(name.startswith("model.layers.2.ffn") for name in report.initialised) == (layers == 3)


def test_shapes_that_differ_are_refused_and_all_named():
    model = phase1({})
    with pytest.raises(ConfigError) as caught:
        convert_phase1_to_phase2(model, phase2_config_of(model.config).replace(vocab_size=41, ffn_dim=8))
    told = str(caught.value)
    assert "model.embed_tokens.id_permutation: (40,) of Phase 1, (41,) of Phase 2" in told
    assert "model.layers.1.ffn.0.weight: (64, 16) of Phase 1, (8, 16) of Phase 2" in told


def test_broken_weights_and_other_models_are_refused():
    model = phase1({})
    with torch.no_grad():
        model.model.layers[1].ffn.up[0].weight[0, 0] = float("nan")
    with pytest.raises(DomainError, match=r"NaN or infinity for model\.layers\.1\.ffn\.0\.weight;"):
        convert_phase1_to_phase2(model)
    with pytest.raises(ConfigError, match="expected a Phase1ForCausalLM, got Phase2ForCausalLM"):
        convert_phase1_to_phase2(convert_phase1_to_phase2(phase1({}))[0])
    with pytest.raises(ConfigError, match="expected is_encoder false"):
        convert_phase1_to_phase2(phase1({}), Phase2Config(is_encoder=True))


@pytest.mark.parametrize("given", ["small", {"d_model": 16}, phase1({}).config])
def test_what_is_no_configuration_of_phase_2_is_refused(given):
    with pytest.raises(ConfigError, match=f"expected a Phase2Config, got a {type(given).__name__}"):
        convert_phase1_to_phase2(phase1({}), given)


def test_the_report_spells_names_out_on_a_narrow_page():
    _, report = convert_phase1_to_phase2(phase1({}))
    page = Console(width=50, file=io.StringIO())
    page.print(report.table())
    printed = page.file.getvalue()
    assert "…" not in printed
    letters = "".join(line.split("│")[1].strip() for line in printed.splitlines() if "│" in line)
    assert all(name in letters for name in (*report.copied, *report.initialised))


def test_a_model_in_half_precision_stays_one():
    new, report = convert_phase1_to_phase2(phase1({}).to(torch.bfloat16))
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    assert report.copied
