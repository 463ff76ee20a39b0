"""Backend choice, precision, kernel launch, configuration and errors: no mathematics."""
