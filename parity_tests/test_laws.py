"""Every pair: the identities it must satisfy on both sides and the calls it must reject."""

from parity_tests.harness import generate_tests
from parity_tests.ops import PAIRS

test_laws = generate_tests(PAIRS, ["laws", "rejections"])
