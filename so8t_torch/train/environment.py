"""What a run ran on: versions, code, processor, device, threads. Written once into the run folder."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("so8t", "torch", "triton", "numpy", "transformers", "peft", "accelerate", "tokenizers"),
    *("safetensors", "bitsandbytes", "trl", "datasets"),
)


def environment(seed: int) -> dict[str, Any]:
    """Return package versions (``None`` where absent), git commit, Python, processor, device, threads and seed."""
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "git": git_state(Path(__file__)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "devices": max(1, torch.cuda.device_count()),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def processor() -> str:
    """Return the name that the processor gives itself, or its kind where the system does not tell."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def version(package: str) -> str | None:
    """Return the installed version of a distribution, or ``None``."""
    found = next(iter(importlib.metadata.distributions(name=package)), None)
    return None if found is None else found.version


def git_state(source: Path) -> dict[str, Any] | None:
    """Return commit and whether tracked files were changed, or ``None`` where ``source`` is in no git checkout.

    A file that git does not track (an installed copy inside somebody's repository) counts as in none.
    """
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    changed = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": _git(source.parent, "rev-parse", "HEAD"), "changed": bool(changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:  # git itself is not installed
        return None
    return done.stdout.strip() if done.returncode == 0 else None
