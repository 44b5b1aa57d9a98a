"""Files mapped for weights: known as damaged if they shrink while they are read, and locked into memory if asked.

Without this, reading a page that is no longer in the file ends the process with a bus error.
"""

from __future__ import annotations

import errno
import os
import weakref

from hybridkv.errors import ModelFileError, UsageError
from hybridkv.kernels.cpu_native import _native, available


class WatchedMap:
    """Watches a map as long as it lives: pages that are gone read as zeros, and `is_damaged` says so.

    Parameters
    ----------
    name
        Of the file, for errors.
    address, n_bytes
        Of the map. Where the extension is not built, or the system has no such signal, nothing is watched.
    """

    def __init__(self, name: str, address: int, n_bytes: int) -> None:
        self._name = name
        self._map = _native().watch_map(address, n_bytes) if available() is None else -1
        _WATCHED.add(self)

    @property
    def is_damaged(self) -> bool:
        """True if pages were gone when they were read: what was computed from them is wrong."""
        return bool(self._map >= 0 and _native().is_damaged(self._map))

    def verify(self) -> None:
        """Refuse to use a file that has shrunk since it was mapped.

        Raises
        ------
        ModelFileError
            If pages were gone when they were read: what was computed from them is wrong.
        """
        if self.is_damaged:
            raise ModelFileError(
                f"{self._name} became shorter while its weights were read",
                hint="do not change a model file in use; start again, or take --no-mmap to read it at once",
            )

    def __del__(self) -> None:
        """Forget the map."""
        if getattr(self, "_map", -1) >= 0:
            _native().forget_map(self._map)


_WATCHED: weakref.WeakSet[WatchedMap] = weakref.WeakSet()


def verify_maps() -> None:
    """Verify every map that is in use; see `WatchedMap.verify`."""
    for watch in list(_WATCHED):
        watch.verify()


def populate(address: int, n_bytes: int) -> None:
    """Enter the pages of a map into this process's tables at once; where the system cannot, they come one by one."""
    if available() is None:
        _native().populate(address, n_bytes)


def lock_memory(address: int, n_bytes: int) -> None:
    """Keep a range of memory from being paged out.

    Raises
    ------
    UsageError
        If the system refuses, with its reason.
    """
    if (reason := available()) is not None:
        raise UsageError(f"--mlock: {reason}", hint="leave --mlock out")
    code: int = _native().lock_memory(address, n_bytes)
    if code:
        limited = code in (errno.EAGAIN, errno.ENOMEM, errno.EPERM)
        raise UsageError(
            f"--mlock: {n_bytes / 2**30:.2f} GiB cannot be locked into memory: {os.strerror(code)}",
            hint="raise the limit (ulimit -l), or leave --mlock out" if limited else "leave --mlock out",
        )
