"""Measurements: this package's speed beside the machine's ceilings and beside its peers. Called by the command line."""
