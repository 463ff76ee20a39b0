"""One file per claim; every rival of a claim is timed in the same run."""
