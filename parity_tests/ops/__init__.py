"""The table: every declared pair, in one explicit tuple."""

from parity_tests.harness.pair import OpPair
from parity_tests.ops import (
    hebbian,
    linear_recurrence,
    lns,
    physics,
    rank_gate,
    resonance,
    rotation,
    second_difference,
    semiseparable,
    snr_filter,
    tensor_train,
    triality,
    tridiagonal,
    zeta,
)

PAIRS: tuple[OpPair, ...] = (
    *rotation.PAIRS,
    *triality.PAIRS,
    *second_difference.PAIRS,
    *lns.PAIRS,
    *tensor_train.PAIRS,
    *linear_recurrence.PAIRS,
    *tridiagonal.PAIRS,
    *hebbian.PAIRS,
    *snr_filter.PAIRS,
    *resonance.PAIRS,
    *zeta.PAIRS,
    *physics.PAIRS,
    *rank_gate.PAIRS,
    *semiseparable.PAIRS,
)
