"""The launch helper: the first tile where nothing can be timed, every argument by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from so8t_torch.core import launch as launching
from so8t_torch.core.backend import interpreting, triton_installed
from so8t_torch.core.launch import Tile, launch

INTERPRETED_PROGRAM = """
import torch, triton, triton.language as tl
from so8t_torch.core.launch import Tile, launch

@triton.jit
def double_kernel(x_ptr, count, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x_ptr + at, 2 * tl.load(x_ptr + at, mask=at < count), mask=at < count)

x = torch.arange(10.0)
tiles = Tile(warps=1, constants={"SIZE": 4}), Tile(warps=4, constants={"SIZE": 8})
launch(double_kernel, tiles, lambda tile: (triton.cdiv(10, tile["SIZE"]),), {"x_ptr": x, "count": 10}, ("count",))
assert torch.equal(x, 2 * torch.arange(10.0)), x
"""


class Recorder:
    """Stands for a compiled kernel and records how it was started."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.started.append((grid, arguments))


@pytest.mark.skipif(interpreting(), reason="this process interprets kernels")
def test_a_single_tile_is_started_with_its_own_options() -> None:
    kernel, tile = Recorder(), Tile(warps=2, stages=3, constants={"SIZE": 16})
    grid = lambda tile: (tile["SIZE"],)  # noqa: E731
    launch(kernel, (tile,), grid, {"x_ptr": 1})
    assert kernel.started == [(grid, {"x_ptr": 1, "SIZE": 16, "num_warps": 2, "num_stages": 3})]


@pytest.mark.skipif(not triton_installed() or interpreting(), reason="needs compiled Triton")
def test_several_tiles_become_the_configurations_of_one_tuner() -> None:
    import triton
    from triton.runtime.autotuner import Autotuner

    from so8t_torch.ops.rotation import kernels

    tuner = launching._tuned(kernels.forward_kernel, kernels.FORWARD_TILES, ("blocks",))
    assert isinstance(tuner, Autotuner)
    assert tuner is launching._tuned(kernels.forward_kernel, kernels.FORWARD_TILES, ("blocks",))
    found = [(c.num_warps, c.num_stages, c.kwargs) for c in tuner.configs]
    assert found == [(t.warps, t.stages, dict(t.constants)) for t in kernels.FORWARD_TILES]
    assert isinstance(kernels.forward_kernel, triton.runtime.JITFunction)


@pytest.mark.skipif(not triton_installed(), reason="needs Triton")
def test_under_the_interpreter_the_first_tile_runs(tmp_path: Any) -> None:
    program = tmp_path / "program.py"
    program.write_text(INTERPRETED_PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program)],
        env={"TRITON_INTERPRET": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
