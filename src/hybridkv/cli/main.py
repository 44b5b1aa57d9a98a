"""`hybridkv`: one entry point, one file per sub-command, one way to end in an error.

Heavy imports happen inside the commands, so that help and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import NoReturn

from hybridkv import __version__
from hybridkv.cli import chat, classify, convert, doctor, elsewhere, models, plan, run, serve
from hybridkv.cli.added import added_commands, check_lab, epilog
from hybridkv.cli.collector import pause_collector
from hybridkv.cli.llama_cpp import accept_options, accepted_names, llama_option, options_from_variables, say_accepted
from hybridkv.cli.show import notice, warning
from hybridkv.errors import HybridKVError, UsageError

_VERSION = f"hybridkv {__version__}"

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_COMMANDS = (run, chat, serve, classify, plan, convert, models, doctor)
_LLAMA_CPP = (run, chat, serve, plan)
"""Commands that take llama.cpp's command lines."""

_OPTION = re.compile(r"--?[A-Za-z][\w-]*")


class Parser(argparse.ArgumentParser):
    """An argument parser that ends in our errors instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into a `UsageError`."""
        raise UsageError(message, hint=_hint(message) or f"`{self.prog} --help` lists all options")

    def check_options(self, argv: Sequence[str], others: Mapping[str, Parser] | None = None) -> None:
        """Refuse unknown options by their own name; argparse reads `-ngl` as `-n gl`.

        Parameters
        ----------
        others
            The other commands, one of which may have the option.

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
                raise UsageError(f"unknown option {option!r}", hint=self._hint_for(option, others or {}))

    def _hint_for(self, option: str, others: Mapping[str, Parser]) -> str:
        """Name the commands that have an option, or the nearest option of this one."""
        if llama_option(option) is not None:
            owners = [name for name, other in others.items() if option in other._option_string_actions]
            if owners:
                return f"it is an option of `hybridkv {owners[0]}`"
        if option in elsewhere.OPTIONS:
            return elsewhere.OPTIONS[option]
        own = sorted(self._option_string_actions.keys() - accepted_names(self))
        near = get_close_matches(option, own, n=1, cutoff=0.7)
        return f"did you mean {near[0]!r}?" if near else f"`{self.prog} --help` lists all options"


def _hint(message: str) -> str | None:
    """Suggest a remedy for one of argparse's complaints, where it is more than the list of options."""
    if "expected one argument" in message:
        return 'a value that begins with a dash takes an equals sign: -p="-like this"'
    if match := re.search(r"invalid (int|float) value", message):
        return "give a whole number" if match[1] == "int" else "give a number"
    return None


def build_parser(added: Sequence[ModuleType] | None = None) -> tuple[Parser, dict[str, Parser]]:
    """Build the whole command line, and each command's own parser: `run`, ..., `bench`, `bench attention`, ...

    Parameters
    ----------
    added
        Commands of other distributions; None for those that are installed.
    """
    modules = (*_COMMANDS, *(added_commands() if added is None else added))
    parser = Parser(
        prog="hybridkv",
        description="Run hybrid recurrent/attention language models with a quantized KV cache.",
        epilog=epilog([module.NAME for module in modules]),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_VERSION)
    commands: dict[str, Parser] = {}
    _add_commands(parser, modules, "", commands)
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
            if module in _LLAMA_CPP:
                command.add_argument("--version", action="version", version=_VERSION, help="print the version")
                command.add_argument("--usage", action="help", help=argparse.SUPPRESS)
                accept_options(command, module.NAME)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    own = bool(argv) and argv[0] in [module.NAME for module in _COMMANDS]
    parser, commands = build_parser(() if own else None)
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
            check_lab(full, names)
            near = get_close_matches(full, names, n=1)
            hint = elsewhere.COMMANDS.get(word) or (f"did you mean {near[0]!r}?" if near else example)
            raise UsageError(f"unknown {kind} {word!r}; allowed: {allowed}", hint=hint)
        name, chosen = full, commands[full]
    rest = [_with_dashes(word, chosen) for word in rest]
    chosen.check_options(rest, commands)
    words = _words_of_variables(chosen)
    parsed, stray = parser.parse_known_args([*name.split(), *words, *rest])
    if stray:
        raise UsageError(f"unrecognized arguments: {' '.join(stray)}", hint=elsewhere.stray_hint(stray, parsed))
    return parsed


def _with_dashes(word: str, command: Parser) -> str:
    """Spell `--top_k` as `--top-k`, as llama.cpp does."""
    option, equals, value = word.partition("=")
    dashed = option.replace("_", "-")
    known = word.startswith("--") and option not in command._option_string_actions
    return dashed + equals + value if known and dashed in command._option_string_actions else word


def _words_of_variables(command: Parser) -> list[str]:
    """List the options that llama.cpp's environment variables stand for; print no values, since one is a key."""
    words, used, idle = options_from_variables(os.environ, command._option_string_actions)
    if os.environ.get("RANK", "0") == "0":
        if used:
            notice(f"from the environment: {', '.join(used)}")
        if idle:
            warning(f"environment variables without effect here: {', '.join(idle)}")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit code."""
    if argv is not None:
        return _main(argv)
    pause_collector()
    return _main(sys.argv[1:])


def _run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; `serve --ray` has a file of its own, above that of `serve`."""
    if arguments.main is serve.main and arguments.ray is not None:
        from hybridkv.cli import serve_ray

        return serve_ray.main(arguments)
    code: int = arguments.main(arguments)
    return code


def _main(argv: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no such character gets a question mark
    try:
        arguments = _parse(argv)
        if arguments.main is not plan.main:
            say_accepted(arguments)
        code = _run(arguments)
        sys.stdout.flush()
    except HybridKVError as error:
        sys.stdout.flush()
        if isinstance(error, UsageError) and error.hint is None:
            error.hint = f"`{' '.join(['hybridkv', *argv[:1]])} --help` lists all options"
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
