"""The table of layers and models that exist on both sides, judged with the checks of the operations."""

from parity_tests.nn.layers import LAYERS
from parity_tests.nn.models import MODELS

PAIRS = (*LAYERS, *MODELS)
