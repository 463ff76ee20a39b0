"""The ``so8t`` command."""
