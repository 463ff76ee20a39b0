"""Claim: the SO(8) gate is several times faster than PEFT's OFT and than torch.matrix_exp, exact, on a CPU.

Compared at T = 4096, D = 3072, block size 8, forward and backward from the trained numbers to dx:
our gate; PEFT OFT with its exact Cayley map and with its default truncated series; matrix_exp with an einsum in float32
(as PEFT computes; in bfloat16 also with a rotation rounded to bfloat16, which is cheaper and not orthogonal).
Also the exponential alone (384 blocks), and folding into a 3072 × 3072 layer against PEFT's merge and unmerge.

Run: python -m benchmarks.rotation
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch
from peft import OFTConfig, get_peft_model
from peft.tuners.oft.layer import OFTRotationModule

from benchmarks.harness import Case, Rival, run
from so8t_torch.ops import rotation

COMPONENT = ROOM = "rotation"
TOKENS, WIDTH = 4096, 3072
BLOCKS = WIDTH // 8


def cases() -> Iterator[Case]:
    """Yield every comparison; inputs are seeded."""
    torch.manual_seed(0)
    for dtype, must in ((torch.bfloat16, 6.0), (torch.float32, 2.5)):
        yield gate_case(dtype, must)
    yield exponential_case()
    yield from fold_cases()


def gate_case(dtype: torch.dtype, must: float) -> Case:
    """Return the gate's forward and backward against its rivals."""
    x = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(TOKENS, WIDTH, dtype=dtype)
    coordinates = (0.05 * torch.randn(BLOCKS, 28)).requires_grad_()

    def step(forward: Callable[[torch.Tensor], torch.Tensor], parameter: torch.Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(x), (x, parameter), cotangent)

    def ours(activations: torch.Tensor) -> torch.Tensor:
        return rotation.apply(rotation.exponential(coordinates), activations)

    def matrix_exp(activations: torch.Tensor, inside: torch.dtype = torch.float32) -> torch.Tensor:
        rotations = torch.linalg.matrix_exp(rotation.skew(coordinates)).to(inside)
        blocks = activations.view(TOKENS, BLOCKS, 8).to(inside)
        return torch.einsum("tni,noi->tno", blocks, rotations).reshape(TOKENS, WIDTH).to(dtype)

    exact, truncated = oft(use_cayley_neumann=False), oft(use_cayley_neumann=True)
    rivals = [
        Rival("so8t", step(ours, coordinates)),
        Rival("PEFT OFT exact", step(exact, exact.weight), must),
        Rival("PEFT OFT default", step(truncated, truncated.weight), must),
        Rival("matrix_exp + einsum", step(matrix_exp, coordinates), must),
    ]
    if dtype == torch.bfloat16:
        # not the same work: a rotation rounded to bfloat16 is off by 4e-3 and no longer orthogonal
        rounded = functools.partial(matrix_exp, inside=torch.bfloat16)
        rivals.append(Rival("matrix_exp rounded to bf16", step(rounded, coordinates)))
    return Case("gate fwd+bwd", f"{TOKENS}×{WIDTH}", str(dtype).removeprefix("torch."), tuple(rivals))


def oft(use_cayley_neumann: bool) -> OFTRotationModule:
    """Return PEFT's rotation of blocks of eight with small random numbers."""
    module = OFTRotationModule(BLOCKS, 28, 8, WIDTH, use_cayley_neumann=use_cayley_neumann)
    torch.nn.init.normal_(module.weight, std=0.025)
    return module


def exponential_case() -> Case:
    """Return the exponential of one layer's blocks, forward and backward."""
    coordinates = (0.3 * torch.randn(BLOCKS, 28)).requires_grad_()
    cotangent = torch.randn(BLOCKS, 8, 8)

    def step(chart: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(chart(coordinates), coordinates, cotangent)

    rivals = (
        Rival("so8t", step(rotation.exponential)),
        Rival("torch.matrix_exp", step(lambda c: torch.linalg.matrix_exp(rotation.skew(c))), must=2.0),
    )
    return Case("exp fwd+bwd", f"{BLOCKS}×8×8", "float32", rivals, repeats=101)


def fold_cases() -> Iterator[Case]:
    """Yield folding and unfolding a layer against PEFT's merge and unmerge of the same block structure."""
    plain = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH, bias=False))
    config = OFTConfig(target_modules=["0"], r=0, oft_block_size=8, use_cayley_neumann=False)
    layer = get_peft_model(plain, config).get_submodule("base_model.model.0")
    torch.nn.init.normal_(layer.oft_R["default"].weight, std=0.025)
    weight = torch.randn(WIDTH, WIDTH)
    with torch.no_grad():
        rotations = rotation.exponential(0.05 * torch.randn(BLOCKS, 28))

    def merge() -> None:
        layer.merged_adapters.clear()
        layer.merge()

    def unmerge() -> None:
        layer.merged_adapters[:] = ["default"]
        layer.unmerge()

    shape = f"{WIDTH}×{WIDTH}"
    with torch.no_grad():
        ours = Rival("so8t", lambda: rotation.fold_output(weight, None, rotations))
        yield Case("fold", shape, "float32", (ours, Rival("PEFT OFT merge", merge, must=5.0)), repeats=7)
        back = Rival("so8t", lambda: rotation.unfold_output(weight, None, rotations))
        yield Case("unfold", shape, "float32", (back, Rival("PEFT OFT unmerge", unmerge, must=12.0)), repeats=7)


if __name__ == "__main__":
    sys.exit(run("benchmarks.rotation"))
