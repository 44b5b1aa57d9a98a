"""The memory that a process can still get: the machine's, and its containers' limits.

Owns reading of /proc and of control groups, versions 1 and 2. Counts nothing of a model (`planner.py`, `held.py`) and
refuses nothing (`cli/fits.py`). Swap is not counted: weights are read whole for every token.

Source: the kernel's Documentation/filesystems/proc.rst, admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_UNLIMITED = 2**60
"""Version 1 writes no limit as the largest number of whole pages."""


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that a process can get, and who says so."""

    n_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class _Group:
    """The files in which a version of control groups keeps its figures."""

    limit: str
    usage: str
    cache: tuple[str, ...]


_V1 = _Group("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = _Group("memory.max", "memory.current", ("inactive_file", "active_file"))


def available_memory(root: Path = Path("/")) -> Available | None:
    """Find the least that the machine and the containers around this process leave; None if nothing says.

    Parameters
    ----------
    root
        What /proc and /sys are read below; the system's own if it is /.
    """
    found = [one for one in (_of_machine(root), *_of_groups(root)) if one is not None]
    return min(found, key=lambda one: one.n_bytes, default=None)


def _of_machine(root: Path) -> Available | None:
    for line in _lines(root / "proc/meminfo"):
        words = line.split()
        if words[:1] == ["MemAvailable:"] and len(words) > 1 and words[1].isdigit():
            return Available(int(words[1]) * 1024, "free on this machine")
    if root != Path("/"):
        return None
    names = getattr(os, "sysconf_names", {})  # none on Windows
    for pages, source in (("SC_AVPHYS_PAGES", "free on this machine"), ("SC_PHYS_PAGES", "in this machine")):
        if pages in names and "SC_PAGE_SIZE" in names and os.sysconf(pages) > 0:
            return Available(os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE"), source)
    return None


def _of_groups(root: Path) -> Iterator[Available | None]:
    """Read what each control group around this process leaves, from its own up to the root."""
    paths: dict[str, str] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        fields, kind = mount.split(), system.split()
        if len(fields) < 5 or not kind:
            continue
        if kind[0] == "cgroup2" and "" in paths:
            yield from _walk(root, fields[4], fields[3], paths[""], _V2)
        elif kind[0] == "cgroup" and "memory" in kind[-1].split(",") and "memory" in paths:
            yield from _walk(root, fields[4], fields[3], paths["memory"], _V1)


def _walk(root: Path, mounted_at: str, mounted: str, path: str, group: _Group) -> Iterator[Available | None]:
    """Walk from a group upwards. `mounted` is the group that the mount shows, which in a container is its own."""
    top = root / mounted_at.lstrip("/")
    own, shown = PurePosixPath(path), PurePosixPath(mounted)
    inside = own.relative_to(shown) if own.is_relative_to(shown) else PurePosixPath()
    parts = () if ".." in inside.parts else inside.parts
    for depth in range(len(parts), -1, -1):
        yield _of_group(top.joinpath(*parts[:depth]), group)


def _of_group(directory: Path, group: _Group) -> Available | None:
    limit, usage = (_number(directory / name) for name in (group.limit, group.usage))
    if limit is None or usage is None or limit >= _UNLIMITED:
        return None
    # Cached files, such as a mapped model, are counted as used and given back when memory is asked for.
    stat = dict(line.split(maxsplit=1) for line in _lines(directory / "memory.stat") if " " in line)
    cached = sum(int(stat[name]) for name in group.cache if stat.get(name, "").isdigit())
    return Available(max(0, limit - max(0, usage - cached)), f"free in this container of {limit / 2**30:.2f} GiB")


def _number(path: Path) -> int | None:
    """Read a file's one number; None if it is not there, or says `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    """Read a file's lines; none if it cannot be read, as on systems that have no such file."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
