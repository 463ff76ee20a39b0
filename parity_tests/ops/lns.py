"""Declarations of the room ``lns``: sums of 50 digits judge the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from parity_tests.harness.pair import Budget, Law, OpPair, Rejection, Strategy
from parity_tests.ops import lns_inputs as draws
from parity_tests.ops import lns_laws as laws
from so8t_jax.ops import lns as reference
from so8t_torch.core.errors import BackendError, ConfigError, DomainError, ShapeError
from so8t_torch.ops import lns as production

BACKENDS = ("rescaled", "triton")
VECTOR = ({"n": 3}, {"n": 29})
PRODUCT = ({"M": 2, "K": 3, "N": 2}, {"M": 9, "K": 37, "N": 11})
SHORT = ({"M": 1, "K": 1, "N": 1}, {"M": 1, "K": 9, "N": 3}, {"M": 3, "K": 2, "N": 1})

MODERATE: dict[str, Strategy] = {"moderate": draws.moderate, "zeros": draws.zeros}
"""Logs of size one: the error of a log is the relative error of its number."""
FAR: dict[str, Strategy] = {"wide": draws.wide, "shifted": draws.shifted}
"""Logs of a hundred and more: a rounded log of size h is a number wrong by hu."""
LOPSIDED: dict[str, Strategy] = {"lopsided": draws.lopsided}
"""Results of size one, three hundred below the largest factors of their row and column."""
LARGEST: dict[str, Strategy] = {"wide": draws.wide, "zeros": draws.zeros}
"""Where only the largest term counts, its size does not matter."""
WIDE_DTYPES = ("float64", "float32")
"""In half precision distant logs are so coarse that terms of opposite sign become equal, and nothing is left."""


def of_vectors(inputs: dict[str, Strategy], draw: Any) -> dict[str, Strategy]:
    """Return the strategies of a product as strategies of one or two vectors."""
    return {name: draw(strategy) for name, strategy in inputs.items()}


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return logs of zeros."""
    return torch.zeros(shape, dtype=dtype)


