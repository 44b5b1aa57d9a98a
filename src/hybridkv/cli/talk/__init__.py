"""A conversation in the terminal: `hybridkv chat`, and `hybridkv run -cnv`."""
