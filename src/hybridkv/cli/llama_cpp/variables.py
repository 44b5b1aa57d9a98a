"""llama.cpp's environment variables as the options that they stand for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hybridkv.cli.llama_cpp.record import LlamaOption
from hybridkv.cli.llama_cpp.table import LLAMA_OPTIONS

_PREFIX = "LLAMA_ARG_"
_YES, _NO = ("on", "enabled", "true", "1"), ("off", "disabled", "false", "0")
_OWN = ("HF_TOKEN",)
"""Read by the library that it belongs to."""


def options_from_variables(
    environment: Mapping[str, str], known: Collection[str]
) -> tuple[list[str], list[str], list[str]]:
    """Return words for the front of a command line, the variables that they are of, and those without effect.

    An option on the command line comes later and so replaces its variable.

    Parameters
    ----------
    known
        The options of the command.
    """
    words: list[str] = []
    used: list[str] = []
    for option in LLAMA_OPTIONS:
        if not option.env or option.env in _OWN:
            continue
        negative = option.env.replace(_PREFIX, f"{_PREFIX}NO_")
        name, value = (option.env, environment.get(option.env))
        if negative != option.env and negative in environment:
            name, value = negative, "0"
        if value is None or option.names[0] not in known:
            continue
        if given := _words(option, value):
            words += given
            used.append(name)
    every = {n for n in environment if n.startswith(_PREFIX) or n == "LLAMA_API_KEY"}
    return words, used, sorted(every - set(used))


def _words(option: LlamaOption, value: str) -> list[str]:
    """Return the option that a variable is; nothing for a switch that it leaves off."""
    if option.takes != "":
        return [f"{option.names[0]}={value}"]
    off = [name for name in option.names if name.startswith(("--no-", "-no-", "-n"))]
    on = [name for name in option.names if name not in off]
    names = on if value.lower() in _YES else off if value.lower() in _NO else []
    if option.env.startswith(f"{_PREFIX}NO_"):
        names = list(option.names) if value.lower() not in _NO else []
    return names[:1]
