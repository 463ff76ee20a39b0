"""Declarations of the room ``rotation``: scipy and dense block-diagonal matrices judge the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection, Size
from parity_tests.ops.rotation_inputs import (
    APPLY,
    COORDINATES,
    EYE,
    LAYER,
    UPPER,
    block_diagonal,
    channels,
    commutator,
    dense_apply,
    dense_cayley,
    dense_fold_output,
    dense_isometry,
    dense_logarithm,
    dense_skew,
    dense_unfold_output,
    dense_unskew,
    input_layer,
    matrix,
    moderate,
    nearly_half_turn,
    one_rotation,
    slight_rotation,
    two_coordinates,
    two_rotations,
    with_infinity,
)
from so8t_jax.ops import rotation as reference
from so8t_torch.core.errors import BackendError, DomainError, ShapeError
from so8t_torch.ops import rotation as production

ONE: tuple[Size, ...] = ({},)
BLOCKS: tuple[Size, ...] = ({"n": 1}, {"n": 8})
LAYERS: tuple[Size, ...] = ({"n": 1, "m": 1}, {"n": 3, "m": 2})


def orthogonal(f: Callable[..., Any], example: Example) -> Any:
    """RᵀR = I and det R = 1."""
    R = np.asarray(f(*example))
    return np.append(R.T @ R - EYE, np.linalg.det(R) - 1.0)


def inverse(f: Callable[..., Any], example: Example) -> Any:
    """R(A) R(−A) = I."""
    return np.asarray(f(example[0])) @ np.asarray(f(-example[0])) - EYE


def same_axes(f: Callable[..., Any], example: Example) -> Any:
    """exp(A/2)² = exp(A), relative to the error that the norm allows."""
    half = np.asarray(f(example[0] / 2))
    return (half @ half - np.asarray(f(example[0]))) / max(1.0, float(np.linalg.norm(example[0])))


def half_tangent(f: Callable[..., Any], example: Example) -> Any:
    """(R − I)(R + I)⁻¹ = A/2, multiplied out: R + I is singular nowhere."""
    R, A = np.asarray(f(*example)), dense_skew(example[0])
    return ((R - EYE) - A / 2 @ (R + EYE)) / max(1.0, float(np.linalg.norm(A)))


def logarithm_inverts(f: Callable[..., Any], example: Example) -> Any:
    """exp(log R) = R by scipy's exponential."""
    return scipy.linalg.expm(dense_skew(np.asarray(f(*example)))) - example[0]


def skew_law(f: Callable[..., Any], example: Example) -> Any:
    """A + Aᵀ = 0, and its upper triangle is the coordinates."""
    A = np.asarray(f(*example))
    return np.append((A + A.T).ravel(), A[UPPER] - example[0])


def gate_is_dense(f: Callable[..., Any], example: Example) -> Any:
    """Turning back by Rᵀ gives x again, and every block keeps its length; an infinity is left out."""
    R, x = example[0], np.nan_to_num(example[1], posinf=1.0)
    y = np.asarray(f(R, x))
    before, after = (np.linalg.norm(v.reshape(-1, 8), axis=1) for v in (x, y))
    return np.append(np.asarray(f(np.swapaxes(R, 1, 2), y)) - x, (after - before) / before)


def safe_first(f: Callable[..., Any], example: Example) -> Any:
    """(R_cmd R_safe) v = R_cmd (R_safe v)."""
    safe, cmd = example
    v = np.arange(1.0, 9.0) / 8.0
    return np.asarray(f(*example)) @ v - cmd @ (safe @ v)


def jacobi(f: Callable[..., Any], example: Example) -> Any:
    """[a, [b, c]] + [b, [c, a]] + [c, [a, b]] = 0, with c made of a and b; and [a, b] is the dense commutator."""
    a, b = example
    c = np.roll(a, 3) - b
    total = sum(np.asarray(f(x, np.asarray(f(y, z)))) for x, y, z in ((a, b, c), (b, c, a), (c, a, b)))
    A, B = dense_skew(a), dense_skew(b)
    size = float(np.linalg.norm(a) * np.linalg.norm(b) * np.linalg.norm(c))
    return np.append(total / size, (np.asarray(f(a, b)) - dense_unskew(A @ B - B @ A)) / size)


def symmetric_distance(f: Callable[..., Any], example: Example) -> Any:
    """The distance is that of the exchanged pair, and at least the commutator's share of it."""
    return np.asarray(f(*example)) - commutator(example[1], example[0])


def fold_is_the_gate(f: Callable[..., Any], example: Example) -> Any:
    """The folded layer gives the rotated outputs of the layer."""
    W, b, R = example
    h = np.cos(np.arange(W.shape[1]))
    folded, shift = f(W, b, R)
    gated = block_diagonal(R, W.shape[0]) @ (W @ h + (0.0 if b is None else b))
    return (np.asarray(folded) @ h + (0.0 if shift is None else np.asarray(shift)) - gated) / W.shape[1]


