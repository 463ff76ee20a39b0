from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from so8t_torch import SO8TConfig, bake, load_adapter
from so8t_torch.adapter import SO8TLayer, verification
from so8t_torch.adapter.quantized import dequantize
from so8t_torch.adapter.verification import BUILT_IN_PROMPTS, Prompts, difference, encode, read_prompts, rounded_weights
from so8t_torch.core.errors import AdapterError
from so8t_torch.ops import rotation

FIXTURES = Path(__file__).parents[3] / "shared" / "data" / "fixtures"
PHI35 = Path(__file__).parents[3] / "shared" / "data" / "phi35"


@pytest.fixture
def make_adapter(load_base, shake, tmp_path):
    def make(quantization: str = "none", name: str = "adapter", **arguments) -> Path:
        model = get_peft_model(load_base(quantization), SO8TConfig(r=2, task_type="CAUSAL_LM", **arguments))
        shake(model, low_rank=0.03).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def kl(z: torch.Tensor, w: torch.Tensor) -> float:
    p, q = z.log_softmax(-1), w.log_softmax(-1)
    return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).max())


@pytest.mark.parametrize(("kind", "chart"), [("none", "exp"), ("nf4", "cayley"), ("int8", "exp")])
def test_a_baked_checkpoint_is_a_plain_model_with_the_gated_models_logits(
    make_adapter, load_base, saved_base, ids, tmp_path, kind, chart
) -> None:
    adapter = make_adapter(kind, chart=chart)
    report = bake(adapter, tmp_path / "baked")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    assert type(plain).__name__ == "Phi3ForCausalLM"
    assert not any(isinstance(m, SO8TLayer) for m in plain.modules())
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in load_base().named_parameters()}
    assert all(p.dtype == torch.float32 for p in plain.parameters())

    base = load_base(kind)
    if kind != "none":
        dequantize(base, torch.float32)
    with torch.no_grad():
        gated = load_adapter(adapter, base)(ids).logits
        z = plain(ids).logits
    assert (z - gated).abs().max() <= max(1e-5, 1e-5 * float(gated.abs().max()))
    assert kl(gated.double(), z.double()) < 1e-6
    assert (z - load_base().eval()(ids).logits).abs().max() > 1e-2, "an adapter without effect tests nothing"

    assert report.folded.max_abs <= report.tolerance
    assert report.written.max_abs <= report.tolerance
    assert (report.gates, report.low_rank) == (3, 12)
    assert report.quantization.get("quant_method") == (None if kind == "none" else "bitsandbytes")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert tokenizer("the gate").input_ids == AutoTokenizer.from_pretrained(saved_base)("the gate").input_ids


def test_a_checkpoint_that_is_stored_quantised_can_be_the_base(load_base, shake, ids, tmp_path) -> None:
    quantised = load_base("nf4")
    quantised.save_pretrained(tmp_path / "nf4")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "nf4"), SO8TConfig(r=2, task_type="CAUSAL_LM")
    )
    shake(model, low_rank=0.03).save_pretrained(tmp_path / "adapter")
    report = bake(tmp_path / "adapter", tmp_path / "baked")
    assert report.written.max_abs <= report.tolerance
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    assert not hasattr(plain.config, "quantization_config")
    with torch.no_grad():
        assert (plain(ids).logits - model.eval()(ids).logits).abs().max() < 1e-4


def test_modules_to_save_are_part_of_the_baked_checkpoint(load_base, shake, ids, tmp_path) -> None:
    model = get_peft_model(load_base(), SO8TConfig(modules_to_save=["lm_head"], task_type="CAUSAL_LM"))
    shake(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n).mul_(1.5)
    model.eval().save_pretrained(tmp_path / "adapter")
    bake(tmp_path / "adapter", tmp_path / "baked")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")(ids).logits
        torch.testing.assert_close(plain, model(ids).logits, rtol=0, atol=1e-5)


