"""The Triton kernels of the room ``lns``: float32 with signs and without, and float64 with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from parity_tests.kernel_specs.spec import KernelSpec
from so8t_torch.core.launch import Tile
from so8t_torch.ops.lns import kernels

FACTORS = {"sign_a_ptr": "*i8", "log_a_ptr": "*", "sign_b_ptr": "*i8", "log_b_ptr": "*"}
RESULT = {"sign_c_ptr": "*i8", "log_c_ptr": "*", "low_c_ptr": "*"}
SHIFTS = {"shift_a_ptr": "*", "norm_a_ptr": "*", "shift_b_ptr": "*", "norm_b_ptr": "*"}
SIZES = {"M": "i32:16", "N": "i32:16", "K": "i32:16"}
WITHOUT_SIGNS = dict.fromkeys(("sign_a_ptr", "sign_b_ptr", "sign_c_ptr", "norm_a_ptr", "norm_b_ptr"))
LADDER = (kernels.LADDER_TILE,)
FLOATING = (("fp32", {"SMALLEST": 2.0**-102, "UNIT": 2.0**-24}), ("fp64", {"SMALLEST": 2.0**-969, "UNIT": 2.0**-53}))


def lns_specs() -> tuple[KernelSpec, ...]:
    """Return the kernels of the room ``lns``."""
    found = []
    for element, scale in FLOATING:
        for spec in (*_products(element, scale), *_gradients(element)):
            found.append(spec)
            if element == "fp32":
                found.append(_unsigned(spec))
        found += _others(element)
    return tuple(found)


def original_specs() -> tuple[tuple[KernelSpec, KernelSpec], ...]:
    """Return the product's kernel, with signs and without, for each configuration that the design began from."""
    product = next(iter(_products("fp32", FLOATING[0][1])))
    each = (replace(product, tiles=(tile,)) for tile in kernels.ORIGINAL_TILES)
    return tuple((spec, _unsigned(spec)) for spec in each)


def _spec(
    kernel: Any, tiles: tuple[Tile, ...], element: str, signature: dict[str, str], constants: dict[str, Any],
    wide_loads: int = 1, wide_stores: int = 0,
) -> KernelSpec:  # fmt: skip
    return KernelSpec(
        room="lns",
        kernel=kernel,
        tiles=tiles,
        signature={**signature, **_signs_of_factors(element, signature)},
        constants=constants,
        elements=(element,),
        wide_loads=wide_loads,
        wide_stores=wide_stores,
    )


def _signs_of_factors(element: str, signature: dict[str, str]) -> dict[str, str]:
    """Return how the signs that a kernel reads are given: bytes, or float64 beside float64."""
    read = {"sign_ptr", "sign_a_ptr", "sign_b_ptr"} | ({"sign_c_ptr"} if "g_ptr" in signature else set())
    return dict.fromkeys(sorted(read & set(signature)), "*fp64" if element == "fp64" else "*i8")


def _unsigned(spec: KernelSpec) -> KernelSpec:
    absent = {name: None for name in WITHOUT_SIGNS if name in spec.signature}
    return replace(spec, constants={**spec.constants, **absent})


def _products(element: str, scale: dict[str, float]) -> Iterator[KernelSpec]:
    rung = {**FACTORS, **RESULT, "rung_ptr": "*i8", **SIZES}
    tiles = LADDER if element == "fp64" else kernels.FORWARD_TILES
    yield _spec(kernels.forward_kernel, tiles, element, {**rung, **SHIFTS}, scale, 4, 4)
    if element == "fp32":
        yield _spec(kernels.blocked_kernel, LADDER, element, {**rung, "few": "i32"}, scale)
    streamed = {"UNIT": scale["UNIT"]}
    yield _spec(kernels.streamed_kernel, kernels.STREAMED_TILES, element, {**rung, "few": "i32"}, streamed, 0)
    yield _spec(kernels.entry_kernel, kernels.ENTRY_TILES, element, rung, {}, 0)


def _gradients(element: str) -> Iterator[KernelSpec]:
    """Yield both factors' gradients, whose operands lie along rows and along columns, and what each leaves out."""
    signature = {
        **FACTORS, **RESULT, "g_ptr": "*", "da_ptr": "*", "wide_ptr": "*i8", "rows": "i32:16", "columns": "i32:16",
        "K": "i32:16",
    }  # fmt: skip
    right = {"stride_a_row": 1, "stride_b_k": 1, "stride_c_row": 1}
    left = {"stride_a_k": 1, "stride_b_column": 1, "stride_c_column": 1}
    limit = 60.0 if element == "fp32" else 600.0
    for one, others in ((left, right), (right, left)):
        strides = dict.fromkeys(others, "i32:16")
        for beyond in (False, True):
            tiles = (kernels.BEYOND_TILE,) if beyond else kernels.GRADIENT_TILES
            constants = {**one, "LIMIT": limit, "BEYOND": beyond}
            wide = {"wide_loads": 1, "wide_stores": 1} if not beyond and element == "fp32" else {"wide_loads": 0}
            chosen = LADDER if element == "fp64" else tiles
            yield _spec(kernels.gradient_kernel, chosen, element, {**signature, **strides}, constants, **wide)


def _others(element: str) -> Iterator[KernelSpec]:
    """Yield the row maxima along either axis, the largest term, and the gradient of that."""
    shift = {"sign_ptr": "*i8", "log_ptr": "*", "shift_ptr": "*", "norm_ptr": "*", "rows": "i32:16", "K": "i32:16",
             "stride_batch": "i32:16"}  # fmt: skip
    for along, across in (("stride_k", "stride_row"), ("stride_row", "stride_k")):
        signature = {**shift, across: "i32:16"}
        yield _spec(kernels.shift_kernel, kernels.SHIFT_TILES, element, signature, {along: 1})
        yield _spec(
            kernels.shift_kernel, kernels.SHIFT_TILES, element, signature, {along: 1, **_nothing("sign", "norm")}
        )
    largest = {**FACTORS, "sign_c_ptr": "*i8", "log_c_ptr": "*", **SIZES}
    for constants in ({"index_ptr": None}, {"index_ptr": None, **_nothing("sign_a", "sign_b", "sign_c")}):
        yield _spec(kernels.largest_kernel, kernels.LARGEST_TILES, element, largest, constants, 0)
    indexed = {**largest, "index_ptr": "*i32"}
    for absent in (("sign_c",), ("sign_a", "sign_b", "sign_c")):
        yield _spec(kernels.largest_kernel, kernels.LARGEST_TILES, element, indexed, _nothing(*absent), 0)
    strides = dict.fromkeys(("stride_row", "stride_column", "stride_da_row", "stride_da_k"), "i32:16")
    scatter = {"g_ptr": "*", "index_ptr": "*i32", "da_ptr": "*", "rows": "i32:16", "columns": "i32:16", "K": "i32:16"}
    for ones in (("stride_column", "stride_da_k"), ("stride_row", "stride_da_row")):
        yield _spec(
            kernels.scatter_kernel, kernels.SCATTER_TILES, element, {**scatter, **strides}, dict.fromkeys(ones, 1), 0
        )


def _nothing(*names: str) -> dict[str, None]:
    return dict.fromkeys(f"{name}_ptr" for name in names)
