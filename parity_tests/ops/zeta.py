"""Declarations of the room ``zeta``: mpmath's zeros, loops over entries and scipy's QR judge the definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection, Size
from parity_tests.ops import zeta_inputs as judge
from so8t_jax.ops import zeta as reference
from so8t_torch.core.errors import ConfigError, DomainError, ShapeError
from so8t_torch.ops import zeta as production

SAMPLED = (1, 2, 3, 64, 127, 511, 800, 1023, 1024)
FEW: tuple[Size, ...] = ({"n": 1}, {"n": 2}, {"n": 30})


def on_the_line_law(f: Any, example: Example) -> np.ndarray:
    """Z vanishes at every sampled zero: the correction of Newton's method is rounding."""
    gamma = np.asarray(f(*example))
    sampled = [float(gamma[k - 1]) for k in SAMPLED if k <= len(gamma)]
    return np.array([judge.newton_correction(height) / height for height in sampled])


def smooth_count_law(f: Any, example: Example) -> np.ndarray:
    """Beyond the exact zeros u ln u − u = n − 11/8 with u = γ/2π."""
    gamma = np.asarray(f(*example))
    n = np.arange(1025.0, len(gamma) + 1.0)
    u = gamma[1024:] / (2.0 * math.pi)
    return np.asarray((u * np.log(u) - u - (n - 1.375)) / (u * np.log(u)))


def increasing_law(f: Any, example: Example) -> np.ndarray:
    """Every zero is larger than the one before, in the table, beyond it and in between."""
    return np.asarray(np.minimum(np.diff(np.asarray(f(*example)), prepend=0.0) - 0.1, 0.0))


def spectrum_law(f: Any, example: Example) -> np.ndarray:
    """The singular values of the weight are in the ratios γ_1/γ_j."""
    found = np.linalg.svd(np.asarray(f(*example)), compute_uv=False)
    gamma = judge.first_zeros(len(found))
    return np.asarray(found / found[0] - gamma[0] / gamma)


def spectral_norm_law(f: Any, example: Example) -> np.ndarray:
    """‖W‖₂ is the gain."""
    return np.asarray(np.linalg.norm(np.asarray(f(*example)), 2) / 0.5 - 1.0)


def counted_pair(function: str, oracle: Any, sizes: tuple[Size, ...], budget: Budget, **more: Any) -> OpPair:
    """Declare a function of n."""
    return OpPair(
        name=f"zeta.{function}",
        reference=getattr(reference, function),
        production=getattr(production, function),
        oracle=oracle,
        inputs={"counted": judge.counted},
        sizes=sizes,
        dtypes=("float64",),
        returns="float64",
        budget=budget,
        rejections=(
            Rejection("none", lambda: (0,), ConfigError, "whole number n ≥ 1"),
            Rejection("fraction", lambda: (2.5,), ConfigError, "got 2.5"),
        ),
        **more,
    )


def frequency_pair(variant: str, **keywords: Any) -> OpPair:
    """Declare the frequencies with some options."""
    one = (1,)
    return OpPair(
        name=f"zeta.frequencies{variant}",
        reference=reference.frequencies,
        production=production.frequencies,
        oracle=judge.frequencies_by_zero,
        inputs={"counted": judge.counted},
        sizes=FEW,
        dtypes=("float64",),
        returns="float64",
        keywords=keywords,
        budget=Budget(forward=8.0),
        rejections=()
        if keywords
        else (
            Rejection("mode", lambda: one, ConfigError, "'inverse' or 'direct'", {"mode": "log"}),
            Rejection("aliased", lambda: one, ConfigError, "positions are aliased", {"omega_max": 2.0}),
            Rejection("still", lambda: one, ConfigError, r"\(0, π/2\]", {"omega_max": 0.0}),
            Rejection("power", lambda: one, ConfigError, "power > 0", {"power": 0.0}),
        ),
    )


def embedding_pair(variant: str, highest: float, budget: Budget, **keywords: Any) -> OpPair:
    """Declare the embedding of positions below a number with some options."""
    four = torch.arange(4.0)
    return OpPair(
        name=f"zeta.embedding{variant}",
        reference=reference.embedding,
        production=production.embedding,
        oracle=judge.embedding_by_entry,
        inputs={
            "fractions": judge.positions(highest, whole=False),
            "whole": judge.positions(highest, whole=True),
        },
        sizes=({"T": 2, "D": 2}, {"T": 5, "D": 1}, {"T": 7, "D": 33}),
        wrt=(0,),
        keywords=keywords,
        budget=budget,
        bitwise_batch=True,
        rejections=()
        if keywords
        else (
            Rejection("width", lambda: (four, 0), ConfigError, "width ≥ 1"),
            Rejection("no_axis", lambda: (torch.tensor(1.0), 4), ShapeError, r"positions \(\.\.\., T\)"),
            Rejection("complex", lambda: (four * 1j, 4), DomainError, "numbers of tokens"),
            Rejection("mode", lambda: (four, 4), ConfigError, "'inverse' or 'direct'", {"mode": "log"}),
        ),
    )


