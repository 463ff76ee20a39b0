"""The long version of the kill and damage tests: 64 ways to train, 200 kills, 500 damages.

``python -m tests.faults.soak_kills CELL SEED`` repeats one trial, ``CELL`` being its number in binary.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from so8t_torch.core.errors import CheckpointError
from so8t_torch.train import checkpoints
from tests.conftest import SENTENCES, make_tokenizer
from tests.faults import kills
from tests.faults.damage import damage
from tests.faults.kills import Count, Quiet, Zygote

Report = Callable[[str], None]

KILLS, DAMAGES = 200, 500
INSIDE = 0.25
"""Least share of the kills that must fall inside the writing of a checkpoint."""


class Row(NamedTuple):
    """One line of the table: what was counted, how often, how often it failed, the bound, how to see a failure."""

    figure: str
    trials: int
    failures: int
    bound: str
    command: str


def base(folder: Path) -> tuple[Path, Path]:
    """Write a random Phi-3 of three layers with a tokenizer, and six conversations; return both places."""
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
    )
    Phi3ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"question": question, "answer": answer, "label": label} for question, answer, label in SENTENCES]
    data = folder / "sentences.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "base", data


@contextmanager
def workplace() -> Iterator[tuple[Zygote, Path, Path, Path]]:
    """Make a folder with base and data, and start the process that forks runs."""
    with tempfile.TemporaryDirectory() as name, Zygote() as zygote:
        folder = Path(name)
        yield zygote, folder, *base(folder)


def trial(zygote: Zygote, cell: int, seed: int, left: int, quiet: Quiet, place: tuple[Path, Path, Path]) -> Count:
    """Do one disturbed run.

    Raises:
        AssertionError: it ended in an error, or differs from the undisturbed run.
    """
    folder, source, data = place
    config = kills.settings(kills.cells()[cell], source, data, folder / f"{cell}-{seed}")
    count = Count()
    kills.disturbed(zygote, config, quiet, random.Random(f"soak {cell} {seed}"), min(3, left), count)
    differing = kills.differences(quiet.trace, kills.trace(config.output_dir))
    shutil.rmtree(config.output_dir)
    assert not differing, f"differs in {differing[:5]}"
    return count


def quiet_run(zygote: Zygote, cell: int, place: tuple[Path, Path, Path]) -> Quiet:
    """Do the undisturbed run of a cell; its folder stays."""
    folder, source, data = place
    return kills.undisturbed(zygote, kills.settings(kills.cells()[cell], source, data, folder / f"quiet-{cell}"))


def command(cell: int, seed: int) -> str:
    """Return what repeats a trial."""
    return f"python -m tests.faults.soak_kills {cell:06b} {seed}"


def run(report: Report = print) -> list[Row]:
    """Do everything; return the rows of the table.

    Args:
        report: told of every cell, and of every failure with the command that repeats it.
    """
    count, failures, equal = Count(), [], 0
    with workplace() as (zygote, *place):
        for cell, factors in enumerate(kills.cells()):
            quiet = quiet_run(zygote, cell, (place[0], place[1], place[2]))
            wanted, seed = KILLS * (cell + 1) // len(kills.cells()), 0
            while count.kills < wanted and seed < 20:
                try:
                    done = trial(zygote, cell, seed, wanted - count.kills, quiet, (place[0], place[1], place[2]))
                except AssertionError as error:
                    failures.append(command(cell, seed))
                    report(f"{failures[-1]}: {error}")
                    break
                count.kills += done.kills
                count.inside_writes += done.inside_writes
                seed, equal = seed + 1, equal + 1
            report(f"cell {cell:06b} {'+'.join(factors) or 'nothing'}: {count.kills} kills, {len(failures)} failures")
        rows = damages(place[0] / "quiet-0/checkpoints", report)
    share = count.inside_writes / max(1, count.kills)
    if share < INSIDE:
        failures.append(f"only {share:.0%} of the kills inside writes")
    shown = (
        f"R1/R2 kills, {count.inside_writes} of them inside a write, in {len(kills.cells())} cells; {equal} runs equal"
    )
    return [row(shown, count.kills, failures), *rows]


def damages(folder: Path, report: Report) -> list[Row]:
    """Damage the newest of a run's checkpoints in 500 ways."""
    failures = []
    steps = [step for step, _ in checkpoints.present(folder)]
    for seed in range(DAMAGES):
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name) / "checkpoints"
            shutil.copytree(folder, copy)
            done = damage(copy / f"checkpoint-{steps[0]}", seed)
            try:
                checkpoints.verify(copy / f"checkpoint-{steps[0]}")
            except CheckpointError:
                found = checkpoints.newest(copy)[0]
                if found is not None and found.name == f"checkpoint-{steps[1]}":
                    continue
            failures.append(f"python -m tests.faults.damage CHECKPOINT {seed}")
            report(f"{failures[-1]}: {done}, and it was not passed over")
    return [row("R3 damages of the newest checkpoint found, the one before taken", DAMAGES, failures)]


def row(figure: str, trials: int, failures: list[str]) -> Row:
    """Return one row: with no failure in n independent trials the rate is below about 3/n (95 %)."""
    bound = f"0 (rate below {3 / max(1, trials):.1%})"
    return Row(figure, trials, len(failures), bound, failures[0] if failures else "")


def main(cell: str, seed: str) -> None:
    """Repeat one trial."""
    with workplace() as (zygote, folder, source, data):
        quiet = quiet_run(zygote, int(cell, 2), (folder, source, data))
        print(trial(zygote, int(cell, 2), int(seed), 3, quiet, (folder, source, data)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