def ones(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """Return positive signs."""
    return torch.ones(shape, dtype=dtype)


def factors() -> tuple[torch.Tensor, ...]:
    """Return a sound (2, 3) by (3, 2) product."""
    return ones(2, 3), floats(2, 3), ones(3, 2), floats(3, 2)


VECTOR_REJECTIONS = (
    Rejection("sign_shape", lambda: (ones(2), floats(3), ones(3), floats(3)), ShapeError, "sign"),
    Rejection("float_sign", lambda: (floats(3), floats(3), ones(3), floats(3)), DomainError, "int8"),
    Rejection("integer_log", lambda: (ones(3), ones(3), ones(3), floats(3)), DomainError, "floating"),
    Rejection("apart", lambda: (ones(3), floats(3), ones(2), floats(2)), ShapeError, "broadcast"),
)
NUMBER_REJECTIONS = (
    Rejection("complex", lambda: (floats(3, dtype=torch.complex64),), DomainError, "floating"),
    Rejection("integer", lambda: (ones(3),), DomainError, "floating"),
)
TERMS_REJECTIONS = (
    Rejection("sign_shape", lambda: (ones(2), floats(3)), ShapeError, "sign"),
    Rejection("float_sign", lambda: (floats(3), floats(3)), DomainError, "int8"),
    Rejection("integer_log", lambda: (ones(3), ones(3)), DomainError, "floating"),
)
PRODUCT_REJECTIONS = (
    Rejection("inner", lambda: (ones(2, 3), floats(2, 3), ones(4, 2), floats(4, 2)), ShapeError, r"3.*4"),
    Rejection("vectors", lambda: (ones(3), floats(3), ones(3), floats(3)), ShapeError, "K"),
    Rejection("sign_shape", lambda: (ones(2, 2), *factors()[1:]), ShapeError, "sign"),
    Rejection("float_sign", lambda: (floats(2, 3), *factors()[1:]), DomainError, "int8"),
    Rejection("integer_log", lambda: (ones(2, 3), ones(2, 3), *factors()[2:]), DomainError, "floating"),
    Rejection(
        "two_dtypes", lambda: (*factors()[:3], floats(3, 2, dtype=torch.float64)), DomainError, "float32.*float64"
    ),
)
MODE_REJECTION = Rejection("mode", factors, ConfigError, "'sum' or 'max'", {"mode": "mean"})
MATMUL_REJECTIONS = (
    *PRODUCT_REJECTIONS,
    MODE_REJECTION,
    Rejection("guard_one", factors, ConfigError, "cancellation_guard", {"cancellation_guard": 1.0}),
    Rejection("guard_negative", factors, ConfigError, "cancellation_guard", {"cancellation_guard": -0.1}),
    Rejection("guard_nan", factors, ConfigError, "cancellation_guard", {"cancellation_guard": float("nan")}),
    Rejection("unknown_backend", factors, BackendError, "rescaled", {"backend": "fast"}),
)
LOGMATMULEXP_REJECTIONS = (
    Rejection("inner", lambda: (floats(2, 3), floats(4, 2)), ShapeError, r"3.*4"),
    Rejection("vectors", lambda: (floats(3), floats(3)), ShapeError, "K"),
    Rejection("complex", lambda: (floats(2, 3, dtype=torch.complex64), floats(3, 2)), DomainError, "floating"),
    Rejection("mode", lambda: factors()[1::2], ConfigError, "'sum' or 'max'", {"mode": "mean"}),
    Rejection("unknown_backend", lambda: factors()[1::2], BackendError, "rescaled", {"backend": "fast"}),
)

# The floor of every log is 1: an error of eps in a log is an error of eps in its number, whichever number that is.
ENTRYWISE = Budget(forward=4.0, gradient=8.0, floor=1.0)
EXACT = Budget(forward=2.0, gradient=2.0, floor=1.0)
UNSIGNED = Budget(forward=4.0, gradient=16.0, floor=1.0)
# Weights are exp of logs of size h, rounded: they are wrong by hu before anything is added; h is 400 here.
FAR_UNSIGNED = Budget(forward=2.0, gradient=256.0, floor=1.0)
# Kuκ at worst, with K = 37 and κ up to 100 in these draws; weights of size κ add their own factor to the gradient.
SIGNED = Budget(forward=64.0, gradient=512.0, floor=1.0)
# The rounding of A − a, which is 300 here, is amplified by exp: (3) of docs/math/lns.md with depth 300.
DEEP = Budget(forward=256.0, gradient=1024.0, floor=1.0)
FAR_SIGNED = Budget(forward=16.0, gradient=2048.0, floor=1.0)
CANCELLING = Budget(forward=1024.0, gradient=2048.0, floor=1.0)


def vectors_pair(name: str, oracle: Any, identities: tuple[Law, ...]) -> OpPair:
    """Declare an entrywise operation of two sign–log vectors."""
    return OpPair(
        name=f"lns.{name}",
        reference=getattr(reference, name),
        production=getattr(production, name),
        oracle=oracle,
        inputs=of_vectors({**MODERATE, **FAR}, draws.two_vectors),
        sizes=VECTOR,
        wrt=(1, 3),
        budget=ENTRYWISE,
        laws=identities,
        rejections=VECTOR_REJECTIONS,
        nonfinite=("zeros", "shifted"),
        edge_sizes=({"n": 1},),
        bitwise_batch=True,
    )


def sum_pair(variant: str, inputs: dict[str, Strategy], budget: Budget, **fields: Any) -> OpPair:
    """Declare the sum over an axis on some inputs."""
    return OpPair(
        name=f"lns.sum{variant}",
        reference=reference.sum,
        production=production.sum,
        oracle=draws.sum_by_terms,
        inputs=of_vectors(inputs, draws.vector),
        sizes=VECTOR,
        wrt=(1,),
        budget=budget,
        nonfinite=tuple(name for name in ("zeros",) if name in inputs),
        edge_sizes=({"n": 1},),
        **fields,
    )


def matmul_pair(variant: str, inputs: dict[str, Strategy], budget: Budget, **fields: Any) -> OpPair:
    """Declare the signed product on some inputs."""
    chosen: dict[str, Any] = {
        "oracle": draws.product_by_mpmath,
        "wrt": (1, 3),
        "nonfinite": tuple(name for name in ("zeros", "nonfinite") if name in inputs),
        "edge_sizes": SHORT,
        **fields,
    }
    return OpPair(
        name=f"lns.matmul{variant}",
        reference=reference.matmul,
        production=production.matmul,
        inputs=inputs,
        sizes=PRODUCT,
        budget=budget,
        **{"backends": BACKENDS, **chosen},
    )


def logs_pair(variant: str, inputs: dict[str, Strategy], budget: Budget, **fields: Any) -> OpPair:
    """Declare the unsigned product on some inputs."""
    chosen: dict[str, Any] = {"oracle": draws.without_signs(draws.product_by_mpmath), **fields}
    return OpPair(
        name=f"lns.logmatmulexp{variant}",
        reference=reference.logmatmulexp,
        production=production.logmatmulexp,
        inputs={name: draws.unsigned(strategy) for name, strategy in inputs.items()},
        sizes=PRODUCT,
        wrt=(0, 1),
        budget=budget,
        backends=BACKENDS,
        nonfinite=tuple(name for name in ("zeros",) if name in inputs),
        edge_sizes=SHORT,
        **chosen,
    )


MATMUL_LAWS = (
    Law("dense", laws.dense_law, 64.0),
    Law("shift", laws.shift_law, 8.0),
    Law("order", laws.order_law, 16.0),
    Law("transpose", laws.transpose_law, 16.0),
    Law("negation", laws.negation_law, 16.0),
)
UNSIGNED_LAWS = (Law("bounds", laws.bounds_law, 16.0), Law("semiring", laws.semiring_law, 32.0))

PAIRS: tuple[OpPair, ...] = (
    OpPair(
        name="lns.encode",
        reference=reference.encode,
        production=production.encode,
        oracle=draws.encode_by_entry,
        inputs={
            "real": draws.real,
            "spread": draws.spread,
            "some_zero": draws.some_zero,
            "special": draws.special,
        },
        sizes=VECTOR,
        wrt=(0,),
        budget=Budget(forward=2.0, gradient=2.0, floor=1.0),
        laws=(Law("round_trip", laws.round_trip_law, 32.0),),
        rejections=NUMBER_REJECTIONS,
        nonfinite=("some_zero", "special"),
        edge_sizes=({"n": 1},),
        bitwise_batch=True,
    ),
    OpPair(
        name="lns.decode",
        reference=reference.decode,
        production=production.decode,
        oracle=draws.decode_by_entry,
        inputs=of_vectors(MODERATE, draws.vector),
        sizes=VECTOR,
        wrt=(1,),
        budget=Budget(forward=4.0, gradient=4.0),
        rejections=TERMS_REJECTIONS,
        edge_sizes=({"n": 1},),
        bitwise_batch=True,
    ),
    vectors_pair(
        "mul",
        draws.mul_by_entry,
        (Law("inverse", laws.inverse_law, 1.0), Law("linear", laws.linear_law(np.multiply), 32.0)),
    ),
    vectors_pair(
        "add", draws.add_by_entry, (Law("swap", laws.swap_law, 1.0), Law("linear", laws.linear_law(np.add), 16.0))
    ),
    vectors_pair(
        "sub",
        draws.sub_by_entry,
        (Law("itself", laws.itself_law, 4.0), Law("linear", laws.linear_law(np.subtract), 16.0)),
    ),
    sum_pair("", MODERATE, SIGNED, laws=(Law("fold", laws.fold_law, 16.0),), rejections=TERMS_REJECTIONS),
    sum_pair(":far", {**FAR, **LOPSIDED}, FAR_SIGNED, dtypes=WIDE_DTYPES),
    matmul_pair("", MODERATE, SIGNED, laws=MATMUL_LAWS, rejections=MATMUL_REJECTIONS),
    matmul_pair(":far", FAR, FAR_SIGNED, dtypes=WIDE_DTYPES),
    matmul_pair(":deep", LOPSIDED, DEEP, dtypes=WIDE_DTYPES),
    matmul_pair(":cancelling", {"cancelling": draws.cancelling}, CANCELLING, dtypes=WIDE_DTYPES),
    matmul_pair(
        ":guarded",
        {"moderate": draws.moderate},
        SIGNED,
        edge_sizes=(),
        keywords={"cancellation_guard": 0.5},
        twice=False,
        finite_differences=False,
    ),
    matmul_pair(
        ":nonfinite",
        {"moderate": draws.moderate, "nonfinite": draws.nonfinite},
        SIGNED,
        wrt=(),
        edge_sizes=(),
        backends=(),
    ),
    matmul_pair(":max", LARGEST, EXACT, keywords={"mode": "max"}, oracle=draws.largest_by_loops),
    logs_pair("", MODERATE, UNSIGNED, laws=UNSIGNED_LAWS, rejections=LOGMATMULEXP_REJECTIONS),
    logs_pair(":far", FAR, FAR_UNSIGNED),
    logs_pair(":deep", LOPSIDED, DEEP),
    logs_pair(
        ":max",
        LARGEST,
        EXACT,
        keywords={"mode": "max"},
        oracle=draws.without_signs(draws.largest_by_loops),
        laws=(Law("dominated", laws.dominated_law, 4.0),),
    ),
    OpPair(
        name="lns.condition_number",
        reference=reference.condition_number,
        production=production.condition_number,
        oracle=draws.condition_by_mpmath,
        inputs=MODERATE,
        sizes=PRODUCT,
        budget=Budget(forward=512.0),
        laws=(Law("kappa", laws.kappa_law, 64.0),),
        rejections=PRODUCT_REJECTIONS,
        edge_sizes=SHORT,
    ),
)
