"""Definitions, one room per piece of mathematics, each on one example; batch with ``jax.vmap``."""
