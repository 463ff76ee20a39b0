"""Regular expressions of a configuration: what may take forever is refused, what people write is not."""

import pytest

from so8t_torch import SO8TConfig
from so8t_torch.adapter.patterns import fault_of
from so8t_torch.core.errors import ConfigError


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        r".*\.(q_proj|k_proj|v_proj)$",
        r"model\.layers\.(1|2|\d+)\.self_attn\..*_proj",
        r"(?:.*\.)?layers\.\d{1,2}\.mlp\.(gate|up)_proj",
        r"(.*\.)?(o_proj|down_proj)",
        r"[a-z_.]*proj(?!_in)",
    ],
)
def test_patterns_that_people_write_are_read(pattern):
    assert fault_of(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a+)+$", "may take forever"),
        (r"(\w+\.?)*x", "may take forever"),
        ("(a|a)*$", "may take forever"),
        ("((a?){20}){20}b", "may take forever"),
        ("(?:(?=(a+))a)*b", "may take forever"),
        (".*.*.*.*.*.*x", "more than 4 endless"),
        ("a?" * 30 + "a" * 30, "10 optional parts"),
        ("(", "not a regular expression"),
        ("a{99999999999999999999}", "not a regular expression"),
        ("(" * 400 + ")" * 400, None),
        ("x" * 1001, "at most 1,000 are read"),
    ],
)
def test_patterns_that_may_take_forever_are_refused(pattern, reason):
    assert reason is None or reason in fault_of(pattern)


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_modules": "(a+)+"},
        {"r": 2, "lora_target_modules": "(a+)+"},
        {"exclude_modules": "(a+)+"},
        {"layers_pattern": ["(a+)+"], "layers_to_transform": [0]},
        {"r": 2, "rank_pattern": {"(a+)+": 2}},
    ],
)
def test_every_field_that_holds_a_pattern_is_checked(arguments):
    with pytest.raises(ConfigError, match=r"got '\(a\+\)\+': .*may take forever"):
        SO8TConfig(**arguments)
