"""Whole models and their definition: logits, states, gradients, and a row whose state crosses from one to the other."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.harness import OpPair, generate_tests, reference
from parity_tests.harness.inputs import to_numpy
from parity_tests.harness.judge import judge_forward, require, truth
from parity_tests.harness.production import Run, bound, tensors
from parity_tests.harness.tree import flatten, map_leaves
from parity_tests.nn.models import CUT, LANGUAGE_MODELS, MODELS

test_models = generate_tests(MODELS, ["forward", "gradient", "meaningful"])


def by_definition(pair: OpPair, inputs: Any, part: slice) -> Any:
    """Run the tokens of a part of all rows; the others are padding, so that nothing is compiled again."""
    ids, positions, mask, *others = inputs.arguments
    kept = np.zeros_like(mask)
    kept[:, part] = mask[:, part]
    logits, state = reference.values(pair, inputs.replace((ids, positions, kept, *others)))
    return logits[:, part], state


def by_production(pair: OpPair, inputs: Any, part: slice) -> Any:
    """Run the tokens of a part of all rows, and no others."""
    ids, positions, mask, *others = inputs.arguments
    cut = inputs.replace((*(x[:, part] for x in (ids, positions, mask)), *others))
    return map_leaves(to_numpy, bound(pair)(*tensors(pair, cut, "float64")))


@pytest.mark.parametrize("pair", LANGUAGE_MODELS, ids=lambda pair: pair.name)
def test_a_row_is_its_halves_whichever_side_runs_them(pair: OpPair) -> None:
    expected = truth(pair, "carried", pair.sizes[-1], "float64")
    inputs, first, rest = expected.inputs, slice(0, CUT), slice(CUT, None)
    for begins, goes_on in itertools.product((by_definition, by_production), repeat=2):
        early, state = begins(pair, inputs, first)
        leaves = flatten(state)[1]
        ids, positions, mask, *others = inputs.arguments
        entered = inputs.replace((ids, positions, mask, *leaves, *others[len(leaves) :]))
        late, last = goes_on(pair, entered, rest)
        whole = map_leaves(lambda leaf: torch.from_numpy(np.array(leaf)), (np.concatenate([early, late], 1), last))
        require(judge_forward(expected, Run(*flatten(whole), {})))
