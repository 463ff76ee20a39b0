"""The ``so8t`` command: each sub-command reads its arguments, calls one function of the library and prints.

The groups ``eval``, ``data``, ``audit``, ``export``, ``logits`` and ``physics`` are the command's vocabulary; a group
appears in the help as soon as it has its first command.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from so8t_torch.core.config import dump_config, load_config, parse_config
from so8t_torch.core.errors import SO8TError

GROUPS = ("eval", "data", "audit", "export", "logits", "physics")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="SO(8) rotation adapters for language models: train, evaluate, fold, and prove the numbers.",
    epilog="Example: [bold]so8t train configs/train/quickstart.yaml[/bold]",
)
evaluation = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure a trained model on held-out data.",
    epilog="Example: [bold]so8t eval triage runs/quickstart/lora_gates[/bold]",
)
app.add_typer(evaluation, name="eval")
saved_logits = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look at logits that a run has saved.",
    epilog="Example: [bold]so8t logits show runs/quickstart/lora_gates[/bold]",
)
app.add_typer(saved_logits, name="logits")
data_files = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Read data files as training does.",
    epilog="Example: [bold]so8t data check questions.jsonl[/bold]",
)
app.add_typer(data_files, name="data")
physics_terms = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="See what the physics terms of a run do.",
    epilog="Example: [bold]so8t physics ablation CONFIG[/bold]",
)
app.add_typer(physics_terms, name="physics")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; may be given several times."),
]
TermModules = Annotated[
    list[str] | None,
    typer.Option("--terms", metavar="MODULE", help="Import a module that registers physics terms of your own."),
]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, see configs/train/.")]


@app.command(
    epilog="Examples: [bold]so8t train configs/train/quickstart.yaml[/bold] · "
    "[bold]so8t train configs/train/quickstart.yaml --set training.max_steps=50 --resume auto[/bold]"
)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(metavar="auto|PATH", help="Go on from the newest (or the named) checkpoint.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build model and data, print counts, train nothing.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")
    ] = False,
    terms: TermModules = None,
) -> None:
    """Train gates and LoRA on a frozen base, as a configuration file says."""
    from so8t_torch.train.config import TrainConfig

    settings = load_config(TrainConfig, config, overrides or ())
    if print_config:
        typer.echo(dump_config(settings), nl=False)
        return
    from so8t_torch.train.physics_terms import import_terms
    from so8t_torch.train.run import run_training

    for module in terms or ():
        import_terms(module)
    result = run_training(settings, resume=resume, dry_run=dry_run)
    if result.recorded:
        Console().print(result.summary(), soft_wrap=True)
        if result.triage is not None:
            Console().print(result.triage.table())


@app.command(epilog="Example: [bold]so8t plan configs/train/phi35_rtx3060.yaml --card rtx3060-12gb[/bold]")
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    card: Annotated[
        str | None, typer.Option(help="Name of the card to fit; default: the one in the configuration.")
    ] = None,
) -> None:
    """Print the expected GPU memory by component and whether it fits the card; exit status 1 when it does not."""
    from so8t_torch.train.config import TrainConfig
    from so8t_torch.train.plan import plan as make_plan

    result = make_plan(load_config(TrainConfig, config, overrides or ()), card=card)
    Console().print(result.table())
    raise typer.Exit(0 if result.fits else 1)


@app.command(
    epilog="Examples: [bold]so8t bake runs/quickstart/lora_gates/adapter baked/[/bold] · "
    "[bold]so8t bake ADAPTER OUT --prompts prompts.txt --dtype bfloat16[/bold]"
)
def bake(
    adapter: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")],
    base: Annotated[
        str | None, typer.Option(help="Base model directory or hub id; default: the one the adapter names.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts for the verification: text lines or JSON with 'texts'.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the written weights: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Fold an adapter into plain weights, verify the logits, and write a checkpoint that stock transformers loads."""
    from so8t_torch.adapter import bake as bake_adapter

    Console().print(bake_adapter(adapter, output, base=base, prompts=prompts, dtype=dtype).table())


