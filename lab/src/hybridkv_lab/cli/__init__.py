"""The commands of `hybridkv-lab`, which the command line finds by their entry points."""