def weight_pair(variant: str, laws: tuple[Law, ...], **keywords: Any) -> OpPair:
    """Declare the initialiser with some options."""
    square = (torch.eye(3), torch.eye(3))
    return OpPair(
        name=f"zeta.linear_init{variant}",
        reference=reference.linear_init,
        production=production.linear_init,
        oracle=judge.weight_by_scipy,
        inputs={"noise": judge.noise},
        sizes=({"m": 1, "n": 1}, {"m": 5, "n": 3}, {"m": 6, "n": 24}),
        keywords=keywords,
        # Two routines of QR differ by the condition number of the noise; below float64 one rounding remains.
        budget=Budget(forward={"float64": 64.0, "float32": 1.0, "bfloat16": 1.0, "float16": 1.0}),
        laws=laws,
        rejections=()
        if keywords
        else (
            Rejection("rank", lambda: (torch.eye(3), torch.zeros(4, 2)), ShapeError, r"r = min\(m, n\)"),
            Rejection("axes", lambda: (torch.zeros(3), torch.eye(3)), ShapeError, r"\(\.\.\., m, r\)"),
            Rejection("dtypes", lambda: (torch.eye(3), torch.eye(3).double()), DomainError, "one real floating dtype"),
            Rejection("mode", lambda: square, ConfigError, "'frobenius' or 'spectral'", {"mode": "nuclear"}),
            Rejection("gain", lambda: square, ConfigError, "gain > 0", {"gain": 0.0}),
        ),
    )


# An angle is as wrong as its product: half an eps of it, and as much again for its frequency; below float64 it is
# exact enough for one rounding.
NEAR = Budget(
    forward={"float64": 256.0, "float32": 1.0, "bfloat16": 1.0, "float16": 1.0},
    gradient={"float64": 256.0, "float32": 2.0, "bfloat16": 2.0, "float16": 2.0},
)
FAR = Budget(
    forward={"float64": 2.0**18, "float32": 1.0, "bfloat16": 1.0, "float16": 1.0},
    gradient={"float64": 2.0**18, "float32": 2.0, "bfloat16": 2.0, "float16": 2.0},
)

PAIRS: tuple[OpPair, ...] = (
    counted_pair(
        "zeros", judge.first_zeros, FEW, Budget(forward=4.0), laws=(Law("on_the_line", on_the_line_law, 8.0),)
    ),
    OpPair(
        name="zeta.zeros:all",
        reference=reference.zeros,
        production=production.zeros,
        inputs={"counted": judge.counted},
        sizes=({"n": 1100},),
        dtypes=("float64",),
        returns="float64",
        # The definition sums 700 terms with phases up to 10⁴ radians at the last zeros: 10⁻¹², 3 eps of the largest.
        budget=Budget(forward=16.0),
        laws=(
            Law("on_the_line", on_the_line_law, 32.0),
            Law("smooth_count", smooth_count_law, 16.0),
            Law("increasing", increasing_law, 0.0),
        ),
    ),
    # 7/8 and a logarithm of opposite sign cancel in x_1
    counted_pair("unfolded", judge.smooth_counts, FEW, Budget(forward=8.0, floor=1.0)),
    counted_pair("basis", judge.frame, ({"n": 1}, {"n": 2}, {"n": 5}, {"n": 32}), Budget(forward=128.0)),
    frequency_pair(""),
    frequency_pair(":gentle", omega_max=1.0, power=0.5),
    frequency_pair(":inverse", mode="inverse"),
    frequency_pair(":direct", mode="direct"),
    embedding_pair("", 64.0, NEAR),
    embedding_pair(":far", 60000.0, FAR, scale=0.5, power=0.75),
    counted_pair(
        "singular_values",
        lambda n: judge.zero(1) / judge.first_zeros(n),
        FEW,
        Budget(forward=8.0),
    ),
    weight_pair("", (Law("spectrum", spectrum_law, 256.0),)),
    weight_pair(":spectral", (Law("norm", spectral_norm_law, 64.0),), gain=0.5, mode="spectral"),
)
