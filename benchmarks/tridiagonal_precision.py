"""Claim: in single precision the error of long chains does not depend on their length and grows like 1/Im z.

Chains of 65,536 sites with β ≥ 0, complex64 against complex128 from the same numbers, for some heights of z. For the
causal g and the full G_ii: the largest error of a site relative to that site / relative to the largest entry. For the
gradient of a random functional: relative to its largest entry. The last column is the causal g where β has either sign.

Run: python -m benchmarks.tridiagonal_precision
     python -m benchmarks.tridiagonal_precision --single   as if sweeps were carried in single precision
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from so8t_torch.ops import tridiagonal
from so8t_torch.ops.tridiagonal import eager

SITES, SEEDS = 65536, 3
HEIGHTS = (1.0, 0.1, 0.03, 0.01, 0.003, 0.001)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tridiagonal_precision")
    parser.add_argument("--single", action="store_true", help="carry sweeps of float32 in float32")
    carry = torch.complex64 if parser.parse_args(argv).single else eager.WIDE
    torch.set_num_threads(1)
    table = Table(title=f"error in float32, {SITES} sites, worst of {SEEDS} chains, carried in {carry}")
    for column in ("Im z", "causal g", "full G", "gradient of g", "gradient of G", "causal g, β of any sign"):
        table.add_column(column, justify="right")
    for height in HEIGHTS:
        worst = [max(column) for column in zip(*(errors_of(height, seed, carry) for seed in range(SEEDS)), strict=True)]
        causal, full, any_sign = (f"{by_site:.1e} / {by_chain:.1e}" for by_site, by_chain in pairs(worst[:6]))
        table.add_row(f"{height:g}", causal, full, *(f"{slope:.1e}" for slope in worst[6:8]), any_sign)
    Console(width=120).print(table)
    return 0


def pairs(numbers: list[float]) -> zip[tuple[float, float]]:
    """Return numbers two by two."""
    return zip(numbers[::2], numbers[1::2], strict=True)


def errors_of(height: float, seed: int, carry: torch.dtype) -> tuple[float, ...]:
    """Return two errors each of g, G and g with couplings of either sign, then those of the gradients of each."""
    generator = torch.Generator().manual_seed(seed)
    h, b, c = (torch.randn(size, generator=generator) for size in (SITES, SITES - 1, SITES - 1))
    weight = torch.randn(SITES, generator=generator, dtype=torch.complex64)
    z = torch.tensor(0.1 + height * 1j, dtype=torch.complex64)
    kinds = (("causal", h, b, b), ("full", h, b, b), ("causal", h, b, c))
    found = [errors(*chain, z, weight, carry) for chain in kinds]
    return *(number for by_site, by_chain, _ in found for number in (by_site, by_chain)), *(s for *_, s in found)


def errors(
    mode: str, h: Tensor, b: Tensor, c: Tensor, z: Tensor, weight: Tensor, carry: torch.dtype
) -> tuple[float, float, float]:
    """Return the largest error of a site, by site and by chain, and that of the gradient of Re ⟨weight, g⟩ for h."""
    with patch.object(eager, "WIDE", carry):
        g, slope = both(mode, h, b, c, z, weight)
    exact, exact_slope = both(mode, *(x.to(torch.promote_types(x.dtype, torch.float64)) for x in (h, b, c, z, weight)))
    wrong, size = (g - exact).abs(), exact.abs()
    by_chain = (slope - exact_slope).abs().max() / exact_slope.abs().max()
    return (wrong / size).max().item(), (wrong.max() / size.max()).item(), by_chain.item()


def both(mode: str, h: Tensor, b: Tensor, c: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return g and the gradient with respect to h."""
    h = h.clone().requires_grad_()
    g = tridiagonal.green(h, b, c, z, mode=mode)
    (slope,) = torch.autograd.grad(g, h, weight)
    return g.detach(), slope


if __name__ == "__main__":
    sys.exit(main())
