"""The triage decisions of a finished run, measured afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from so8t_torch.adapter import load_adapter
from so8t_torch.core.config import load_config
from so8t_torch.core.errors import ConfigError
from so8t_torch.data.records import Record, read_records
from so8t_torch.train import building
from so8t_torch.train.config import TrainConfig
from so8t_torch.train.folder import RunFolder

if TYPE_CHECKING:
    from so8t_torch.safety.evaluation import TriageReport


def evaluate_run(run: str | Path, data: str | Path | None = None) -> TriageReport:
    """Measure the triage decisions of a finished run and write them to ``eval/triage.json``.

    Args:
        run: run folder with ``config.yaml`` and ``adapter/``.
        data: labelled JSONL or CSV; ``None`` takes the run's own held-out data.

    Raises:
        ConfigError: the folder holds no finished run, or the run has no held-out data.
    """
    from so8t_torch.safety.evaluation import evaluate_triage

    folder = RunFolder(Path(run))
    if folder.model.is_dir():
        raise ConfigError(f"{run}: decisions are measured of an adapter; this run trained a whole model on text.")
    if not (folder.config.is_file() and (folder.adapter / "adapter_config.json").is_file()):
        raise ConfigError(f"{run}: no finished run here; expected config.yaml and adapter/adapter_config.json.")
    config = load_config(TrainConfig, folder.config)
    held_out = _evaluation_records(config, data)
    torch.set_num_threads(building.thread_count(config))
    source, revision = building.base_source(config)
    model = load_adapter(folder.adapter, building.load_model(source, revision, config.loading))
    tokenizer = building.load_tokenizer(source, revision)
    report = evaluate_triage(model, tokenizer, held_out, batch_size=config.evaluation.batch_size)
    if data is None:
        (folder.evaluation / "triage.json").write_text(report.to_json(), encoding="utf-8")
    return report


def _evaluation_records(config: TrainConfig, data: str | Path | None) -> list[Record]:
    if data is not None:
        return read_records(data, config.data.columns, need_answer=False, need_label=True, reading=config.data.reading)
    held_out = building.records(config)[1]
    if not held_out:
        raise ConfigError("The run has no held-out data of its own; name a labelled file with --data.")
    return held_out
