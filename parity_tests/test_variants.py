"""Every pair by other roads: torch.compile, and each named backend, interpreted on the CPU or on a CUDA device."""

from parity_tests.harness import generate_tests
from parity_tests.ops import PAIRS

test_variants = generate_tests(PAIRS, ["compiled", "backends"])
