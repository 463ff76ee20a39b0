"""Every differentiable pair: gradients for a drawn cotangent in every dtype, and finite differences twice over."""

from parity_tests.harness import generate_tests
from parity_tests.ops import PAIRS

test_gradients = generate_tests(PAIRS, ["gradient", "gradcheck", "checkpointed"])
