"""Folds an adapter into plain weights, verifies the logits, and only then writes a checkpoint.

    W' = R(W + s B A),   b' = R b      in float64, rounded once

The gate acts on the output of one linear layer and nothing lies between, so folding is exact. The reference is the
gated model on the weights that training saw: a quantised base is quantised the same way and dequantised first.
Nothing is written unless max |Δlogit| ≤ max(1e-5, 1e-5 max |logit|) and KL < 1e-6 in float32, and the written files,
loaded again by stock transformers, give the logits that were verified.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from so8t_torch.adapter.config import SO8TConfig
from so8t_torch.adapter.loading import (
    BAKED,
    adapter_digest,
    check_weights_file,
    folded_adapters,
    load_base,
    read_adapter_config,
)
from so8t_torch.adapter.quantized import dequantize, quantization_of
from so8t_torch.adapter.summary import layers
from so8t_torch.adapter.verification import (
    Difference,
    Prompts,
    difference,
    encode,
    find_tokenizer,
    logits,
    noise_floor,
    rounded_weights,
)
from so8t_torch.core.errors import AdapterError

MAX_ABS = 1e-5
MAX_KL = 1e-6
ADAPTER_COPY = "so8t"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDINGS = ("bfloat16", "int8", "nf4")


@dataclass(frozen=True)
class BakeReport:
    """What was folded and how well the result agrees with the gated model.

    ``folded`` is the float32 model that was verified, ``written`` the checkpoint as loaded again, ``rounded`` the
    folded model with its linear weights rounded to fewer bits; each against the gated model in float32.
    """

    output: str
    base: str
    quantization: dict[str, Any]
    dtype: str
    prompts: str
    gates: int
    low_rank: int
    largest_logit: float
    tolerance: float
    noise_threads: float
    noise_batch: float
    folded: Difference
    written: Difference
    rounded: dict[str, Difference]
    seconds: float

    def table(self) -> Table:
        """Return the report as a table for a terminal."""
        table = Table(title=f"baked into {self.output}", caption=self._caption(), caption_justify="left")
        for column in ("model", "max |Δlogit|", "KL (nats)", "argmax changed"):
            table.add_column(column, justify="left" if column == "model" else "right")
        table.add_row("bound in float32", f"{self.tolerance:.1e}", f"{MAX_KL:.0e}", "")
        table.add_row("noise: threads", f"{self.noise_threads:.1e}", "", "")
        table.add_row("noise: batch of two", f"{self.noise_batch:.1e}", "", "")
        rows = {"folded, float32": self.folded, f"written, {self.dtype}": self.written}
        rows |= {f"folded, weights in {kind}": measured for kind, measured in self.rounded.items()}
        for name, d in rows.items():
            table.add_row(name, f"{d.max_abs:.1e}", f"{d.kl:.1e}", f"{d.argmax_changes} of {d.positions}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return dataclasses.asdict(self)

    def _caption(self) -> str:
        stored = self.quantization.get("quant_method", "no")
        return (
            f"{self.gates} gates and {self.low_rank} low-rank updates folded into {self.base} ({stored} quantisation "
            f"undone); {self.prompts}; largest logit {self.largest_logit:.3g}; {self.seconds:.1f} s"
        )


def bake(
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "float32",
    prompts: str | Path | Sequence[str] | None = None,
    max_tokens: int = 64,
) -> BakeReport:
    """Fold an adapter into its base, verify, and write a checkpoint that stock transformers loads.

    Args:
        adapter_dir: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        output_dir: folder to write; must not exist, or be empty.
        base: folder or hub id of the base; None takes the one that the adapter names.
        dtype: of the written weights: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        prompts: a file (JSON with ``texts``, or lines), texts, or None for the built-in ones.
        max_tokens: prompts are cut to this many tokens.

    Returns:
        the measured agreement, also written to ``so8t/bake.json`` beside a copy of the adapter.

    Raises:
        AdapterError: the output exists, the base is already baked, or the verification failed; then nothing is written.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise AdapterError(f"bake: expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if max_tokens < 1:
        raise AdapterError(f"bake: expected max_tokens >= 1, got {max_tokens}.")
    adapter = Path(adapter_dir)
    output = _free_folder(output_dir, adapter)
    config = read_adapter_config(adapter)
    check_weights_file(adapter)
    source = str(base or config.base_model_name_or_path)
    model = _float_base(config, base)
    _refuse_twice(model, adapter, config, source)
    tokenizer = find_tokenizer(adapter, source)
    inputs = encode(prompts, tokenizer, model.config.vocab_size, max_tokens)

    gated = PeftModel.from_pretrained(model, str(adapter)).eval()
    reference = logits(gated, inputs)
    threads, batch = noise_floor(gated, inputs, reference)
    counts = _counts(gated)
    folded = gated.merge_and_unload(safe_merge=True)
    largest = max(float(z.abs().max()) for z in reference)
    tolerance = max(MAX_ABS, MAX_ABS * largest)
    measured = difference(reference, logits(folded, inputs))
    _require("folded model", measured, tolerance, max(threads, batch))
    rounded = _rounded_differences(folded, inputs, reference)

    for parameter in folded.parameters():
        # parameters alone: rotary tables are buffers that transformers keeps in float32
        parameter.data = parameter.data.to(DTYPES[dtype])
    digests = [*folded_adapters(folded), adapter_digest(adapter)]
    setattr(folded.config, BAKED, {"adapters_sha256": digests, "dtype": dtype})
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        written = _write(folded, tokenizer, adapter, staging, inputs, reference)
        if dtype == "float32":
            _require("written checkpoint", written, tolerance, max(threads, batch))
        report = BakeReport(
            output=str(output),
            base=source,
            quantization=config.quantization or {},
            dtype=dtype,
            prompts=f"{len(inputs.token_ids)} prompts: {inputs.source}",
            gates=counts[0],
            low_rank=counts[1],
            largest_logit=largest,
            tolerance=tolerance,
            noise_threads=threads,
            noise_batch=batch,
            folded=measured,
            written=written,
            rounded=rounded,
            seconds=time.perf_counter() - started,
        )
        (staging / ADAPTER_COPY / "bake.json").write_text(json.dumps(report.to_dict(), indent=2), encoding="utf-8")
        _publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _free_folder(path: str | Path, adapter: Path) -> Path:
    output = Path(path).absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AdapterError(f"bake: expected {output} not to exist or to be an empty folder; choose another name.")
    if output.is_relative_to(Path(adapter).absolute()):
        raise AdapterError(f"bake: {output} lies in the adapter's own folder, of which a copy is written.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterError(f"bake: {output.parent} cannot be made ({error}); choose another place.") from error
    return output


def _float_base(config: SO8TConfig, base: str | Path | None) -> Any:
    """Return the base with float32 weights: those that training saw, if it saw quantised ones."""
    source = base or config.base_model_name_or_path
    try:
        stored_quantized = source is not None and hasattr(
            AutoConfig.from_pretrained(str(source), trust_remote_code=False), "quantization_config"
        )
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"bake: no model can be read at {source}; pass the folder or hub id of the model that the adapter was "
            f"trained on as base. The library says: {error}"
        ) from error
    if config.quantization and not stored_quantized:
        model = load_base(config, base, quantization_config=dict(config.quantization))
    elif stored_quantized:
        model = load_base(config, base)
    else:
        model = load_base(config, base, dtype=torch.float32)
    if quantization_of(model):
        dequantize(model, torch.float32)
    return model.float().eval()


def _refuse_twice(model: nn.Module, adapter: Path, config: SO8TConfig, source: str) -> None:
    """Refuse a base that holds this adapter, or that holds others and is not the one this adapter learned on."""
    folded = folded_adapters(model)
    own = config.base_model_name_or_path
    learned_on_it = own is not None and Path(own).absolute() == Path(source).absolute()
    if folded and (adapter_digest(adapter) in folded or not learned_on_it):
        raise AdapterError(
            f"bake: {source} is itself the result of a bake, and this adapter was trained on {own}; folding it here "
            "would apply an adapter twice. Pass the model it was trained on as base."
        )


def _counts(model: nn.Module) -> tuple[int, int]:
    found = [layer for _, layer in layers(model)]
    return sum(len(layer.so8t_safe) for layer in found), sum(len(layer.so8t_lora_A) for layer in found)


def _require(what: str, measured: Difference, tolerance: float, noise: float) -> None:
    if not measured.within(tolerance, MAX_KL):
        raise AdapterError(
            f"bake: the {what} differs from the gated model by max |Δlogit| = {measured.max_abs:.3e} and "
            f"KL = {measured.kl:.3e}, allowed are {tolerance:.1e} and {MAX_KL:.0e} (noise floor {noise:.1e}); "
            "nothing was written."
        )


def _rounded_differences(model: Any, inputs: Prompts, reference: list[Tensor]) -> dict[str, Difference]:
    kinds = ROUNDINGS if importlib.util.find_spec("bitsandbytes") is not None else ROUNDINGS[:1]
    measured = {}
    for kind in kinds:
        with rounded_weights(model, kind):
            measured[kind] = difference(reference, logits(model, inputs))
    return measured


def _write(
    folded: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter: Path,
    staging: Path,
    inputs: Prompts,
    reference: list[Tensor],
) -> Difference:
    """Write everything into ``staging`` and return how the checkpoint, loaded again, differs from the reference."""
    folded.save_pretrained(staging)
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    shutil.copytree(adapter, staging / ADAPTER_COPY, ignore=shutil.ignore_patterns("checkpoint-*", "*.pt"))
    again = type(folded).from_pretrained(staging, dtype=next(folded.parameters()).dtype).eval()
    kept = again.state_dict()
    for key, tensor in folded.state_dict().items():
        if not torch.equal(kept[key].float(), tensor.float()):
            raise AdapterError(f"bake: {key!r} read back differs from what was written; nothing was kept.")
    return difference(reference, logits(again, inputs))


def _publish(staging: Path, output: Path) -> None:
    if output.exists():
        output.rmdir()
    staging.chmod(0o755)
    staging.rename(output)
