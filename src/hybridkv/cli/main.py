"""`hybridkv`: one entry point, one file per sub-command, one way to end in an error.

Heavy imports happen inside the commands, so that help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import NoReturn

from hybridkv import __version__
from hybridkv.cli import bench, classify, convert, doctor, plan, report, run, serve, tune
from hybridkv.cli import eval as evaluate
from hybridkv.cli.collector import pause_collector
from hybridkv.cli.show import warning
from hybridkv.errors import HybridKVError, UsageError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_COMMANDS = (run, serve, classify, plan, evaluate, tune, report, bench, convert, doctor)
_OPTION = re.compile(r"--?[A-Za-z][\w-]*")


class Parser(argparse.ArgumentParser):
    """An argument parser that ends in our errors instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into a `UsageError`."""
        raise UsageError(message, hint=_hint(message) or f"`{self.prog} --help` lists what there is")

    def check_options(self, argv: Sequence[str]) -> None:
        """Refuse unknown options by their own name; argparse reads `-ngl` as `-n gl`.

        Raises
        ------
        UsageError
            With the nearest option there is.
        """
        known = list(self._option_string_actions)
        for argument in argv:
            option = argument.partition("=")[0]
            glued = len(option) > 2 and option[:2] in known and option[2].isdigit()
            if _OPTION.fullmatch(option) and option not in known and not glued:
                near = get_close_matches(option, known, n=1, cutoff=0.7)
                hint = f"did you mean {near[0]!r}?" if near else f"`{self.prog} --help` lists what there is"
                raise UsageError(f"unknown option {option!r}", hint=hint)


def _hint(message: str) -> str | None:
    """What helps with one of argparse's complaints, where it is more than the list of options."""
    if match := re.search(r"unrecognized arguments: (.*)", message):
        return f'a prompt needs its option: -p "{match[1]}"'
    if "expected one argument" in message:
        return 'a value that begins with a dash takes an equals sign: -p="-like this"'
    return None


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole command line, and each command's own parser: `run`, ..., `bench`, `bench attention`, ..."""
    parser = Parser(
        prog="hybridkv",
        description="Run hybrid recurrent/attention language models with a quantized KV cache.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hybridkv {__version__}")
    commands: dict[str, Parser] = {}
    _add_commands(parser, _COMMANDS, "", commands)
    return parser, commands


def _add_commands(parser: Parser, modules: Sequence[ModuleType], above: str, commands: dict[str, Parser]) -> None:
    """Add sub-commands to `parser`. A module with `COMMANDS` has sub-commands of its own, any other has options."""
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in modules:
        name = f"{above} {module.NAME}".strip()
        command = subparsers.add_parser(module.NAME, help=module.HELP, description=module.HELP, allow_abbrev=False)
        commands[name] = command
        if hasattr(module, "COMMANDS"):
            _add_commands(command, module.COMMANDS, name, commands)
        else:
            module.add_arguments(command)
            command.set_defaults(main=module.main)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, commands = build_parser()
    name, chosen, rest = "", parser, list(argv)
    while names := [full for full in commands if full.rpartition(" ")[0] == name]:
        kind, allowed = name or "command", ", ".join(full.rpartition(" ")[2] for full in names)
        example = "try hybridkv bench attention --quick" if name else 'try hybridkv run -p "Hello world"'
        if not rest:
            raise UsageError(f"no {kind} was given; allowed: {allowed}", hint=example)
        word = rest.pop(0)
        if word.startswith("-") and word in chosen._option_string_actions:
            return parser.parse_args(argv)  # --help, --version
        full = f"{name} {word}".strip()
        if full not in commands:
            near = get_close_matches(full, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else example
            raise UsageError(f"unknown {kind} {word!r}; allowed: {allowed}", hint=hint)
        name, chosen = full, commands[full]
    chosen.check_options(rest)
    return parser.parse_args(argv)


def _warn_of_variables() -> None:
    """Say that llama.cpp's environment variables have no effect here; names alone, one value is a key."""
    names = sorted(name for name in os.environ if name.startswith("LLAMA_ARG_") or name == "LLAMA_API_KEY")
    if names and os.environ.get("RANK", "0") == "0":
        warning(f"environment variables are not read, options are; without effect: {', '.join(names)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    if argv is not None:
        return _main(argv)
    pause_collector()
    return _main(sys.argv[1:])


def _main(argv: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no such character gets a question mark
    try:
        arguments = _parse(argv)
        _warn_of_variables()
        code: int = arguments.main(arguments)
        sys.stdout.flush()
    except HybridKVError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head -1`) has what it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code
