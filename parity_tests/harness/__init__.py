"""Everything generated from a declared pair: inputs, comparison, checks, variants, census, report."""
