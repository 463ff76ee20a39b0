"""Declarations of the room ``rotation``: scipy and dense block-diagonal matrices judge the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch

from parity_tests.harness.pair import Budget, Example, Law, OpPair, Rejection, Size, Strategy
from so8t_jax.ops import rotation as reference
from so8t_torch.core.errors import BackendError, DomainError, ShapeError
from so8t_torch.ops import rotation as production

UPPER = np.triu_indices(8, 1)
EYE = np.eye(8)
ONE: tuple[Size, ...] = ({},)
BLOCKS: tuple[Size, ...] = ({"n": 1}, {"n": 8})
LAYERS: tuple[Size, ...] = ({"n": 1, "m": 1}, {"n": 3, "m": 2})


def dense_skew(a: np.ndarray) -> np.ndarray:
    """Return the skew matrix of 28 coordinates, one entry at a time."""
    A = np.zeros((8, 8))
    for value, i, j in zip(a, *UPPER, strict=True):
        A[i, j], A[j, i] = value, -value
    return A


def dense_unskew(M: np.ndarray) -> np.ndarray:
    """Return the 28 coordinates of (M − Mᵀ)/2."""
    return np.asarray([(M[i, j] - M[j, i]) / 2 for i, j in zip(*UPPER, strict=True)])


def dense_cayley(a: np.ndarray) -> np.ndarray:
    """Return (I − A/2)⁻¹(I + A/2) by scipy's solver."""
    A = dense_skew(a)
    return np.asarray(scipy.linalg.solve(EYE - A / 2, EYE + A / 2))


def dense_logarithm(R: np.ndarray, cut_margin: float = 1e-3) -> np.ndarray:
    """Return the skew part of scipy's principal logarithm."""
    del cut_margin
    return dense_unskew(np.real(scipy.linalg.logm(R)))


def block_diagonal(R: np.ndarray, channels: int) -> np.ndarray:
    """Return the D × D matrix with the rotations on its diagonal."""
    blocks = channels // 8
    return np.asarray(scipy.linalg.block_diag(*(R if len(R) == blocks else [R[0]] * blocks)))


