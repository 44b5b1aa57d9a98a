"""The process around the application: its socket, its loop, and how it ends.

The socket is bound before a model is loaded, so that a busy port is said at once, and listens after, so that nobody
waits for a model that may not load. A first signal refuses new requests and lets running ones finish; a second ends
at once.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from hybridkv.errors import UsageError
from hybridkv.server.gate import GateState

_BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket that does not listen yet; port 0 takes a free one.

    Raises
    ------
    UsageError
        If there is no such host, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host {host!r}: {getattr(error, 'strerror', None) or error}",
            hint="127.0.0.1 is this machine alone, 0.0.0.0 every network it is on",
        ) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> UsageError:
    return UsageError(
        f"cannot listen on {host} port {port}: {error.strerror}", hint="try another --port; 0 takes a free one"
    )


def url_of(listener: socket.socket) -> str:
    """Build the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Check whether a bound socket is reached from this machine alone."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def is_local_host(host: str) -> bool:
    """Check whether what listens on a host is reached from this machine alone."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    del family, kind, protocol
    return ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback


class _Server(uvicorn.Server):
    """uvicorn's server, which drains before it closes."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: GateState,
        ready: Callable[[], None],
        draining: Callable[[int], None],
        stop_now: Callable[[], None],
        alive: Callable[[], bool],
    ) -> None:
        super().__init__(config)
        self._state, self._alive = state, alive
        self._ready, self._draining, self._stop_now = ready, draining, stop_now
        self._said = self.stopped_at_once = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the sockets, and say so only now that signals are handled: whoever reads it may send one at once."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's own signature
        """Handle signals: the first drains, the second ends."""
        if self._state.stopping:
            self.stopped_at_once = True
            self._stop_now()
            self.should_exit = self.force_exit = True
        self._state.stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Decide whether to close: nothing is being answered and nothing more shall be, or nobody is left to answer."""
        drained = self._state.stopping and not self._state.in_flight
        if self._state.stopping and not (drained or self._said):
            self._said = True  # here, since a signal may come in the middle of a line that is being written
            self._draining(self._state.in_flight)
        return await super().on_tick(counter) or drained or not self._alive()


def run(
    app: ASGIApp,
    listener: socket.socket,
    state: GateState,
    *,
    ready: Callable[[], None],
    draining: Callable[[int], None],
    stop_now: Callable[[], None],
    alive: Callable[[], bool],
) -> bool:
    """Serve until a signal comes; whether everything that was running finished.

    Parameters
    ----------
    app
        What answers.
    listener
        A bound socket.
    state
        Of the gate in `app`.
    ready
        Called once the socket listens and signals are handled.
    draining
        Called after the first signal with the number of requests that are still answered, if there are any.
    stop_now
        Called if what runs shall not finish.
    alive
        Whether the engine runs; the server ends with it.

    Raises
    ------
    UsageError
        If another process has begun to listen on the port.
    """
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _cannot_listen(host, port, error) from error
    # Proxies keep idle connections for a minute and would use one that is just being closed.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        lifespan="off",
        backlog=_BACKLOG,
        server_header=False,
        timeout_keep_alive=75,
    )
    server = _Server(config, state, ready, draining, stop_now, alive)
    server.run(sockets=[listener])
    return not server.stopped_at_once
