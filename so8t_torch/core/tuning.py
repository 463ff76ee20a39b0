"""Which tile of a kernel's table runs: timed once per kernel, bucket of shapes, dtypes and mode, and remembered.

Choices are kept in memory and in ``so8t/tiles.json`` of the user's cache folder, under the device's name, its compute
capability and the version of Triton. A file that cannot be read or written costs one warning and another timing,
never an error. Every tile of a table computes the same sums, so that a choice changes how fast, not what.
"""

from __future__ import annotations

import functools
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from so8t_torch.core.errors import BackendError

Timer = Callable[[Callable[[], None]], float]


@dataclass(frozen=True, eq=False)
class Tile:
    """One way to run a kernel.

    Attributes:
        warps: warps of 32 threads per program.
        stages: depth of software pipelining.
        constants: the kernel's ``tl.constexpr`` sizes.
    """

    warps: int
    stages: int = 1
    constants: Mapping[str, int] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Return what the file of choices holds of it."""
        return {"warps": self.warps, "stages": self.stages, "constants": dict(self.constants)}


def bucket(size: int) -> int:
    """Return the next power of two, so that sizes near each other share a choice."""
    return 1 << max(size - 1, 0).bit_length()


def key(kernel: Any, arguments: Mapping[str, Any], tune_on: Sequence[str]) -> str:
    """Return what a choice depends on: kernel, bucketed shape, dtypes, and which flags and operands are given."""
    shape = [f"{name}={bucket(arguments[name])}" for name in tune_on]
    dtypes = [str(x.dtype).removeprefix("torch.") for x in arguments.values() if isinstance(x, Tensor)]
    mode = [f"{name}={x}" for name, x in arguments.items() if x is None or isinstance(x, bool | str)]
    return " ".join([f"{kernel.__module__}.{kernel.__name__}", *shape, *dtypes, *mode])


class Tuner:
    """Choices of one device.

    Args:
        device: what the choices hold for, e.g. name, capability and compiler version.
        path: the file that keeps them.
        timer: returns how long a call takes, in any unit.
        failures: what a tile raises that needs more than the device has.
    """

    def __init__(self, device: str, path: Path, timer: Timer, failures: tuple[type[Exception], ...] = ()) -> None:
        self.device, self.path, self.timer, self.failures = device, path, timer, failures
        self._chosen: dict[str, Tile] = {}
        self._warned = False

    def choose(
        self, name: str, tiles: Sequence[Tile], run: Callable[[Tile], None], restore: Sequence[Tensor] = ()
    ) -> Tile:
        """Return the tile for ``name``: remembered, else read from the file, else the fastest one.

        Args:
            name: what the choice depends on, from ``key``.
            tiles: the table.
            run: starts the kernel with a tile.
            restore: tensors that the kernel adds to; they hold the same numbers after the timing as before.

        Raises:
            BackendError: no tile of the table runs on this device.
        """
        known = self._chosen.get(name)
        if known is None or known not in tiles:
            known = self._read(name, tiles)
            if known is None:
                known = self._fastest(name, tiles, run, restore)
                self._write(name, known)
            self._chosen[name] = known
        return known

    def _fastest(
        self, name: str, tiles: Sequence[Tile], run: Callable[[Tile], None], restore: Sequence[Tensor]
    ) -> Tile:
        before = [x.clone() for x in restore]
        times, reasons = [], []
        for tile in tiles:
            try:
                times.append(self.timer(functools.partial(_from_start, run, tile, restore, before)))
            except self.failures as error:
                times.append(math.inf)
                reasons.append(f"  {tile.described()}: {error}")
        _put_back(restore, before)
        if len(reasons) == len(tiles):
            raise BackendError(f"{name}: no tile of its table runs on {self.device}.\n" + "\n".join(reasons))
        return tiles[times.index(min(times))]

    def _read(self, name: str, tiles: Sequence[Tile]) -> Tile | None:
        """Return the recorded tile, or nothing where there is none or the table has it no more."""
        recorded = self._recorded().get(self.device)
        wanted = recorded.get(name) if isinstance(recorded, dict) else None
        return next((tile for tile in tiles if tile.described() == wanted), None)

    def _recorded(self) -> dict[str, Any]:
        try:
            tree = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"the tile choices in {self.path} cannot be read ({error}); timing again.")
            return {}
        if not isinstance(tree, dict):
            self._warn(f"expected an object in {self.path}, got {type(tree).__name__}; timing again.")
            return {}
        return tree

    def _write(self, name: str, tile: Tile) -> None:
        tree = self._recorded()
        mine = tree.get(self.device)
        tree[self.device] = {**(mine if isinstance(mine, dict) else {}), name: tile.described()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump(tree, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)
        except OSError as error:
            self._warn(f"the tile choices cannot be kept in {self.path} ({error}); the next process times again.")

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, RuntimeWarning, stacklevel=2)


def _from_start(run: Callable[[Tile], None], tile: Tile, restore: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    _put_back(restore, before)
    run(tile)


def _put_back(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    for x, saved in zip(tensors, before, strict=True):
        x.copy_(saved)


def choices_path() -> Path:
    """Return where choices are kept: ``$XDG_CACHE_HOME/so8t/tiles.json``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "so8t" / "tiles.json"


def device_tuner() -> Tuner | None:
    """Return the tuner of the current CUDA device; nothing without one, and while a CUDA graph is being captured."""
    if not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return None
    return _tuner(torch.cuda.current_device())


@functools.cache
def _tuner(index: int) -> Tuner:
    import triton
    from triton.runtime.errors import OutOfResources, PTXASError

    properties = torch.cuda.get_device_properties(index)
    device = f"{properties.name} sm_{properties.major}{properties.minor} triton {triton.__version__}"
    timer = functools.partial(triton.testing.do_bench, warmup=5, rep=20, return_mode="median")
    return Tuner(device, choices_path(), timer, (OutOfResources, PTXASError))
