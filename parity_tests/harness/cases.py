"""One generated test: a pair, the check that judges it, and a readable name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from parity_tests.harness.environment import shape_checks
from parity_tests.harness.pair import OpPair
from so8t_torch.core.backend import interpreting


@dataclass(frozen=True, eq=False)
class Case:
    """One generated test.

    Attributes:
        pair: what is judged.
        check: name of the check.
        label: what tells this case from the others of its check: input, size, dtype.
        body: raises ParityError when the pair is red here.
        interpreted: runs only in a process started with ``TRITON_INTERPRET=1``.
        cuda: needs a CUDA device.
        shapes_checked: whether jaxtyping watches every annotated call meanwhile.
    """

    pair: OpPair
    check: str
    label: str
    body: Callable[[], None]
    interpreted: bool = False
    cuda: bool = False
    shapes_checked: bool = True

    @property
    def name(self) -> str:
        """``room.function-check-input-size-dtype``."""
        return f"{self.pair.name}-{self.check}-{self.label}" if self.label else f"{self.pair.name}-{self.check}"

    @property
    def known_gap(self) -> str | None:
        """The declared reason why this case is expected to fail, or ``None``."""
        rest = self.name.removeprefix(f"{self.pair.name}-") + "-"
        return next((why for start, why in self.pair.known_gaps.items() if rest.startswith(f"{start}-")), None)

    @property
    def unavailable(self) -> str | None:
        """Why this case cannot run on this machine, or ``None``."""
        if self.cuda and not torch.cuda.is_available():
            return "needs a CUDA device"
        if self.interpreted and not interpreting():
            return "needs a process started with TRITON_INTERPRET=1"
        return None

    def run(self) -> None:
        """Judge."""
        with shape_checks(enabled=self.shapes_checked):
            self.body()


Check = Callable[[OpPair], Iterator[Case]]
