"""The command line: help with examples at every level, configuration options, exit statuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from so8t_torch import cli
from so8t_torch.core.errors import SO8TError

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs/train/quickstart.yaml")


def commands(command, path=()):
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


ALL = dict(commands(get_command(cli.app)))


def so8t(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "so8t_torch.cli", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(path) or "so8t")
def test_every_level_of_help_shows_an_example(path):
    result = CliRunner().invoke(cli.app, [*path, "--help"])
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "so8t" in result.output


def test_the_promised_commands_are_there():
    promised = ("train", "plan", "bake", "parity", "demo", "eval triage", "compress-embedding")
    promised += ("logits show", "logits compare", "generate", "convert", "convert-weights", "long-context")
    assert {tuple(name.split()) for name in promised} <= set(ALL)


def test_a_reserved_group_is_never_a_plain_command():
    assert not [name for name in cli.GROUPS if (name,) in ALL and not hasattr(ALL[(name,)], "commands")]


def test_the_printed_configuration_is_resolved_and_readable():
    result = CliRunner().invoke(cli.app, ["train", QUICKSTART, "--set", "seed=11", "--print-config"])
    assert result.exit_code == 0
    assert yaml.safe_load(result.output)["seed"] == 11


def test_an_unknown_key_names_the_nearest_one_and_fails_without_a_traceback():
    done = so8t("train", QUICKSTART, "--set", "sead=1", "--print-config")
    assert done.returncode == 1
    assert "did you mean 'seed'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_with_square_brackets_is_printed_whole(monkeypatch, capsys):
    text = f'expected {{"texts": [strings]}} or [/end] in {"/deep" * 30}'

    def fail():
        raise SO8TError(text)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 1
    assert capsys.readouterr().err == f"error: {text}\n"


def test_a_missing_configuration_is_named():
    done = so8t("plan", "absent.yaml")
    assert done.returncode == 1
    assert "absent.yaml" in done.stderr
