"""What the README tells a user to do from outside the repository works, and a broken op of theirs is red."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent / "README.md"
SOUND_LINE = "return (high / torch.sqrt(1 + (high / limit) ** 2)).to(x.dtype)"
WRONG_LINE = "return (high / torch.sqrt(1 + (high / limit.detach()) ** 2)).to(x.dtype)"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    blocks = re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for name, text in blocks:
        (folder / name).write_text(text, encoding="utf-8")
    assert {name for name, _ in blocks} == {"my_ops.py", "test_my_ops.py"}
    sound = (folder / "my_ops.py").read_text(encoding="utf-8")
    assert sound.count(SOUND_LINE) == 1
    (folder / "my_broken_ops.py").write_text(sound.replace(SOUND_LINE, WRONG_LINE), encoding="utf-8")
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_sound_op_is_green_on_the_command_line(example: Path) -> None:
    done = python(example, "-m", "parity_tests", "--module", "my_ops:PAIRS", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all green" in done.stdout
    assert "mine.soft_clip" in done.stdout


def test_sound_op_is_green_in_pytest(example: Path) -> None:
    done = python(example, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_ops.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d passed", done.stdout)
    assert "skipped" not in done.stdout


def test_broken_op_is_red(example: Path) -> None:
    done = python(example, "-m", "parity_tests", "--module", "my_broken_ops:PAIRS")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "RED" in done.stdout
    assert "gradient of argument 1" in done.stdout
