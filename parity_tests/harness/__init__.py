"""Everything generated from a declared pair: inputs, comparison, checks, variants, census, report."""

from parity_tests.harness.cases import Case
from parity_tests.harness.comparison import Deviation, ParityError
from parity_tests.harness.generate import CHECKS, cases, generate_tests
from parity_tests.harness.pair import Budget, Carry, Example, Law, OpPair, Rejection, Size, Strategy

__all__ = [
    "CHECKS",
    "Budget",
    "Carry",
    "Case",
    "Deviation",
    "Example",
    "Law",
    "OpPair",
    "ParityError",
    "Rejection",
    "Size",
    "Strategy",
    "cases",
    "generate_tests",
]
