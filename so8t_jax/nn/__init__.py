"""Layers in Flax NNX: parameters around the definitions, each on one example; batch with ``jax.vmap``."""