def test_half_precision_is_written_and_its_error_reported(make_adapter, tmp_path) -> None:
    report = bake(make_adapter(), tmp_path / "baked", dtype="bfloat16")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert report.folded.max_abs <= report.tolerance < report.written.max_abs < 0.1
    assert 0 < report.rounded["bfloat16"].max_abs < report.rounded["nf4"].max_abs
    assert set(report.rounded) == {"bfloat16", "int8", "nf4"}


def test_the_report_is_stored_and_shown(make_adapter, tmp_path) -> None:
    from rich.console import Console

    adapter = make_adapter()
    report = bake(adapter, tmp_path / "baked")
    stored = json.loads((tmp_path / "baked" / "so8t" / "bake.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    shown = io.StringIO()
    Console(width=140, file=shown).print(report.table())
    text = shown.getvalue()
    for part in ("noise: threads", "noise: batch of two", "folded, float32", "weights in nf4", "3 gates and 12"):
        assert part in text
    copy = tmp_path / "baked" / "so8t"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (copy / file).read_bytes() == (adapter / file).read_bytes()


def test_the_gate_file_kept_beside_undoes_the_fold(make_adapter, load_base, tmp_path) -> None:
    adapter = make_adapter()
    bake(adapter, tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    gated = load_adapter(tmp_path / "baked" / "so8t", load_base())
    for index in range(3):
        name = f"model.layers.{index}.self_attn.o_proj"
        layer = gated.get_base_model().get_submodule(name)
        unfolded, _ = rotation.unfold_output(baked.get_submodule(name).weight, None, layer.gate_rotation("default"))
        update = 8 * layer.so8t_lora_B["default"] @ layer.so8t_lora_A["default"]
        torch.testing.assert_close(unfolded - update, layer.base_layer.weight, rtol=0, atol=1e-6)


def test_baking_twice_is_refused(make_adapter, tmp_path) -> None:
    adapter = make_adapter()
    bake(adapter, tmp_path / "baked")
    with pytest.raises(AdapterError, match="itself the result of a bake"):
        bake(adapter, tmp_path / "again", base=tmp_path / "baked")
    resaved = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    resaved.save_pretrained(tmp_path / "resaved")
    assert AutoConfig.from_pretrained(tmp_path / "resaved").so8t_baked["dtype"] == "float32"
    with pytest.raises(AdapterError, match="itself the result of a bake"):
        bake(adapter, tmp_path / "again", base=tmp_path / "resaved")
    assert not (tmp_path / "again").exists()
    with pytest.raises(AdapterError, match="already folded into the base"):
        load_adapter(adapter, tmp_path / "baked")


def test_an_adapter_trained_on_a_baked_model_is_baked_in_turn(make_adapter, shake, ids, tmp_path) -> None:
    first = make_adapter()
    bake(first, tmp_path / "baked")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "baked")
    model = shake(get_peft_model(base, SO8TConfig(task_type="CAUSAL_LM")), seed=2).eval()
    model.save_pretrained(tmp_path / "second")
    bake(tmp_path / "second", tmp_path / "twice")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    with torch.no_grad():
        assert (plain(ids).logits - model(ids).logits).abs().max() < 1e-5
    for adapter in (first, tmp_path / "second"):
        with pytest.raises(AdapterError, match="itself the result of a bake"):
            bake(adapter, tmp_path / "again", base=tmp_path / "twice")
        with pytest.raises(AdapterError, match="already folded into the base"):
            load_adapter(adapter, tmp_path / "twice")


def test_a_folder_without_an_adapter_or_prompts_is_named(make_adapter, tmp_path) -> None:
    with pytest.raises(AdapterError, match=r"nothing_here: no adapter_config\.json"):
        bake(tmp_path / "nothing_here", tmp_path / "baked")
    with pytest.raises(AdapterError, match=r"no prompts at .*absent\.txt"):
        bake(make_adapter(), tmp_path / "baked", prompts=tmp_path / "absent.txt")


def test_an_output_that_holds_something_is_refused(make_adapter, tmp_path) -> None:
    adapter = make_adapter()
    (tmp_path / "baked").mkdir()
    (tmp_path / "baked" / "notes.txt").write_text("keep me")
    with pytest.raises(AdapterError, match="not to exist or to be an empty folder"):
        bake(adapter, tmp_path / "baked")
    assert (tmp_path / "baked" / "notes.txt").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    bake(adapter, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def leftovers(folder: Path) -> set[str]:
    return {f.name for f in folder.iterdir()} - {"adapter"}


def test_nothing_is_written_when_the_fold_is_wrong(make_adapter, tmp_path, monkeypatch) -> None:
    adapter = make_adapter()
    right = rotation.fold_output
    monkeypatch.setattr(rotation, "fold_output", lambda weight, bias, turn: right(weight, bias, turn.mT))
    with pytest.raises(AdapterError, match=r"folded model differs from the gated model by max .*nothing was"):
        bake(adapter, tmp_path / "baked")
    assert leftovers(tmp_path) == set()


def test_nothing_is_kept_when_the_written_files_are_wrong(make_adapter, tmp_path, monkeypatch) -> None:
    from transformers import Phi3ForCausalLM

    adapter = make_adapter()
    save = Phi3ForCausalLM.save_pretrained

    def damaged(self, folder, **arguments) -> None:
        with torch.no_grad():
            self.model.layers[0].mlp.down_proj.weight[0, 0] += 1
            save(self, folder, **arguments)
            self.model.layers[0].mlp.down_proj.weight[0, 0] -= 1

    monkeypatch.setattr(Phi3ForCausalLM, "save_pretrained", damaged)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.down_proj\.weight' read back differs"):
        bake(adapter, tmp_path / "baked")
    assert leftovers(tmp_path) == set()


def test_nan_in_the_adapter_stops_the_bake(make_adapter, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = make_adapter()
    stored = load_file(adapter / "adapter_model.safetensors")
    next(v for k, v in stored.items() if "so8t_safe" in k)[0, 0] = float("nan")
    save_file(stored, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="NaN or infinity"):
        bake(adapter, tmp_path / "baked")
    assert leftovers(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"dtype": "int4"}, "dtype to be one of"), ({"base": "/nowhere/at/all"}, "no model can be read at /nowhere")],
)
def test_impossible_requests_write_nothing(make_adapter, tmp_path, arguments, named) -> None:
    adapter = make_adapter()
    with pytest.raises(AdapterError, match=named):
        bake(adapter, tmp_path / "baked", **arguments)
    assert leftovers(tmp_path) == set()


def test_prompts_come_from_json_from_lines_and_from_the_call(make_adapter, tmp_path) -> None:
    (tmp_path / "a.json").write_text('{"texts": ["the gate", "no more"], "purpose": "test"}', encoding="utf-8")
    (tmp_path / "b.json").write_bytes('\ufeff["eight channels"]'.encode())
    (tmp_path / "c.txt").write_bytes("the gate turns\r\n\r\neight channels\r\n".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "a.json") == ["the gate", "no more"]
    assert read_prompts(tmp_path / "b.json") == ["eight channels"]
    assert read_prompts(tmp_path / "c.txt") == ["the gate turns", "eight channels"]
    (tmp_path / "d.json").write_text('{"prompts": []}')
    with pytest.raises(AdapterError, match="expected prompts as"):
        read_prompts(tmp_path / "d.json")
    for name, content, reason in (
        ("e.json", b'{"texts": "one string, not four"}', "expected prompts as"),
        ("f.json", b'["cut off', "not a complete JSON"),
        ("g.json", b'{"texts"', "not a complete JSON"),
        ("h.txt", b"gate \xff", "not valid UTF-8 at byte 5"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AdapterError, match=reason):
            read_prompts(tmp_path / name)

    adapter = make_adapter()
    for number, (prompts, told) in enumerate(
        [(None, "6 prompts: built-in"), (tmp_path / "c.txt", "2 prompts:"), (["the gate"], "1 prompts: given texts")]
    ):
        assert told in bake(adapter, tmp_path / f"baked{number}", prompts=prompts).prompts


def test_a_base_without_tokenizer_is_verified_on_seeded_ids(make_adapter, saved_base, tmp_path) -> None:
    adapter = make_adapter()
    bare = tmp_path / "bare"
    shutil.copytree(saved_base, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    assert "seeded token ids" in bake(adapter, tmp_path / "baked", base=bare).prompts
    with pytest.raises(AdapterError, match="has a tokenizer"):
        bake(adapter, tmp_path / "other", base=bare, prompts=["the gate"])


@pytest.mark.parametrize("language", ["en", "ja"])
def test_the_real_prompts_and_the_real_tokenizer(language) -> None:
    path = FIXTURES / f"bake_prompts_{language}.json"
    if not path.is_file() or not (PHI35 / "tokenizer.json").is_file():
        pytest.skip("needs ../shared/data/fixtures and ../shared/data/phi35")
    tokenizer = verification.find_tokenizer(PHI35)
    prompts = encode(path, tokenizer, 32064, 64)
    assert len(prompts.token_ids) == {"en": 10, "ja": 15}[language]
    assert all(ids.shape[0] == 1 and 4 < ids.shape[1] <= 64 for ids in prompts.token_ids)


def test_differences_are_the_ones_scipy_computes() -> None:
    import numpy as np
    from scipy.special import log_softmax, rel_entr

    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(5, 7, generator=generator), torch.randn(3, 7, generator=generator)]
    w = [t + 0.1 * torch.randn(t.shape, generator=generator) for t in z]
    got = difference(z, w)
    p, q = (np.exp(log_softmax(torch.cat(t).double().numpy(), axis=-1)) for t in (z, w))
    assert got.kl == pytest.approx(rel_entr(p, q).sum(-1).max(), rel=1e-10)
    assert got.max_abs == pytest.approx(float((torch.cat(z) - torch.cat(w)).abs().max()), rel=1e-6)
    assert got.positions == 8
    assert got.argmax_changes == int((p.argmax(-1) != q.argmax(-1)).sum())
    assert not difference(z, [t.clone().fill_(float("nan")) for t in z]).within(1e9, 1e9)


def test_rounded_weights_are_those_of_the_quantiser(load_base, ids) -> None:
    model, quantised = load_base().eval(), load_base("nf4").train()
    prompts = Prompts((ids[:1],), "ids")
    plain = verification.logits(model, prompts)
    with rounded_weights(model, "nf4"):
        rounded = verification.logits(model, prompts)
    assert torch.equal(verification.logits(model, prompts)[0], plain[0]), "the model is left as it was"
    assert difference(verification.logits(quantised, prompts), rounded).max_abs < 1e-5
    assert difference(plain, rounded).max_abs > 1e-3


def test_built_in_prompts_cover_both_languages() -> None:
    assert any(text.isascii() for text in BUILT_IN_PROMPTS)
    assert any(not text.isascii() for text in BUILT_IN_PROMPTS)


def test_places_and_limits_that_cannot_be_are_refused_before_the_work(make_adapter, tmp_path) -> None:
    adapter = make_adapter()
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for output, arguments, reason in (
        (adapter / "baked", {}, "the adapter's own folder"),
        (tmp_path / "file" / "baked", {}, "cannot be made"),
        (tmp_path / "baked", {"max_tokens": 0}, "max_tokens >= 1"),
        (tmp_path / "baked", {"base": tmp_path / "empty"}, "no model can be read"),
    ):
        with pytest.raises(AdapterError, match=reason):
            bake(adapter, output, **arguments)
        assert not output.exists()
