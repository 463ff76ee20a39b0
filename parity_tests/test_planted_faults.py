"""The harness caught in the act: each fault is planted in a sound toy pair and must turn exactly that check red."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from parity_tests.harness import Budget, Law, OpPair, ParityError, cases, generate_tests
from parity_tests.harness.judge import another_truth
from parity_tests.harness.pair import Carry
from parity_tests.toy import SOUND, toy_oracle, toy_production, toy_reference

test_sound_toy = generate_tests([SOUND])
test_sound_shared_argument = generate_tests(
    [dataclasses.replace(SOUND, name="toy.shared", shared=(1,))], ["gradient", "batch", "layout"]
)


def red(pair: OpPair, *checks: str) -> dict[str, str]:
    """Return case name → text of every case that fails."""
    found = {}
    for case in cases([pair], checks) if checks else cases([pair]):
        if case.unavailable is None:
            try:
                case.run()
            except ParityError as error:
                found[case.name] = str(error)
    return found


def with_production(production: Callable[..., Any], **changes: Any) -> OpPair:
    return dataclasses.replace(SOUND, production=production, **changes)


def test_eight_eps_are_too_many_in_every_dtype() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return total * (1 + 8 * torch.finfo(x.dtype).eps), y

    names = red(with_production(wrong), "forward")
    assert {name.rpartition("-")[2] for name in names} == set(SOUND.dtypes)
    assert all("output 0" in text and "output 1" not in text for text in names.values())


def test_eight_eps_are_too_many_below_float64_whatever_the_budget_says() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return total * (1 + 8 * torch.finfo(x.dtype).eps), y

    names = red(with_production(wrong, budget=Budget(forward=100, gradient=100)), "forward")
    assert {name.rpartition("-")[2] for name in names} == {"float32", "bfloat16", "float16"}


class _Swapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return cotangents[0] * x, cotangents[0] * weight


def test_error_in_float32_is_the_worst_of_as_many_batches_as_declared() -> None:
    def plain(batches: int, number: int = 0) -> list[float | None]:
        budget = dataclasses.replace(SOUND.budget, bar_batches=batches)
        found = another_truth(dataclasses.replace(SOUND, budget=budget), "generic", {"n": 7}, "float32", number)
        return [e.straightforward for e in (*found.outputs, *found.gradients.values())]

    each = np.array([plain(1, number) for number in range(8)])
    assert plain(8) == list(each.max(0))
    assert plain(3) == list(each[:3].max(0)) != plain(8)


def test_two_swapped_gradients() -> None:
    def product(x: Any, weight: Any) -> Any:
        return x * weight

    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return _Swapped.apply(x, weight)

    pair = with_production(wrong, reference=product, oracle=lambda x, w: np.multiply(x, w), twice=False, laws=())
    assert not red(pair, "forward")
    text = "\n".join(red(pair, "gradient").values())
    assert "gradient of argument 0" in text
    assert "gradient of argument 1" in text
    assert red(pair, "gradcheck")


def test_detached_input() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return toy_production(x, weight.detach())

    assert not red(with_production(wrong), "forward")
    assert all("argument 1" in text and "None" in text for text in red(with_production(wrong), "gradient").values())
    assert red(with_production(wrong), "gradient")


def test_every_input_detached() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return toy_production(x.detach(), weight.detach())

    assert all("no output depends" in text for text in red(with_production(wrong), "gradient").values())
    assert red(with_production(wrong), "gradient")


def test_gradient_that_is_zero_everywhere() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight.detach())
        return total + 0 * weight.sum(-1), y

    assert all("zero everywhere" in text for text in red(with_production(wrong), "gradient").values())
    assert red(with_production(wrong), "gradient")


def test_one_output_missing() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return (toy_production(x, weight)[0],)

    text = red(with_production(wrong), "forward")
    assert len(text) == len(list(cases([SOUND], ["forward"])))
    assert all("structure" in line for line in text.values())


def test_list_for_a_tuple() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return list(toy_production(x, weight))

    assert all("[*, *]" in line for line in red(with_production(wrong), "forward").values())
    assert red(with_production(wrong), "forward")


def test_shape_that_would_broadcast() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return total.unsqueeze(-1), y

    assert all("expected shape" in line for line in red(with_production(wrong), "forward").values())
    assert red(with_production(wrong), "forward")


def test_result_in_another_dtype() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return total.float(), y

    names = red(with_production(wrong), "forward")
    assert {name.rpartition("-")[2] for name in names} == {"float64", "bfloat16", "float16"}


def _poles(name: str) -> OpPair:
    def reference(x: Any) -> Any:
        return jnp.log(x)

    def production(x: torch.Tensor) -> torch.Tensor:
        return torch.log(x)

    return OpPair(
        name=name,
        reference=reference,
        production=production,
        oracle=lambda x: np.log(np.abs(x)) + np.where(x < 0, np.nan, 0.0),
        inputs={"negative": lambda generator, _size: (np.array([2.0, -1.0, generator.uniform(2, 3)]),)},
        sizes=({},),
        budget=Budget(forward=2),
    )


def test_nan_in_the_same_place_on_both_sides() -> None:
    pair = _poles("toy.log")
    assert all("non-finite" in line for line in red(pair, "forward", "oracle").values())
    assert len(red(pair, "forward", "oracle")) == len(list(cases([pair], ["forward", "oracle"])))


def test_declared_nan_is_accepted_in_its_place_only() -> None:
    pair = dataclasses.replace(_poles("toy.log"), nonfinite=("negative",), dtypes=("float64", "float32"))
    assert not red(pair, "forward", "oracle")
    moved = dataclasses.replace(pair, production=lambda x: torch.log(x.roll(1, -1)))
    assert all("same places" in line for line in red(moved, "forward").values())
    assert red(moved, "forward")


def _reduction(batch: torch.Tensor) -> torch.Tensor:
    # the mean over the batch is lost in rounding below 1 eps of the budget, but it is there
    return batch + (batch.mean(0, keepdim=True) - batch) * torch.finfo(batch.dtype).eps * (batch.shape[0] > 1)


def test_reduction_that_depends_on_the_batch() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return total, y * (1 + 0.01 * (x.shape[0] > 1)) if x.dim() > 1 else y

    assert red(with_production(wrong), "batch")


def test_reduction_that_depends_on_the_batch_by_one_rounding() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return _reduction(total) if total.dim() else total, y

    roomy = Budget(forward=16, gradient=16)
    assert not red(with_production(wrong, budget=roomy, dtypes=("float64",)), "batch", "forward")
    text = red(with_production(wrong, budget=roomy, dtypes=("float64",), bitwise_batch=True), "batch")
    assert all("bit for bit" in line for line in text.values())
    assert text


def test_sound_toy_is_bitwise_equal_row_by_row() -> None:
    assert not red(dataclasses.replace(SOUND, bitwise_batch=True), "batch")


def test_budget_so_wide_that_zeros_pass() -> None:
    wide = dataclasses.replace(SOUND, budget=Budget(forward=1e16, gradient=1e16))
    text = red(wide, "forward", "gradient", "meaningful")
    assert any("an output of zeros would pass" in line for line in text.values())
    assert any("zeros would pass on every input" in line for line in text.values())


def test_floor_so_high_that_zeros_pass() -> None:
    high = dataclasses.replace(SOUND, budget=Budget(forward=4, gradient=16, floor=1e20))
    text = red(high, "meaningful")
    assert all("zeros would pass on every input for: output 0, output 1" in line for line in text.values())
    assert text


def test_nothing_compared() -> None:
    from parity_tests.harness.judge import require

    with pytest.raises(ParityError, match="nothing was compared"):
        require([])


def test_oracle_that_is_the_reference() -> None:
    assert "oracle is one of" in str(red(dataclasses.replace(SOUND, oracle=toy_reference), "declaration"))


def test_oracle_that_calls_the_reference() -> None:
    def borrowed(x: np.ndarray, weight: np.ndarray) -> Any:
        return toy_reference(x, weight)

    pair = dataclasses.replace(SOUND, oracle=borrowed)
    assert not red(pair, "declaration")
    assert all("calls the reference" in line for line in red(pair, "oracle").values())
    assert red(pair, "oracle")


def test_oracle_that_disagrees() -> None:
    pair = dataclasses.replace(SOUND, oracle=lambda x, w: (toy_oracle(x, w)[0], 2 * toy_oracle(x, w)[1]))
    assert all("output 1" in line for line in red(pair, "oracle").values())
    assert red(pair, "oracle")


def test_no_oracle_and_no_law() -> None:
    assert "nothing judges" in str(red(dataclasses.replace(SOUND, oracle=None, laws=()), "declaration"))


def test_positional_parameters_in_another_order() -> None:
    def wrong(weight: torch.Tensor, x: torch.Tensor) -> Any:
        return toy_production(x, weight)

    assert "positional parameters differ" in str(red(with_production(wrong), "declaration"))


def test_keyword_that_only_one_side_has() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, *, epsilon: float = 0.0) -> Any:
        return toy_production(x + epsilon, weight)

    assert "epsilon" in str(red(with_production(wrong), "declaration"))


def test_law_that_says_nothing() -> None:
    pair = dataclasses.replace(SOUND, laws=(Law("idle", lambda f, e: f(*e)[0] * 0.0, budget=1),))
    assert list(red(pair, "laws")) == ["toy.normalised-law-idle-notices"]


def test_law_that_fails() -> None:
    pair = dataclasses.replace(SOUND, laws=(Law("even", lambda f, e: f(*e)[1] - f(e[0], -e[1])[1], budget=4),))
    assert set(red(pair, "laws")) == {"toy.normalised-law-even-reference", "toy.normalised-law-even-production"}


def test_rejection_that_is_accepted_or_says_something_else() -> None:
    lengths = SOUND.rejections[0]
    mute = dataclasses.replace(lengths, match="chart")
    kind = dataclasses.replace(lengths, arguments=lambda: (torch.ones(3), torch.ones(3)))
    assert "expected a text" in str(red(dataclasses.replace(SOUND, rejections=(mute,)), "rejections"))
    assert "was accepted" in str(red(dataclasses.replace(SOUND, rejections=(kind,)), "rejections"))


def test_memory_that_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # memory that happens to hold zeros hides the fault from every other check
    monkeypatch.setattr(torch, "empty", torch.zeros)

    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return total + torch.empty(total.shape, dtype=total.dtype), y

    assert not red(with_production(wrong), "forward")
    assert all("non-finite" in line for line in red(with_production(wrong), "memory").values())
    assert red(with_production(wrong), "memory")


def test_strides_ignored() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        return toy_production(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), weight)

    assert any("strided" in name for name in red(with_production(wrong, wrt=()), "layout"))


def test_second_batch_axis_ignored() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        total, y = toy_production(x, weight)
        return (total.flatten() if total.dim() else total), y

    assert list(red(with_production(wrong), "layout")) == ["toy.normalised-layout-two_axes"]


def _running_sum(broken: bool) -> OpPair:
    def reference(x: Any, state: Any) -> Any:
        y = state + jnp.cumsum(x)
        return y, y[-1]

    def production(x: torch.Tensor, state: torch.Tensor) -> Any:
        y = (0 if broken and x.shape[-1] == length // 2 else 1) * state.unsqueeze(-1) + x.cumsum(-1)
        return y, y[..., -1]

    def oracle(x: np.ndarray, state: np.ndarray) -> Any:
        y = np.array([state + sum(x[: i + 1]) for i in range(len(x))])
        return y, y[-1]

    length = 8
    return OpPair(
        name="toy.running_sum",
        reference=reference,
        production=production,
        oracle=oracle,
        inputs={"positive": lambda g, _s: (g.uniform(1, 2, length), np.asarray(g.uniform(1, 2)))},
        sizes=({},),
        wrt=(0, 1),
        budget=Budget(forward=4, gradient=4, gradient_floor=1.0),  # cotangents of both signs add up
        carry=Carry(
            split=lambda e: ((e[0][: length // 2], e[1]), lambda state: (e[0][length // 2 :], state)),
            join=lambda a, b: (np.concatenate([a[0], b[0]]), b[1]),
        ),
    )


test_sound_state = generate_tests([_running_sum(broken=False)])


def test_state_that_is_dropped_between_halves() -> None:
    assert not red(_running_sum(broken=True), "forward")
    assert red(_running_sum(broken=True), "halves")


def test_backend_that_is_wrong_in_the_dtypes_it_takes() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, *, backend: str = "auto") -> Any:
        total, y = toy_production(x, weight)
        return total * (2 if backend == "doubled" else 1), y

    pair = with_production(wrong, backends=("doubled",), backend_dtypes={"doubled": ("float32",)})
    assert not red(pair, "forward", "declaration")
    assert set(red(pair, "backends")) == {f"toy.normalised-backend-doubled-generic-n{n}-float32" for n in (3, 7)}


def test_graph_break() -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor) -> Any:
        torch._dynamo.graph_break()
        return toy_production(x, weight)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        red(with_production(wrong), "compiled")


def test_complex_gradients_follow_one_convention() -> None:
    def reference(z: Any) -> Any:
        return z * z * (1 + 2j)

    def production(z: torch.Tensor) -> torch.Tensor:
        return z * z * (1 + 2j)

    pair = OpPair(
        name="toy.square",
        reference=reference,
        production=production,
        oracle=lambda z: np.array([complex(v) ** 2 * (1 + 2j) for v in z]),
        inputs={"generic": lambda g, _s: (g.standard_normal(5) + 1j * g.standard_normal(5),)},
        sizes=({},),
        wrt=(0,),
        dtypes=("float64", "float32"),
        budget=Budget(forward=4, gradient=4),
    )
    assert not red(pair)
