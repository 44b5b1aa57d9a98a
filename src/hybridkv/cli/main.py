"""`hybridkv`: one entry point, one file per sub-command, one way to end in an error.

Heavy imports happen inside the commands, so that help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from hybridkv import __version__
from hybridkv.cli import doctor, plan, run
from hybridkv.errors import HybridKVError, UsageError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser that ends in our errors instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into a `UsageError`."""
        raise UsageError(message, hint=f"`{self.prog} --help` lists what there is")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="hybridkv",
        description="Run hybrid recurrent/attention language models with a quantized KV cache.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hybridkv {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (run, plan, doctor):
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        code: int = arguments.main(arguments)
    except HybridKVError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code