@app.command(
    "compress-embedding",
    epilog="Examples: [bold]so8t compress-embedding CHECKPOINT --rank 16 --dry-run[/bold] · "
    "[bold]so8t compress-embedding CHECKPOINT --out SMALL --rank 512 --max-relative-error 0.2[/bold]",
)
def compress_embedding(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors weights; only read.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; must not exist or be empty.")] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(help="Rank of every bond between two cores (default 16); give it twice for 3 cores that differ."),
    ] = None,
    cores: Annotated[int, typer.Option(help="Number of cores, 2 or 3.")] = 2,
    sweeps: Annotated[int, typer.Option(help="Sweeps of least squares after the decomposition.")] = 3,
    max_relative_error: Annotated[float, typer.Option(help="Largest relative Frobenius error that is written.")] = 0.1,
    id_permutation: Annotated[
        Literal["golden", "identity"], typer.Option(help="Order of the ids in the train.")
    ] = "golden",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and report, write nothing.")] = False,
) -> None:
    """Replace a checkpoint's embedding by a tensor train; refuse, naming a rank that would do, when it is too far.

    The result is read by so8t_torch.models.compression.load_compressed. With --dry-run the exit status is 1 when the
    error is above the gate.
    """
    from so8t_torch.models.compression import compress_checkpoint

    report = compress_checkpoint(
        checkpoint,
        out,
        rank=rank[0] if rank and len(rank) == 1 else rank or 16,
        num_cores=cores,
        sweeps=sweeps,
        max_relative_error=max_relative_error,
        id_permutation=id_permutation,
        dry_run=dry_run,
    )
    for table in report.tables():
        Console().print(table)
    raise typer.Exit(0 if report.kept else 1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Examples: [bold]so8t parity[/bold] · [bold]so8t parity --kernels[/bold] · "
    "[bold]so8t parity --module my_ops:PAIRS[/bold]",
)
def parity(
    context: typer.Context,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile every Triton kernel for sm_80/86/89/90, no GPU needed.")
    ] = False,
    module: Annotated[str | None, typer.Option(metavar="MODULE:TABLE", help="Judge your own table of pairs.")] = None,
) -> None:
    """Judge production against its reference and write docs/numerics.md (a process of its own: it needs JAX)."""
    chosen = [*(["--kernels"] if kernels else []), *(["--module", module] if module else []), *context.args]
    raise typer.Exit(subprocess.run([sys.executable, "-m", "parity_tests", *chosen], check=False).returncode)


@app.command(epilog="Example: [bold]so8t convert runs/phase1 phase2[/bold]")
def convert(
    run: Annotated[Path, typer.Argument(help="Run folder of a Phase 1 model, or a model's folder; only read.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of what Phase 1 has no counterpart for.")] = 0,
) -> None:
    """Turn a Phase 1 model into one of Phase 2, and print what became of every tensor."""
    from transformers.utils.logging import disable_progress_bar

    from so8t_torch.models.conversion import convert_folder

    disable_progress_bar()
    Console().print(convert_folder(run, output, seed=seed).table())
    typer.echo(f"next: so8t train CONFIG --set 'model={{kind: phase2, init_from: {output}}}'")


@app.command(
    "convert-weights",
    epilog="Examples: [bold]so8t convert-weights MODEL FLAX --to jax[/bold] · "
    "[bold]so8t convert-weights FLAX MODEL --to torch[/bold]",
)
def convert_weights(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Run, or folder of a language model; only read.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist or be empty.")],
    to: Annotated[Literal["jax", "torch"], typer.Option(help="Side that is to read the weights.")],
) -> None:
    """Write a model's weights for its definition in Flax, or back (a process of its own: it needs JAX)."""
    from so8t_torch.models.stored import model_folder

    folder = model_folder(source) if to == "jax" else source
    chosen = ["-m", "so8t_jax", "convert-weights", "--to", to, "--", str(folder), str(output)]
    raise typer.Exit(subprocess.run([sys.executable, *chosen], check=False).returncode)


