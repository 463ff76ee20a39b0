"""The Triton kernels of the room ``tensor_train``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parity_tests.kernel_specs.spec import KernelSpec
from so8t_torch.core.launch import Tile
from so8t_torch.ops.tensor_train import head_kernels, kernels

ELEMENTS = ("bf16", "fp32")
"""float16 is compiled as bfloat16 is; both are run in the interpreter."""
BY_SIZE = ((2, ("bf16",)), (4, ("fp32",)))
PLAIN = {"INTERPRETED": False}
ORDERED = {"CHUNK": kernels.CHUNK, "SEGMENTS": 256}


def tensor_train_specs() -> tuple[KernelSpec, ...]:
    """Return the kernels of the room ``tensor_train``."""
    return (*rows_specs(), *gradient_specs(), *head_specs())


def rows_specs() -> tuple[KernelSpec, ...]:
    """Return the gather and contraction of two and of three cores."""
    pair = {"i1_ptr": "*i64", "i2_ptr": "*i64", "c1_ptr": "*", "c2_ptr": "*", "y_ptr": "*", "count": "i32", "v1": "i32"}
    triple = {**pair, "i3_ptr": "*i64", "c3_ptr": "*"}
    widths = {"d1": "i32:16", "d2": "i32:16", "d_model": "i32:16"}
    return (
        KernelSpec(
            room="tensor_train",
            kernel=kernels.pair_rows_kernel,
            tiles=kernels.PAIR_ROWS_TILES,
            signature={**pair, **widths, "rank": "i32:16"},
            constants=PLAIN,
            elements=ELEMENTS,
        ),
        KernelSpec(
            room="tensor_train",
            kernel=kernels.triple_rows_kernel,
            tiles=kernels.TRIPLE_ROWS_TILES,
            signature={**triple, **widths, "d1": "i32", "d3": "i32:16", "r1": "i32:16", "r2": "i32:16"},
            constants=PLAIN,
            elements=ELEMENTS,
        ),
    )


def gradient_specs() -> tuple[KernelSpec, ...]:
    """Return the gradients of the cores, ordered and atomic, and the sum of partials."""
    plan = {
        "keys_ptr": "*i64", "order_ptr": "*i64", "starts_ptr": "*i32", "dy_ptr": "*", "out_ptr": "*fp32",
        "count": "i32", "segments": "i32", "d_model": "i32:16",
    }  # fmt: skip
    sides = ({"stride_own": "i32:16", "stride_other": 1}, {"stride_own": 1, "stride_other": "i32:16"})
    pair = {"other_ptr": "*", "partners": "i32", "rank": "i32:16", "own": "i32:16", "other": "i32:16"}
    ends = (
        {"stride_rank": "i32:16", "stride_far_rank": "i32:16", "stride_own": "i32:16", "stride_far": 1},
        {"stride_rank": "i32:16", "stride_far_rank": "i32:16", "stride_own": 1, "stride_far": "i32:16"},
    )
    end = {
        "middle_ptr": "*", "far_ptr": "*", "near": "i32", "distant": "i32", "rank": "i32:16", "far_rank": "i32:16",
        "own": "i32", "middle": "i32:16", "far": "i32:16", "stride_middle": "i32:16",
    }  # fmt: skip
    middle = {
        "c1_ptr": "*", "c3_ptr": "*", "v1": "i32", "v3": "i32", "r1": "i32:16", "r2": "i32:16", "d1": "i32",
        "d2": "i32:16", "d3": "i32:16",
    }  # fmt: skip
    cases: tuple[tuple[Any, Mapping[int, tuple[Tile, ...]], dict[str, Any]], ...] = (
        *((kernels.pair_gradient_kernel, kernels.PAIR_GRADIENT_TILES, {**plan, **pair, **side}) for side in sides),
        *((kernels.end_gradient_kernel, kernels.END_GRADIENT_TILES, {**plan, **end, **side}) for side in ends),
        (kernels.middle_gradient_kernel, kernels.MIDDLE_GRADIENT_TILES, {**plan, **middle}),
    )
    walks = tuple(
        KernelSpec(
            room="tensor_train",
            kernel=kernel,
            tiles=tiles[size],
            signature={name: kind for name, kind in arguments.items() if isinstance(kind, str)},
            constants={
                **PLAIN, **ORDERED, "ATOMIC": atomic,
                **{name: kind for name, kind in arguments.items() if not isinstance(kind, str)},
            },
            elements=elements,
            wide_stores=0,
        )
        for kernel, tiles, arguments in cases
        for atomic in (False, True)
        for size, elements in BY_SIZE
    )  # fmt: skip
    total = KernelSpec(
        room="tensor_train",
        kernel=kernels.reduce_kernel,
        tiles=kernels.REDUCE_TILES,
        signature={"partial_ptr": "*fp32", "starts_ptr": "*i32", "out_ptr": "*fp32", "size": "i32:16"},
        constants={"CHUNK": kernels.CHUNK},
        elements=("fp32",),
    )
    return (*walks, total)


def head_specs() -> tuple[KernelSpec, ...]:
    """Return cross-entropy under the tied head, forward and backward; their tiles depend on the bytes of an element."""
    sizes = {"v1": "i32", "v2": "i32", "rank": "i32:16", "d1": "i32:16", "d2": "i32:16", "d_model": "i32:16"}
    shared = {"targets_ptr": "*i64", "c1_ptr": "*", "c2_ptr": "*", "vocab_size": "i32", "lse_ptr": "*fp32", **sizes}
    core = {
        "g_ptr": "*fp32", "targets_ptr": "*i64", "h_ptr": "*", "p_ptr": "*", "core_ptr": "*", "out_ptr": "*fp32",
        "count": "i32:16", "share": "i32", "size": "i32:16", "v_own": "i32", "v_other": "i32",
        "rank": "i32:16", "d_own": "i32:16", "d_other": "i32:16", "d_model": "i32:16",
    }  # fmt: skip
    sides: tuple[tuple[dict[str, str], dict[str, int]], ...] = (
        ({"stride_own": "i32", "feature_own": "i32:16"}, {"stride_other": 1, "feature_other": 1}),
        ({"stride_other": "i32", "feature_other": "i32:16"}, {"stride_own": 1, "feature_own": 1}),
    )
    logits, hidden, cores = head_kernels.LOGIT_TILES, head_kernels.HIDDEN_TILES, head_kernels.CORE_TILES
    cases: tuple[tuple[Any, Any, dict[str, str], dict[str, int], int], ...] = (
        (head_kernels.loss_kernel, logits, {**shared, "h_ptr": "*", "hit_ptr": "*fp32"}, {}, 0),
        (head_kernels.residual_kernel, logits, {**shared, "h_ptr": "*", "p_ptr": "*"}, {}, 0),
        (head_kernels.hidden_kernel, hidden, {**shared, "g_ptr": "*fp32", "p_ptr": "*", "dh_ptr": "*"}, {}, 1),
        *((head_kernels.core_kernel, cores, {**core, **side}, units, 0) for side, units in sides),
    )
    return tuple(
        KernelSpec(
            room="tensor_train",
            kernel=kernel,
            tiles=tiles[size],
            signature=signature,
            constants={**PLAIN, **units},
            elements=elements,
            wide_stores=wide_stores,
        )
        for kernel, tiles, signature, units, wide_stores in cases
        for size, elements in BY_SIZE
    )