def fold_before(f: Callable[..., Any], example: Example) -> Any:
    """The folded layer gives the outputs of the layer on rotated inputs."""
    W, R = example
    h = np.cos(np.arange(W.shape[1]))
    return (np.asarray(f(W, R)) @ h - W @ (block_diagonal(R, W.shape[1]) @ h)) / W.shape[1]


def shapes(*sizes: tuple[int, ...]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Return a maker of zeros of the given shapes."""
    return lambda: tuple(torch.zeros(size) for size in sizes)


def bad_blocks(*first: tuple[int, ...]) -> tuple[Rejection, ...]:
    """Return the widths that apply refuses, with leading arguments of other shapes."""
    return (
        Rejection("width", shapes(*first, (1, 8, 8), (3, 12)), ShapeError, "divisible by 8, got 12"),
        Rejection("count", shapes(*first, (3, 8, 8), (3, 16)), ShapeError, "expected 2 rotations"),
        Rejection("matrix", shapes(*first, (2, 8, 7), (3, 16)), ShapeError, r"\(blocks, 8, 8\), got \(2, 8, 7\)"),
    )


def pair(name: str, oracle: Callable[..., Any] | None = None, **fields: Any) -> OpPair:
    """Declare one function of the room."""
    function = name.partition(":")[0]
    return OpPair(
        name=f"rotation.{name}",
        reference=getattr(reference, function),
        production=getattr(production, function),
        oracle=oracle,
        **fields,
    )


wrong_28 = Rejection("not_28", shapes((2, 27)), ShapeError, r"\(…, 28\), got \(2, 27\)")
wrong_8 = Rejection("not_8", shapes((2, 8, 7)), ShapeError, r"\(…, 8, 8\), got \(2, 8, 7\)")

# eps(float64) times the norm 50 of the largest block, times the few roundings of coordinates and squarings.
EXPONENTIAL = Budget(
    forward={"float64": 200.0, "float32": 2.0, "bfloat16": 1.0, "float16": 1.0},
    gradient={"float64": 400.0, "float32": 2.0, "bfloat16": 1.0, "float16": 1.0},
)
# One product of eight terms, one rounding below float64.
PRODUCT = Budget(forward=8.0, gradient=16.0)
# Near the identity R is known to eps of its unit diagonal, which is 1000 eps of the floor; far from it the principal
# logarithm loses eps / sin θ at the angle 0.1 below π, through two square roots.
LOGARITHM = Budget(forward=1000.0, gradient=1000.0, floor=1e-3)
MONITOR = Budget(forward=64.0, floor=1.0)

PAIRS: tuple[OpPair, ...] = (
    pair(
        "skew",
        dense_skew,
        inputs={"moderate": moderate},
        sizes=ONE,
        wrt=(0,),
        budget=Budget(forward=0.0, gradient=1.0),
        laws=(Law("skew", skew_law, 0.0),),
        rejections=(wrong_28,),
        bitwise_batch=True,
    ),
    pair(
        "unskew",
        dense_unskew,
        inputs={"matrix": matrix},
        sizes=ONE,
        wrt=(0,),
        budget=Budget(forward=1.0, gradient=1.0),
        rejections=(wrong_8,),
        bitwise_batch=True,
    ),
    pair(
        "exponential",
        lambda a: scipy.linalg.expm(dense_skew(a)),
        inputs=COORDINATES,
        sizes=ONE,
        wrt=(0,),
        budget=EXPONENTIAL,
        laws=(Law("orthogonal", orthogonal, 400.0), Law("inverse", inverse, 400.0), Law("half", same_axes, 100.0)),
        rejections=(wrong_28,),
    ),
    pair(
        "cayley",
        dense_cayley,
        inputs=COORDINATES,
        sizes=ONE,
        wrt=(0,),
        budget=Budget(
            forward={"float64": 100.0, "float32": 2.0, "bfloat16": 1.0, "float16": 1.0},
            gradient={"float64": 1000.0, "float32": 2.0, "bfloat16": 1.0, "float16": 1.0},
        ),
        laws=(
            Law("orthogonal", orthogonal, 400.0),
            Law("inverse", inverse, 400.0),
            Law("tangent", half_tangent, 100.0),
        ),
        rejections=(wrong_28,),
    ),
    pair(
        "logarithm",
        dense_logarithm,
        inputs={"turned": one_rotation, "slight": slight_rotation, "nearly_half_turn": nearly_half_turn},
        sizes=ONE,
        wrt=(0,),
        budget=LOGARITHM,
        laws=(Law("inverts", logarithm_inverts, 2000.0),),
        rejections=(
            wrong_8,
            Rejection("half_turn", lambda: (-torch.eye(8)[None],), DomainError, "below π"),
            Rejection("nan", lambda: (torch.full((1, 8, 8), torch.nan),), DomainError, "expected finite"),
        ),
    ),
    pair(
        "apply",
        dense_apply,
        inputs={**APPLY, "infinite": with_infinity},
        sizes=BLOCKS,
        shared=(0,),
        masters=(0,),
        wrt=(0, 1),
        budget=PRODUCT,
        nonfinite=("infinite",),
        backends=("triton",),
        backend_dtypes={"triton": ("float32", "bfloat16", "float16")},
        laws=(Law("gate", gate_is_dense, 64.0),),
        rejections=(
            *bad_blocks(),
            Rejection("backend", shapes((1, 8, 8), (3, 8)), BackendError, "unknown backend", {"backend": "cuda"}),
        ),
    ),
    pair(
        "compose",
        lambda safe, cmd: cmd @ safe,
        inputs={"turned": two_rotations},
        sizes=ONE,
        wrt=(0, 1),
        budget=PRODUCT,
        laws=(Law("safe_first", safe_first, 32.0),),
        rejections=(Rejection("not_8", shapes((8, 8), (8, 7)), ShapeError, "cmd of shape"),),
    ),
    pair(
        "bracket",
        lambda a, b: dense_unskew(dense_skew(a) @ dense_skew(b) - dense_skew(b) @ dense_skew(a)),
        inputs={"drawn": two_coordinates},
        sizes=ONE,
        wrt=(0, 1),
        budget=PRODUCT,
        laws=(Law("jacobi", jacobi, 32.0),),
        rejections=(Rejection("not_28", shapes((28,), (27,)), ShapeError, "b of shape"),),
    ),
    pair(
        "commutator_distance",
        commutator,
        inputs={"turned": two_rotations},
        sizes=ONE,
        wrt=(0, 1),
        budget=Budget(forward=16.0, gradient=64.0),
        laws=(Law("symmetric", symmetric_distance, 64.0),),
        rejections=(Rejection("not_8", shapes((8, 7), (8, 8)), ShapeError, "safe of shape"),),
    ),
    pair(
        "orthogonality_error",
        lambda R: np.abs(R.T @ R - EYE).max(),
        inputs={"any": matrix, "turned": one_rotation},
        sizes=ONE,
        budget=MONITOR,
        returns="float64",
        rejections=(wrong_8,),
    ),
    pair(
        "determinant_error",
        lambda R: np.abs(scipy.linalg.det(R) - 1.0),
        inputs={"any": matrix, "turned": one_rotation},
        sizes=ONE,
        budget=Budget(forward=512.0, floor=1.0),
        returns="float64",
        rejections=(wrong_8,),
    ),
    pair(
        "isometry_error",
        dense_isometry,
        inputs={
            "stretched": lambda g, size: (1.5 * channels(1.0)(g, size)[0], g.standard_normal(8 * size["n"])),
            "turned": channels(1.0),
            "zeros": lambda g, size: (channels(1.0)(g, size)[0], np.zeros(8 * size["n"])),
        },
        sizes=BLOCKS,
        shared=(0,),
        budget=MONITOR,
        returns="float64",
        rejections=bad_blocks(),
    ),
    pair(
        "fold_output",
        dense_fold_output,
        inputs=LAYER,
        sizes=LAYERS,
        shared=(2,),
        masters=(2,),
        wrt=(0, 1, 2),
        budget=PRODUCT,
        laws=(Law("gate", fold_is_the_gate, 32.0),),
        rejections=(
            Rejection("rows", lambda: (torch.zeros(12, 8), None, torch.zeros(1, 8, 8)), ShapeError, "divisible by 8"),
        ),
    ),
    pair(
        "unfold_output",
        dense_unfold_output,
        inputs=LAYER,
        sizes=LAYERS,
        shared=(2,),
        masters=(2,),
        wrt=(0, 1),
        budget=Budget(forward=32.0, gradient=32.0),
        rejections=(
            Rejection("rows", lambda: (torch.zeros(8, 8), None, torch.zeros(2, 8, 8)), ShapeError, "expected 1 rot"),
        ),
    ),
    pair(
        "fold_input",
        lambda W, R: W @ block_diagonal(R, W.shape[1]),
        inputs={"layer": input_layer},
        sizes=LAYERS,
        shared=(1,),
        masters=(1,),
        wrt=(0, 1),
        budget=PRODUCT,
        laws=(Law("gate", fold_before, 32.0),),
        rejections=(
            Rejection("columns", lambda: (torch.zeros(8, 12), torch.zeros(1, 8, 8)), ShapeError, "divisible by 8"),
        ),
    ),
    pair(
        "unfold_input",
        lambda W, R: W @ np.linalg.inv(block_diagonal(R, W.shape[1])),
        inputs={"layer": input_layer},
        sizes=LAYERS,
        shared=(1,),
        masters=(1,),
        wrt=(0,),
        budget=Budget(forward=32.0, gradient=32.0),
        rejections=(
            Rejection("columns", lambda: (torch.zeros(8, 8), torch.zeros(2, 8, 8)), ShapeError, "expected 1 rot"),
        ),
    ),
)
