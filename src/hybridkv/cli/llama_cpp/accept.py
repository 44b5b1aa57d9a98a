"""Take options of llama.cpp that a parser does not have, and say what each is here."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hybridkv.cli.llama_cpp.record import LlamaOption, Takes
from hybridkv.cli.llama_cpp.table import LLAMA_OPTIONS
from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

_GIVEN = "llama_cpp_options"
_NARGS: dict[Takes, Any] = {"": 0, "N": None, "[N]": "?", "N...": "+"}


@dataclass(frozen=True, slots=True)
class _Given:
    """An option as it was given."""

    spelling: str
    value: str | None
    option: LlamaOption


class _Accept(argparse.Action):
    """Keep what was given for `say_accepted`."""

    def __init__(self, option_strings: list[str], dest: str, *, option: LlamaOption) -> None:
        super().__init__(
            option_strings, dest, nargs=_NARGS[option.takes], default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        self.option = option

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Append to the list."""
        value = values if isinstance(values, str) else None
        given = [*getattr(namespace, self.dest, ()), _Given(option_string, value, self.option)]
        setattr(namespace, self.dest, given)


_OTHERS = "it is an option of `hybridkv {}`, and has no effect here"
_IN_REQUESTS = "requests say this: {}"
_SAID_BY_REQUESTS = {
    "-sys": "clients send system messages",
    "-sysf": "clients send system messages",
    "-r": "their `stop`",
    "--ignore-eos": "a server ends answers where the model does",
    **dict.fromkeys(("--grammar", "--grammar-file"), "their `grammar`"),
    **dict.fromkeys(("-j", "-jf"), "their `json_schema` or `response_format`"),
}


def accept_options(parser: argparse.ArgumentParser, command: str) -> None:
    """Add every option of the table that `parser` lacks, out of sight of the help.

    Parameters
    ----------
    command
        Whose parser it is: `serve`, or one of those that take a prompt.
    """
    for option in LLAMA_OPTIONS:
        names = [name for name in option.names if name not in parser._option_string_actions]
        if names:
            own = _elsewhere(option, command) if option.fate == "same" else option
            parser.add_argument(*names, dest=_GIVEN, action=_Accept, option=own)


def _elsewhere(option: LlamaOption, command: str) -> LlamaOption:
    """Describe what another command's option means to this command."""
    first = option.names[0]
    if command != "serve":
        return replace(option, fate="note", text=_OTHERS.format("serve"))
    if first in _SAID_BY_REQUESTS:
        return replace(option, fate="refused", text=_IN_REQUESTS.format(_SAID_BY_REQUESTS[first]))
    return replace(option, fate="note", text=_OTHERS.format("run"))


def accepted_names(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options that `accept_options` has added."""
    return {name for name, action in parser._option_string_actions.items() if isinstance(action, _Accept)}


def accepted_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options that were given and ask for something."""
    given = [one.spelling for one in getattr(arguments, _GIVEN, ()) if not one.option.is_off(one.value)]
    return list(dict.fromkeys(given))


def given_values(arguments: argparse.Namespace, firsts: Iterable[str]) -> list[tuple[str, str, str]]:
    """Return which of some options were given: the first name, the name that was used, and the value or ""."""
    wanted = set(firsts)
    given = [one for one in getattr(arguments, _GIVEN, ()) if one.option.names[0] in wanted]
    return [(one.option.names[0], one.spelling, one.value or "") for one in given]


def say_accepted(arguments: argparse.Namespace) -> None:
    """Print one line for each group of options that share a reason.

    Raises
    ------
    UsageError
        For one that would change the answer.
    """
    given: Iterable[_Given] = [one for one in getattr(arguments, _GIVEN, ()) if not one.option.is_off(one.value)]
    lines: dict[str, list[str]] = {}
    for one in given:
        if one.option.fate == "refused":
            raise UsageError(f"{one.spelling}: {one.option.text}", hint=f"leave {one.spelling} out")
        lines.setdefault(one.option.text, []).append(one.spelling)
    for text, options in lines.items():
        notice(f"{', '.join(dict.fromkeys(options))}: {text}")