@app.command(
    "long-context",
    epilog="Examples: [bold]so8t long-context configs/long_context.yaml[/bold] · "
    "[bold]so8t long-context configs/long_context.yaml --set tasks='[copy]' --set training.steps=1000[/bold]",
)
def long_context(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train Phase 2 to recall and to copy, with and without its memory, and plot how far it reaches."""
    from so8t_torch.train.long_context import LongContextConfig, run_long_context

    settings = load_config(LongContextConfig, config, overrides or ())
    for table in run_long_context(settings, typer.echo).tables():
        Console().print(table)


@app.command(epilog="Example: [bold]so8t demo --output runs/quickstart[/bold]")
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the base, the runs and the summary.")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Build a small Phi-3, adapt its frozen 4-bit base in four ways, compare them, fold the best into plain weights."""
    from so8t_torch.train.demo import run_demo

    run_demo(output)


@evaluation.command(
    epilog="Examples: [bold]so8t eval triage runs/quickstart/lora_gates[/bold] · "
    "[bold]so8t eval triage RUN --data questions.jsonl[/bold]"
)
def triage(
    run: Annotated[Path, typer.Argument(help="Run folder written by so8t train.")],
    data: Annotated[
        Path | None, typer.Option(help="JSONL or CSV with labels; default: the run's own held-out data.")
    ] = None,
) -> None:
    """Measure ALLOW / ESCALATE / REFUSE decisions with intervals; unsafe-allow rate first."""
    from so8t_torch.train.evaluation import evaluate_run

    Console().print(evaluate_run(run, data=data).table())


@app.command(
    epilog="Examples: [bold]so8t generate runs/phase2_stdlib --prompt 'def '[/bold] · "
    "[bold]so8t generate RUN --temperature 0 --tokens 1000[/bold]"
)
def generate(
    run: Annotated[Path, typer.Argument(help="Run folder of a model that was trained whole, or a model's folder.")],
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="Of the draws; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold so much probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Write text as it is generated, then say how fast, and how many bytes of state it took."""
    from transformers.utils.logging import disable_progress_bar

    from so8t_torch.models.streaming import Drawing, Writing, load

    disable_progress_bar()
    drawing = Drawing(tokens, temperature, top_k, top_p, seed)
    writing = Writing(*load(run), prompt, drawing)
    try:
        with closing(iter(writing)) as pieces:
            for piece in pieces:
                typer.echo(piece, nl=False)
    finally:
        typer.echo()
    Console(stderr=True).print(writing.summary(), markup=False, highlight=False, soft_wrap=True)


Saved = Annotated[Path, typer.Argument(help="A file of saved logits, a folder of them, or a run folder.")]
Plot = Annotated[Path | None, typer.Option(help="PNG to write: entropy, tokens most often predicted, calibration.")]
Spelling = Annotated[Path | None, typer.Option(help="Folder with the tokenizer that spells the tokens.")]


@saved_logits.command(epilog="Example: [bold]so8t logits show RUN --plot logits.png --tokenizer BASE[/bold]")
def show(path: Saved, plot: Plot = None, tokenizer: Spelling = None) -> None:
    """Print loss, entropy, accuracy and calibration of saved logits, and the tokens most often predicted."""
    from so8t_torch.train.logits.reports import show as tables

    _print(tables(path, plot=plot, tokenizer=tokenizer))


@saved_logits.command(epilog="Example: [bold]so8t logits compare RUN_A RUN_B --plot logits.png[/bold]")
def compare(first: Saved, second: Saved, plot: Plot = None, tokenizer: Spelling = None) -> None:
    """Compare saved logits step by step; on the same tokens also how far the predictions moved."""
    from so8t_torch.train.logits.reports import compare as tables

    _print(tables(first, second, plot=plot, tokenizer=tokenizer))


def _print(tables: list[Table]) -> None:
    for table in tables:
        Console().print(table, "")


@data_files.command(
    epilog="Examples: [bold]so8t data check questions.jsonl[/bold] · "
    "[bold]so8t data check big.csv --quarantine --share 0.02[/bold]"
)
def check(
    file: Annotated[Path, typer.Argument(help="JSONL or CSV file in UTF-8.")],
    label: Annotated[bool, typer.Option(help="Whether every record must carry a label.")] = False,
    answer: Annotated[bool, typer.Option(help="Whether every conversation must end with an answer.")] = True,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Put bad rows aside into FILE.refused.jsonl instead of stopping.")
    ] = False,
    share: Annotated[float, typer.Option(help="Largest share of bad rows that is put aside.")] = 0.01,
) -> None:
    """Read a data file to its end and print what is in it; the first bad row, or too many of them, are an error."""
    from so8t_torch.data.intake import ReadingSection
    from so8t_torch.data.records import read_file

    settings = {"mode": "quarantine" if quarantine else "strict", "refused_share": share}
    reading = parse_config(ReadingSection, settings)
    typer.echo(read_file(file, need_answer=answer, need_label=label, reading=reading).summary())


@physics_terms.command(
    epilog="Example: [bold]so8t physics ablation CONFIG --set physics.terms.energy_drift.weight=1[/bold]"
)
def ablation(config: ConfigPath, overrides: Overrides = None, terms: TermModules = None) -> None:
    """Train without physics terms, with each alone and with all; write ablation.json and ablation.png beside."""
    from so8t_torch.train.ablation import run_ablation
    from so8t_torch.train.config import TrainConfig
    from so8t_torch.train.physics_terms import import_terms

    for module in terms or ():
        import_terms(module)
    Console().print(run_ablation(load_config(TrainConfig, config, overrides or ())).table())


def main() -> None:
    """Run the command line; errors raised on purpose, and those of files, are printed without a traceback."""
    # bitsandbytes announces at import that an optional kernel package is absent; nothing here asks for it
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # addressed to the libraries that call transformers, not to whoever types a command
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except (SO8TError, OSError) as error:
        # as plain text: lists and regular expressions in square brackets are not markup
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        raise SystemExit(error.exit_code if isinstance(error, SO8TError) else 1) from None


if __name__ == "__main__":
    main()
