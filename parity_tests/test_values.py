"""Every pair: declaration, definition against oracle, production against definition, forward in every dtype."""

from parity_tests.harness import generate_tests
from parity_tests.ops import PAIRS

test_values = generate_tests(PAIRS, ["declaration", "oracle", "forward", "meaningful", "edges", "plain_reference"])
