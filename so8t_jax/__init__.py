"""Reference mathematics in JAX: the definition that production is judged against."""
