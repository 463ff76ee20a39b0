"""The launch helper and its tuner: every argument by name, a tile timed once and kept, the first one elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from so8t_torch.core import launch as launching
from so8t_torch.core import tuning
from so8t_torch.core.backend import interpreting, triton_installed
from so8t_torch.core.errors import BackendError, ConfigError
from so8t_torch.core.launch import Tile, fixed_tile, launch
from so8t_torch.core.tuning import Tuner

INTERPRETED_PROGRAM = """
import torch, triton, triton.language as tl
from so8t_torch.core.launch import Tile, fixed_tile, launch

@triton.jit
def double_kernel(x_ptr, count, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(x_ptr + at, 2 * tl.load(x_ptr + at, mask=at < count), mask=at < count)

x = torch.arange(10.0)
tiles = Tile(warps=1, constants={"SIZE": 4}), Tile(warps=4, constants={"SIZE": 8})
sizes = []
def grid(tile):
    sizes.append(tile["SIZE"])
    return (triton.cdiv(10, tile["SIZE"]),)
launch(double_kernel, tiles, grid, {"x_ptr": x, "count": 10}, ("count",))
assert torch.equal(x, 2 * torch.arange(10.0)), x
with fixed_tile(1):
    launch(double_kernel, tiles, grid, {"x_ptr": x, "count": 10}, ("count",))
assert torch.equal(x, 4 * torch.arange(10.0)), x
assert sizes == [4, 8], sizes
"""
TILES = tuple(Tile(warps=w, stages=s, constants={"SIZE": 16 * w}) for w, s in ((1, 1), (2, 3), (4, 2)))
compiled_only = pytest.mark.skipif(interpreting(), reason="this process interprets kernels")


class Recorder:
    """Stands for a compiled kernel and records how it was started."""

    __module__ = "room.kernels"
    __name__ = "recorded_kernel"

    def __init__(self) -> None:
        self.started: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.started.append((grid, arguments))


class TooMuchError(Exception):
    """A tile needs more than the device has."""


def grid(_: Any) -> tuple[int, ...]:
    return (1,)


def by_warps(times: dict[int, float], ran: list[int]) -> tuple[Callable[[Tile], None], Callable[..., float]]:
    """Return a kernel that notes its tile and a timer that looks the time of that tile up; a missing time fails."""

    def run(tile: Tile) -> None:
        ran.append(tile.warps)
        if tile.warps not in times:
            raise TooMuchError("shared memory")

    def timer(call: Callable[[], None]) -> float:
        call()
        return times[ran[-1]]

    return run, timer


def tuner(path: Path, times: dict[int, float], ran: list[int], device: str = "card sm_90") -> tuple[Tuner, Any]:
    run, timer = by_warps(times, ran)
    return Tuner(device, path, timer, (TooMuchError,)), run


@compiled_only
def test_a_single_tile_is_started_with_its_own_options() -> None:
    kernel, tile = Recorder(), Tile(warps=2, stages=3, constants={"SIZE": 16})
    launch(kernel, (tile,), grid, {"x_ptr": 1})
    assert kernel.started == [(grid, {"x_ptr": 1, "SIZE": 16, "num_warps": 2, "num_stages": 3})]


@compiled_only
def test_without_a_device_the_first_tile_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "device_tuner", lambda: None)
    kernel = Recorder()
    launch(kernel, TILES, grid, {"n": 3}, ("n",))
    assert [arguments["num_warps"] for _, arguments in kernel.started] == [1]


@compiled_only
def test_with_a_device_the_fastest_tile_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = Recorder()
    seconds = {1: 3.0, 2: 1.0, 4: 2.0}

    def timer(call: Callable[[], None]) -> float:
        call()
        return seconds[kernel.started[-1][1]["num_warps"]]

    found = Tuner("card", tmp_path / "tiles.json", timer)
    monkeypatch.setattr(launching, "device_tuner", lambda: found)
    for _ in range(2):
        launch(kernel, TILES, grid, {"n": 3}, ("n",))
    assert [arguments["num_warps"] for _, arguments in kernel.started] == [1, 2, 4, 2, 2]


@compiled_only
def test_a_fixed_tile_is_neither_timed_nor_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "device_tuner", lambda: pytest.fail("nothing is to be timed"))
    kernel = Recorder()
    for index in (0, 1, 9):
        with fixed_tile(index):
            launch(kernel, TILES, grid, {"n": 3}, ("n",))
    assert [arguments["num_warps"] for _, arguments in kernel.started] == [1, 2, 4]
    with pytest.raises(ConfigError, match="0 or more, got -1"), fixed_tile(-1):
        pass


def test_a_choice_depends_on_buckets_dtypes_and_which_operands_are_given() -> None:
    def key(n: int, dtype: torch.dtype = torch.float32, sign: Any = None, wide: bool = False) -> str:
        arguments = {"x_ptr": torch.zeros(1, dtype=dtype), "sign_ptr": sign, "n": n, "stride": n, "WIDE": wide}
        return tuning.key(Recorder(), arguments, ("n",))

    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert key(65) == key(100) == key(128)
    different = [key(64), key(65), key(64, torch.float64), key(64, sign=torch.zeros(1)), key(64, wide=True)]
    assert len(set(different)) == len(different)
    assert key(64).startswith("room.kernels.recorded_kernel n=64 float32")


def test_a_choice_is_kept_for_this_device_and_no_other(tmp_path: Path) -> None:
    path, ran = tmp_path / "so8t" / "tiles.json", list[int]()
    times = {1: 3.0, 2: 2.0, 4: 1.0}
    first, run = tuner(path, times, ran)
    assert first.choose("kernel n=64", TILES, run) is TILES[2]
    assert first.choose("kernel n=64", TILES, run) is TILES[2]
    assert ran == [1, 2, 4]
    again, run = tuner(path, times, ran)
    assert again.choose("kernel n=64", TILES, run) is TILES[2]
    assert ran == [1, 2, 4], "a kept choice is not timed again"
    assert again.choose("kernel n=128", TILES, run) is TILES[2]
    other, run = tuner(path, {1: 1.0, 2: 2.0, 4: 3.0}, ran, device="another card sm_86")
    assert other.choose("kernel n=64", TILES, run) is TILES[0]
    assert {device: sorted(names) for device, names in json.loads(path.read_text()).items()} == {
        "card sm_90": ["kernel n=128", "kernel n=64"],
        "another card sm_86": ["kernel n=64"],
    }


def test_a_kept_tile_that_the_table_has_no_more_is_timed_again(tmp_path: Path) -> None:
    path, ran = tmp_path / "tiles.json", list[int]()
    first, run = tuner(path, {1: 3.0, 2: 2.0, 4: 1.0}, ran)
    first.choose("kernel", TILES, run)
    again, run = tuner(path, {1: 3.0, 2: 2.0}, ran)
    assert again.choose("kernel", TILES[:2], run) is TILES[1]


@pytest.mark.parametrize("text", ["{", "[1]", '{"card sm_90": 3}', '{"card sm_90": {"kernel": [1, 2]}}', "\x00\xff"])
def test_a_damaged_file_is_timed_again_and_replaced(
    tmp_path: Path, text: str, recwarn: pytest.WarningsRecorder
) -> None:
    path, ran = tmp_path / "tiles.json", list[int]()
    path.write_bytes(text.encode("latin-1"))
    found, run = tuner(path, {1: 3.0, 2: 2.0, 4: 1.0}, ran)
    assert found.choose("kernel", TILES, run) is TILES[2]
    assert json.loads(path.read_text())["card sm_90"]["kernel"] == {"warps": 4, "stages": 2, "constants": {"SIZE": 64}}
    assert len(recwarn) <= 1


def test_a_place_that_cannot_be_written_costs_one_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    ran: list[int] = []
    found, run = tuner(blocked / "so8t" / "tiles.json", {1: 3.0, 2: 2.0, 4: 1.0}, ran)
    with pytest.warns(RuntimeWarning, match="tile choices") as caught:
        chosen = [found.choose(name, TILES, run) for name in ("kernel a", "kernel b")]
    assert chosen == [TILES[2], TILES[2]]
    assert len(caught) == 1


def test_a_tile_that_does_not_fit_is_passed_over_and_none_is_an_error(tmp_path: Path) -> None:
    ran: list[int] = []
    found, run = tuner(tmp_path / "tiles.json", {1: 3.0, 4: 5.0}, ran)
    assert found.choose("kernel", TILES, run) is TILES[0]
    found, run = tuner(tmp_path / "tiles.json", {}, ran)
    with pytest.raises(BackendError, match=r"no tile of its table runs on card sm_90(?s:.*)shared memory"):
        found.choose("another kernel", TILES, run)


def test_what_a_kernel_adds_to_is_put_back_between_timings(tmp_path: Path) -> None:
    total = torch.full((3,), 7.0)
    seen = []

    def run(tile: Tile) -> None:
        seen.append(total.clone())
        total.add_(tile.warps)

    def timer(call: Callable[[], None]) -> float:
        call()
        call()
        return 1.0

    found = Tuner("card", tmp_path / "tiles.json", timer)
    found.choose("kernel", TILES, run, (total,))
    assert len(seen) == 6
    assert all(torch.equal(x, torch.full((3,), 7.0)) for x in (*seen, total))


def test_choices_lie_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.choices_path() == tmp_path / "so8t" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.choices_path() == Path.home() / ".cache" / "so8t" / "tiles.json"


@pytest.mark.skipif(not triton_installed(), reason="needs Triton")
def test_under_the_interpreter_the_first_or_the_fixed_tile_runs(tmp_path: Path) -> None:
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
