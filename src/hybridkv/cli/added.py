"""Commands that other distributions add through the entry point group `hybridkv.commands`, as `hybridkv-lab` does."""

from __future__ import annotations

from types import ModuleType

from hybridkv.errors import HybridKVError, UsageError

GROUP = "hybridkv.commands"
LAB = ("eval", "tune", "report", "bench")
"""Commands of `hybridkv-lab`, in the order of the help: without it, its name is the hint."""
INSTALL = 'pip install "hybridkv[lab]"'


def added_commands() -> tuple[ModuleType, ...]:
    """Import every command that an installed distribution adds.

    Raises
    ------
    HybridKVError
        If one does not load: it is of another release.
    """
    from importlib import metadata  # 60 ms, for which `hybridkv run` does not wait

    points = {point.name: point for point in metadata.entry_points(group=GROUP)}
    names = [*(name for name in LAB if name in points), *sorted(points.keys() - set(LAB))]
    try:
        return tuple(points[name].load() for name in names)
    except ImportError as error:
        raise HybridKVError(f"an installed command does not load: {error}", hint=INSTALL) from error


def check_lab(word: str, allowed: list[str]) -> None:
    """Refuse a command of `hybridkv-lab` where that is not installed.

    Raises
    ------
    UsageError
        With what to install.
    """
    if word in LAB and word not in allowed:
        raise UsageError(f"`hybridkv {word}` is in hybridkv-lab, which is not installed", hint=INSTALL)


def epilog(names: list[str]) -> str | None:
    """Say in the help where the commands are that are missing."""
    missing = [name for name in LAB if name not in names]
    return f"{', '.join(missing)}: {INSTALL}" if missing else None
