"""Conversations that outlive the server: which request was a session's last, and its file.

A request names its session; saving writes what the stored prefixes hold of the last one that has ended. Restoring puts
it back among the stored prefixes, where any later request that begins with the same tokens finds it.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

from hybridkv.engine.requests import RequestHandle
from hybridkv.engine.whole_files import remove_leftovers
from hybridkv.errors import SessionError
from hybridkv.server.refusals import RefusalError
from hybridkv.server.replies import Session
from hybridkv.server.schema import ID_PATTERN

MAX_REMEMBERED = 1024
"""Sessions whose last request is known; the one that was used longest ago is forgotten first."""

_STOP_SECONDS = 30.0


class Keeper(Protocol):
    """The scheduler, as far as sessions need it. Both block and are for any thread but its own."""

    def save(self, handle: RequestHandle, path: Path) -> int:
        """Write a sequence; the tokens that are held."""

    def restore(self, path: Path) -> tuple[int, ...]:
        """Read it back; its tokens."""


class Sessions:
    """The sessions of one server.

    Parameters
    ----------
    keeper
        Reads and writes files.
    directory
        Where they are; None keeps none. What killed servers left there half written is removed.
    """

    def __init__(self, keeper: Keeper, directory: Path | None) -> None:
        if directory is not None:
            remove_leftovers(directory)
        self._keeper, self._directory = keeper, directory
        self._last: OrderedDict[str, RequestHandle] = OrderedDict()

    def check(self, name: str | None) -> None:
        """Refuse a request that names a session where none are kept.

        Raises
        ------
        RefusalError
            Saying how to have them kept.
        """
        if name is not None:
            self._path(name)

    def remember(self, name: str | None, handle: RequestHandle) -> None:
        """Remember a session's newest request."""
        if name is None:
            return
        self._last[name] = handle
        self._last.move_to_end(name)
        while len(self._last) > MAX_REMEMBERED:
            self._last.popitem(last=False)

    async def save(self, name: str) -> Session:
        """Write a session's file, whole or not at all.

        Raises
        ------
        RefusalError
            For a session without requests, or with one that runs; for what cannot be kept.
        """
        path = self._path(name)
        handle = self._last.get(name)
        if handle is None:
            raise RefusalError(404, f"no request of this server has named session {name!r}", code="session_not_found")
        if handle.cancelled:  # a stop string ended the reply, and the scheduler is about to hear of it
            await asyncio.to_thread(handle.wait, _STOP_SECONDS)
        if not handle.finished:
            raise RefusalError(409, f"session {name!r} is being answered; save it then", code="session_busy")
        try:
            n_held = await asyncio.to_thread(self._keeper.save, handle, path)
        except SessionError as error:
            raise RefusalError(409, str(error), code="session_not_saved") from error
        return Session(id=name, n_tokens=len(handle.token_ids), n_held=n_held)

    async def restore(self, name: str) -> Session:
        """Read a session's file.

        Raises
        ------
        RefusalError
            If there is none, or it does not fit this model or the room for stored prefixes.
        """
        path = self._path(name)
        if not path.is_file():
            raise RefusalError(404, f"session {name!r} has not been saved", code="session_not_found")
        try:
            tokens = await asyncio.to_thread(self._keeper.restore, path)
        except SessionError as error:
            # The file's place on this machine is nobody's business.
            raise RefusalError(
                409, str(error).replace(str(path), f"session {name!r}"), code="session_not_restored"
            ) from error
        return Session(id=name, n_tokens=len(tokens), n_held=None)

    def _path(self, name: str) -> Path:
        if self._directory is None:
            raise RefusalError(404, "this server keeps no sessions; it needs --session-dir DIR", code="no_sessions")
        if re.fullmatch(ID_PATTERN, name, re.ASCII) is None:
            raise RefusalError(400, f"session {name!r}; allowed: 1 to 64 letters, digits, _ and -", param="session")
        return self._directory / f"{name}.safetensors"
