"""The judge: declares each pair of reference and production, and tests all of them the same way."""
