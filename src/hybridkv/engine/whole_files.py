"""Sessions reach the disk whole or not at all: written beside their place, brought to disk, and moved there at once.

Owns partial files (`.NAME.PID.part`), and what becomes of those that a killed process left. Knows nothing of what is
written. Called by `session.py`, and by the server for its directory.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from fcntl import LOCK_EX, LOCK_NB, flock
from glob import escape
from io import BufferedIOBase
from pathlib import Path

_PART = re.compile(r"\..+\.(?P<pid>\d{1,9})\.part")
_PART_SECONDS = 60.0
"""A file that is older and locked by nobody is stale, even if another process has its writer's id by now."""


def remove_leftovers(directory: Path) -> int:
    """Remove what killed processes left half written of a directory's files; return the number of files."""
    return _remove_stale(part for part in directory.glob(".*.safetensors.*.part") if _PART.fullmatch(part.name))


def write_whole(path: Path, data: bytes) -> None:
    """Write all of `data` at `path`, or nothing."""
    _remove_stale(path.parent.glob(f".{escape(path.name)}.*.part"))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            _lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name is on disk too
    finally:
        os.close(directory)


def _lock(file: BufferedIOBase) -> bool:
    """Lock a file that is being written, until it is closed or the process ends; whether nobody else has."""
    try:
        flock(file.fileno(), LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: process ids must do
    return True


def _remove_stale(parts: Iterable[Path]) -> int:
    n_removed = 0
    for part in parts:
        try:
            with part.open("rb") as file:
                if not _lock(file) or not _is_stale(part):
                    continue
                part.unlink()
        except OSError:
            continue  # gone already, or another user's
        n_removed += 1
    return n_removed


def _is_stale(part: Path) -> bool:
    """Check whether the writer of a partial file (`.NAME.PID.part`) that nobody locks is gone."""
    found = _PART.fullmatch(part.name)
    if found is None:
        return False
    pid = int(found["pid"])
    if pid == os.getpid():
        return True  # in a container, the next process has the id of the one before
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return time.time() - part.stat().st_mtime > _PART_SECONDS
