"""The benches' shared options and checks, and how peers and the JSON line are printed."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from hybridkv.cli.show import notice, stderr_console, stdout_console
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from hybridkv_lab.peers import Found

EXIT_WRONG = 1
"""A result failed its gate."""

MAX_THREADS = 1024
_QUIET_LOAD = 0.5


def add_bench_arguments(parser: argparse.ArgumentParser, *, types: str, against: str, quick: str) -> None:
    """Add `--types`, `--against`, `--quick`, `-t` and `--json`."""
    parser.add_argument(
        "--types", default=types, metavar="T,...", help=f"KV cache types, the same for K and V (default {types})"
    )
    parser.add_argument(
        "--against",
        default=against,
        metavar="PEER,...",
        help=f"other programs to time in turns with this one; empty for none (default {against})",
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("-t", "--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line of stdout, and tables on stderr"
    )


def types_from(text: str, option: str = "--types") -> list[str]:
    """Parse the types of `--types`, or of another option, in order, each once.

    Raises
    ------
    UsageError
        For an unknown type or an empty list.
    """
    from hybridkv.formats import get_format

    names = [get_format(name).name for name in words(text)]
    if not names:
        raise UsageError(
            f"{option} is empty; allowed: KV cache types, separated by commas", hint=f"try {option} q8_0,q4_0"
        )
    return list(dict.fromkeys(names))


def peers_from(text: str, allowed: Collection[str]) -> list[str]:
    """Parse the peers of `--against`.

    Raises
    ------
    UsageError
        For one that is not known.
    """
    names = words(text)
    for name in names:
        if name not in allowed:
            raise UsageError(
                f"--against: unknown peer {name!r}; allowed: {', '.join(allowed)}", hint="try --against ik"
            )
    return list(dict.fromkeys(names))


def threads_from(given: int | None) -> int:
    """Choose the number of threads: as given, or one per core.

    Raises
    ------
    UsageError
        If it is out of range.
    """
    if given is None:
        return os.cpu_count() or 1
    check_range("-t", given, 1, MAX_THREADS)
    if given > (os.cpu_count() or 1):
        notice(f"-t {given} is more than this machine's {os.cpu_count()} cores")
    return given


def check_range(option: str, value: int, least: int, most: int) -> None:
    """Refuse a number out of range.

    Raises
    ------
    UsageError
        With the range.
    """
    if not least <= value <= most:
        raise UsageError(f"{option} {value}; allowed: {least} to {most}")


def words(text: str) -> list[str]:
    """Split text at commas, without blanks."""
    return [part.strip() for part in text.split(",") if part.strip()]


def progress_to_stderr(label: str) -> Callable[[str], None]:
    """Print a line on stderr per step, so that a long bench is seen to move."""
    return lambda line: print(f"{label}: {line}", file=sys.stderr, flush=True)


def table_console(*, json_on_stdout: bool) -> Console:
    """Choose the stream for tables."""
    return stderr_console() if json_on_stdout else stdout_console()


def notice_load() -> None:
    """Say it if the machine is busy: threads that wait for each other then tell nothing about a program."""
    from hybridkv_lab.machine import load

    if (now := load()) > _QUIET_LOAD:
        notice(f"this machine is busy (load {now:.1f}): figures and ratios taken now are unreliable")


def print_machine(console: Console, n_threads: int) -> None:
    """Print a line on what the figures were measured on."""
    from hybridkv_lab.machine import machine

    about = machine(n_threads)
    console.print(f"{about['cpu']}, {about['cores']} cores, {about['isa']}, {about['threads']} threads")


def print_peers(console: Console, peers: Collection[Found]) -> None:
    """Print what was found of each other program, or how to install it."""
    for peer in peers:
        console.print(f"{peer.name}: {peer.about}")


def print_json(result: dict[str, Any]) -> None:
    """Print a result as the last line of stdout."""
    print(json.dumps(result))
