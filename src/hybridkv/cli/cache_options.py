"""The options that say how the KV cache is stored, in llama-cli's own spellings, and what they mean here."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv.errors import UsageError
from hybridkv.options import DEFAULT_TYPE, KV_OPTIONS, KVOption, kv_option

if TYPE_CHECKING:
    from hybridkv.policy import AnyPolicy


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options of how the cache is stored, the guard, and a file instead of them."""
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--kv-config",
        metavar="FILE",
        help="per-layer types from a `hybridkv tune` file; replaces all KV-cache options except --kv-guard",
    )
    add_options(group, KV_OPTIONS)
    group.add_argument(
        "--kv-guard",
        default="check",
        metavar="MODE",
        help="check: measure the first prompt and store layers that fail in more bits; upgrade: types under 8 bits "
        "become q8_0; warn: only warn; strict: end with an error; off (default check)",
    )


def add_options(group: argparse._ActionsContainer, options: Iterable[KVOption]) -> None:
    """Add these options to a parser or a group of one."""
    for option in options:
        if option.is_switch:
            group.add_argument(*option.flags, action="store_true", help=option.help)
        elif option.kind == "count":
            group.add_argument(*option.flags, type=int, metavar=option.metavar, help=option.help)
        else:
            group.add_argument(*option.flags, metavar=option.metavar, help=option.help)


def given_options(arguments: argparse.Namespace, options: Iterable[KVOption] = KV_OPTIONS) -> dict[str, Any]:
    """Collect the options that were given, by name; those that are not are None or False."""
    values = ((option.name, getattr(arguments, option.dest)) for option in options)
    return {name: value for name, value in values if value is not None and value is not False}


def given_types(arguments: argparse.Namespace) -> bool:
    """Check whether any option sets the types of K and V."""
    return any(kv_option(name).kind in ("type", "override") for name in given_options(arguments))


def policy_from(arguments: argparse.Namespace) -> AnyPolicy:
    """Build the policy that the options ask for.

    Raises
    ------
    UsageError
        For an unknown type, rule or count, or for a file together with what it says itself.
    """
    from hybridkv.policy import policy_of, read_config

    given = given_options(arguments)
    if arguments.kv_config is None:
        return policy_of(given, default_type=DEFAULT_TYPE)
    if given:
        names = ", ".join(kv_option(name).flag for name in given)
        raise UsageError(
            f"--kv-config was given together with {names}, which the file already sets",
            hint=f"leave {names} out, or change the file",
        )
    return read_config(Path(arguments.kv_config))
