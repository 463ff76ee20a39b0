"""Every layer and its definition: values, gradients of inputs and parameters."""

from parity_tests.harness import generate_tests
from parity_tests.nn.layers import LAYERS

test_layers = generate_tests(LAYERS, ["forward", "gradient", "meaningful"])
