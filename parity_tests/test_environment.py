"""The process in which parity is judged is the one that the README promises."""

from types import SimpleNamespace

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import torch
import typeguard
from jaxtyping import Float

from parity_tests.harness.environment import checked, shape_checks
from parity_tests.harness.inputs import round_to
from parity_tests.harness.skips import SkipCount
from so8t_jax.ops import second_difference as definition
from so8t_torch.ops import second_difference as production


def test_jax_computes_in_float64_and_promotes_nothing() -> None:
    assert jnp.ones(2, float).dtype == jnp.float64
    with pytest.raises(Exception, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.float64)
    with pytest.raises(Exception, match="rank"):
        jnp.ones(2) + jnp.ones((2, 2))


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("side", ["definition", "production"])
def test_shapes_are_checked_only_where_that_is_switched_on(side: str) -> None:
    def call() -> object:
        if side == "definition":
            return definition.energy(jnp.ones((5, 3)), jnp.ones(4))
        return production.second_difference(torch.ones(2, 5, 3), torch.ones(2, 4))

    with shape_checks(enabled=True), pytest.raises(jaxtyping.TypeCheckError):
        call()
    with shape_checks(enabled=False), pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert not isinstance(caught.value, jaxtyping.TypeCheckError)


def test_every_variadic_argument_is_checked() -> None:
    def total(*cores: Float[np.ndarray, "_ _"], scale: float = 1.0) -> float:
        return scale * sum(float(core.sum()) for core in cores)

    watched = checked(total)
    with shape_checks(enabled=True):
        assert watched(np.ones((2, 3)), np.ones((4, 5))) == 26.0
        with pytest.raises(typeguard.TypeCheckError):
            watched(np.ones((2, 3)), np.ones(4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_inputs_are_rounded_as_pytorch_rounds(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-4, 1).repeat(200)
    expected = torch.from_numpy(values).to(getattr(torch, dtype)).to(torch.float64).numpy()
    np.testing.assert_array_equal(round_to(values, dtype), expected)


@pytest.mark.parametrize(("skips", "status"), [(2, 0), (3, 1)])
def test_session_fails_when_skips_grow(skips: int, status: int) -> None:
    counter = SkipCount(allowed=2)
    for _ in range(skips):
        counter.pytest_runtest_logreport(SimpleNamespace(skipped=True, nodeid="parity_tests/test_x.py::t"))  # type: ignore[arg-type]
    expected_failure = SimpleNamespace(skipped=True, nodeid="parity_tests/test_x.py::t", wasxfail="gap")
    counter.pytest_runtest_logreport(expected_failure)  # type: ignore[arg-type]
    session = SimpleNamespace(config=SimpleNamespace(), exitstatus=0)
    counter.pytest_sessionfinish(session)  # type: ignore[arg-type]
    assert session.exitstatus == status
