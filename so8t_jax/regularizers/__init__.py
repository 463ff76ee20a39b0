"""The workbench of regularisers: write one pure function, register it, and see whether it is sound and what it does.

    register   a function with the inputs and laws by which it is judged
    check      its value, its gradient against finite differences, its laws under hypothesis
    try_out    a small Flax model trained with it and without, plotted; multipliers by the augmented Lagrangian
    constraint what ``so8t_jax.train.fit`` takes to demand it of a model of your own

The same declaration judges its port to PyTorch (``parity_tests.regularizers``), after which a configuration can name it
(``physics.terms``). Tutorial: examples/new_regulariser.py.
"""

from so8t_jax.regularizers import known_terms
from so8t_jax.regularizers.checking import Finding, Report, check
from so8t_jax.regularizers.registry import KINDS, Law, Regularizer, find, register, registered
from so8t_jax.regularizers.trial import Trial, constraint, try_out

__all__ = [
    "KINDS",
    "Finding",
    "Law",
    "Regularizer",
    "Report",
    "Trial",
    "check",
    "constraint",
    "find",
    "known_terms",
    "register",
    "registered",
    "try_out",
]
