"""The table: every declared pair, in one explicit tuple."""

from parity_tests.harness.pair import OpPair
from parity_tests.ops import lns, rotation, second_difference, tensor_train, triality

PAIRS: tuple[OpPair, ...] = (
    *rotation.PAIRS,
    *triality.PAIRS,
    *second_difference.PAIRS,
    *lns.PAIRS,
    *tensor_train.PAIRS,
)
