"""Production operations, one room per piece of mathematics; names as in ``so8t_jax.ops``."""