def dense_apply(R: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the product with the dense matrix, leaving out what lies beside its blocks, where 0·∞ would be NaN."""
    beside = np.kron(np.eye(x.size // 8), np.ones((8, 8))) == 0
    return np.where(beside, 0.0, block_diagonal(R, x.size) * np.where(beside, 0.0, x)).sum(axis=1)


def dense_fold_output(W: np.ndarray, b: np.ndarray | None, R: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the products with the dense block-diagonal matrix."""
    D = block_diagonal(R, W.shape[0])
    return D @ W, None if b is None else D @ b


def dense_unfold_output(W: np.ndarray, b: np.ndarray | None, R: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the products with the inverse of the dense block-diagonal matrix."""
    D = np.linalg.inv(block_diagonal(R, W.shape[0]))
    return D @ W, None if b is None else D @ b


def dense_isometry(R: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the largest relative change of length, block by block."""
    y = block_diagonal(R, x.size) @ x
    pairs = [(np.linalg.norm(y[k : k + 8]), np.linalg.norm(x[k : k + 8])) for k in range(0, x.size, 8)]
    return np.asarray(max(abs(after / before - 1) if before else 0.0 for after, before in pairs))


def commutator(safe: np.ndarray, cmd: np.ndarray) -> np.ndarray:
    """Return the Frobenius norm of R_c R_s R_c⁻¹ R_s⁻¹ − I, with inverses by LU."""
    return np.asarray(np.linalg.norm(cmd @ safe @ np.linalg.inv(cmd) @ np.linalg.inv(safe) - EYE))


def of_norm(direction: np.ndarray, norm: float) -> np.ndarray:
    """Return a skew matrix's coordinates scaled to the largest angle ``norm``."""
    return np.asarray(direction * norm / np.linalg.norm(dense_skew(direction), 2))


def mixed(generator: np.random.Generator, _: Size) -> Example:
    """Draw coordinates whose largest angle is anywhere between 1e-8 and 50, so that a batch mixes all."""
    return (of_norm(generator.standard_normal(28), 10.0 ** generator.uniform(-8.0, np.log10(50.0))),)


def moderate(generator: np.random.Generator, _: Size) -> Example:
    """Draw coordinates whose largest angle is between 0.1 and 3."""
    return (of_norm(generator.standard_normal(28), generator.uniform(0.1, 3.0)),)


def in_planes(generator: np.random.Generator, angles: np.ndarray) -> np.ndarray:
    """Return the coordinates of given angles in four random orthogonal planes."""
    Q = np.linalg.qr(generator.standard_normal((8, 8)))[0]
    A = np.zeros((8, 8))
    for k, angle in enumerate(angles):
        A[2 * k, 2 * k + 1], A[2 * k + 1, 2 * k] = angle, -angle
    return dense_unskew(Q @ A @ Q.T)


def repeated(generator: np.random.Generator, _: Size) -> Example:
    """Draw equal angles in all four planes, or in two of them with none in the others."""
    angle = generator.uniform(0.1, 3.0)
    return (in_planes(generator, np.array([angle, angle, 0.0, 0.0] if generator.uniform() < 0.5 else [angle] * 4)),)


def near_pi(generator: np.random.Generator, _: Size) -> Example:
    """Draw one angle within 0.01 of π, where the two charts are far apart."""
    return (in_planes(generator, np.array([np.pi - 0.01 * generator.uniform(), 1.0, 0.3, 0.0])),)


def zeros(_: np.random.Generator, __: Size) -> Example:
    """Return the identity's coordinates."""
    return (np.zeros(28),)


COORDINATES: dict[str, Strategy] = {
    "moderate": moderate,
    "mixed": mixed,
    "repeated": repeated,
    "near_pi": near_pi,
    "zeros": zeros,
}


def rotations(generator: np.random.Generator, count: int, angle: float = 2.0) -> np.ndarray:
    """Draw rotations by scipy."""
    draws = (of_norm(generator.standard_normal(28), angle * generator.uniform(0.2, 1.0)) for _ in range(count))
    return np.stack([scipy.linalg.expm(dense_skew(a)) for a in draws])


def one_rotation(generator: np.random.Generator, _: Size) -> Example:
    """Draw a rotation by at most two radians."""
    return (rotations(generator, 1)[0],)


def slight_rotation(generator: np.random.Generator, _: Size) -> Example:
    """Draw a rotation near the identity."""
    return (rotations(generator, 1, 1e-3)[0],)


def nearly_half_turn(generator: np.random.Generator, _: Size) -> Example:
    """Draw a rotation with one angle 0.1 below π."""
    return (scipy.linalg.expm(dense_skew(in_planes(generator, np.array([np.pi - 0.1, 1.0, 1.0, 0.0])))),)


def two_rotations(generator: np.random.Generator, _: Size) -> Example:
    """Draw two rotations."""
    return tuple(rotations(generator, 2))


def two_coordinates(generator: np.random.Generator, _: Size) -> Example:
    """Draw two elements of so(8)."""
    return tuple(generator.standard_normal((2, 28)))


def matrix(generator: np.random.Generator, _: Size) -> Example:
    """Draw any matrix."""
    return (generator.standard_normal((8, 8)),)


def channels(angle: float, shared: bool = False) -> Strategy:
    """Return a strategy for rotations and one vector of channels."""

    def draw(generator: np.random.Generator, size: Size) -> Example:
        # the rotations have no batch axis, so that they depend on the size alone
        R = rotations(np.random.default_rng(size["n"]), 1 if shared else size["n"], angle)
        return R, generator.standard_normal(8 * size["n"])

    return draw


def with_infinity(generator: np.random.Generator, size: Size) -> Example:
    """Draw channels with one infinity: every channel of its block, and no other, loses its value."""
    R, x = channels(1.0)(generator, size)
    x[generator.integers(x.size)] = np.inf
    return R, x


def wide_or_plain_layer(bias: bool, shared: bool = False) -> Strategy:
    """Return a strategy for a layer of 8n outputs and 8m inputs and rotations of its outputs."""

    def draw(generator: np.random.Generator, size: Size) -> Example:
        W = generator.standard_normal((8 * size["n"], 8 * size["m"]))
        R = rotations(np.random.default_rng(size["n"]), 1 if shared else size["n"])
        return W, generator.standard_normal(8 * size["n"]) if bias else None, R

    return draw


def input_layer(generator: np.random.Generator, size: Size) -> Example:
    """Draw a layer of 8n outputs and 8m inputs and rotations of its inputs."""
    W = generator.standard_normal((8 * size["n"], 8 * size["m"]))
    return W, rotations(np.random.default_rng(size["m"]), size["m"])


APPLY: dict[str, Strategy] = {"turned": channels(2.0), "slight": channels(0.05), "shared": channels(1.0, shared=True)}
LAYER: dict[str, Strategy] = {
    "bias": wide_or_plain_layer(True),
    "no_bias": wide_or_plain_layer(False),
    "shared": wide_or_plain_layer(True, shared=True),
}


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

# eps(float64) times the norm 50 of the largest block, times the few roundings of each squaring.
EXPONENTIAL = Budget(
    forward={"float64": 1000.0, "float32": 2.0, "bfloat16": 1.0, "float16": 1.0},
    gradient={"float64": 2000.0, "float32": 2.0, "bfloat16": 1.0, "float16": 1.0},
)
# One product of eight terms, one rounding below float64.
PRODUCT = Budget(forward=8.0, gradient=16.0)
# The principal logarithm loses eps / sin θ at the angle 0.1 below π, through two square roots.
LOGARITHM = Budget(forward=4000.0, gradient=40000.0, floor=1e-3)
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
