"""Every pair: batch rows alone, strides, empty batches, unwritten memory, two halves of a run."""

from parity_tests.harness import generate_tests
from parity_tests.ops import PAIRS

test_layout = generate_tests(PAIRS, ["batch", "layout", "memory", "halves"])
