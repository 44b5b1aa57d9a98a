"""`hybridkv chat`: a conversation in the terminal; `hybridkv run -cnv` by another name."""

from __future__ import annotations

import argparse

from hybridkv.cli import run

NAME = "chat"
HELP = "talk with a model in the terminal, on a quantized KV cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hybridkv run`."""
    run.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the conversation."""
    arguments.conversation = not arguments.single_turn
    return run.main(arguments)
