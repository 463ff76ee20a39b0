"""Layers: parameters and production operations, no mathematics of their own; names as in ``so8t_jax.nn``."""
