"""Whole models and their definition: logits, states, and the gradient of every parameter."""

from parity_tests.harness import generate_tests
from parity_tests.nn.models import MODELS

test_models = generate_tests(MODELS, ["forward", "gradient", "meaningful"])
