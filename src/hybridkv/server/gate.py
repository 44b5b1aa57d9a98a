"""The gate that every request passes before it is read: host, key, shutdown, kind and size of the body.

Plain ASGI around the application, so that a body that is too large is refused while it arrives and a client that
leaves is noticed at once. Knows nothing of what requests mean.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybridkv.server.refusals import RETRY_AFTER_S, RefusalError

BODY_SECONDS = 60.0
"""Longest that a client may take to send a body."""

_LINGER_SECONDS = 2.0
_OPEN_PATHS = ("/", "/health", "/openapi.json", "/favicon.ico")
TAKES_BODY = re.compile(
    r"(/v1)?/(chat/)?completions/?|(/v1)?/embeddings/?|/(de)?tokenize/?|/v1/sessions/[^/]+/(save|restore)/?"
)
"""Paths whose POST brings a body; a POST to any other is a wrong method or path, which the application says."""


@dataclass(slots=True)
class GateOptions:
    """The limits of the gate.

    Attributes
    ----------
    api_keys
        One of these must come with every request but those for the page and for `/health`; none: no key is asked for.
    max_body_bytes
        Of a request.
    local_only
        Whether the `Host` of a request must be this machine's own name or address: a web page elsewhere that calls
        itself by a name of its own, and then moves that name to 127.0.0.1, does not get in.
    max_in_flight
        POST requests that are read or answered at once, so that their bodies have a bound together; None for no limit.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    local_only: bool = False
    max_in_flight: int | None = None


@dataclass(slots=True)
class GateState:
    """The gate's state while the server runs.

    Attributes
    ----------
    stopping
        Whether new work is refused.
    in_flight
        POST requests that are being answered.
    """

    stopping: bool = False
    in_flight: int = field(default=0)


class GateMiddleware:
    """Lets requests through to `app`.

    Parameters
    ----------
    app
        What answers.
    options
        What is let through.
    state
        Read and counted here, set by the code that stops the server.
    count
        Called with `(path, status)` after each reply; the path is that of a route, or `other`.
    """

    def __init__(
        self, app: ASGIApp, *, options: GateOptions, state: GateState, count: Callable[[str, int], None]
    ) -> None:
        self._app, self._options, self._state, self._count = app, options, state, count
        self._keys = tuple(key.encode() for key in options.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the application's start and end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # nginx's word for a client that left before there was a reply

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._serve(scope, receive, note_status)
        finally:
            self._count(getattr(scope.get("route"), "path", "other"), status)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope["method"] != "POST" or TAKES_BODY.fullmatch(scope["path"]) is None:
            refusal = self._refuse_head(scope, headers)
            await (self._app if refusal is None else refusal.response())(scope, receive, send)
            return
        refusal = self._refuse_head(scope, headers) or self._refuse_post(headers)
        if refusal is not None:
            await self._refuse_body(refusal, scope, receive, send)
            return
        self._state.in_flight += 1
        try:
            body = await self._body(receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), send)
        except RefusalError as late:
            await self._refuse_body(late, scope, receive, send)
        finally:
            self._state.in_flight -= 1

    def _refuse_head(self, scope: Scope, headers: Headers) -> RefusalError | None:
        """Refuse a request for its headers, whatever its method."""
        if self._options.local_only and not _is_local(headers.get("host", "")):
            return RefusalError(
                403, f"host {headers.get('host', '')!r}; allowed: localhost, 127.0.0.1, [::1]", code="foreign_host"
            )
        if self._keys and scope["path"] not in _OPEN_PATHS and not self._has_key(headers):
            return RefusalError(
                401,
                "a wrong API key, or none; send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")  # the bytes that were sent
        # All are compared, each in a time that does not depend on where they differ.
        matches = [hmac.compare_digest(key, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _refuse_post(self, headers: Headers) -> RefusalError | None:
        """Refuse a request that brings a body, before it is read."""
        if self._state.stopping:
            return _stopping()
        most = self._options.max_in_flight
        if most is not None and self._state.in_flight >= most:
            return RefusalError(
                429,
                f"{most} requests are being answered, as many as may",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        # A web page may send a form to any address without asking; JSON it may not.
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return RefusalError(415, f"content type {kind or 'none'!r}; allowed: application/json")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._options.max_body_bytes:
            return self._too_large(f"{int(length[:20])} bytes")
        return None

    def _too_large(self, what: str) -> RefusalError:
        return RefusalError(
            413, f"a body of {what}; allowed: {self._options.max_body_bytes} bytes (--max-body)", code="body_too_large"
        )

    async def _body(self, receive: Receive) -> bytes | None:
        """Read the body; None if the client left.

        Raises
        ------
        RefusalError
            If it is too large or too slow.
        """
        parts, n_bytes = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    n_bytes += len(part)
                    if n_bytes > self._options.max_body_bytes:
                        raise self._too_large(f"more than {self._options.max_body_bytes} bytes")
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise RefusalError(408, f"the body took more than {BODY_SECONDS:.0f} s to arrive") from error

    async def _refuse_body(self, refusal: RefusalError, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, and close the connection, whose next bytes would be the body's.

        Closing while bytes arrive resets the connection, and a client that is still sending would lose the reply; so
        it has a moment to read it.
        """
        response = refusal.response()
        response.headers["Connection"] = "close"
        headers = response.raw_headers
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
        if Headers(scope=scope).get("expect") is None:
            try:
                async with asyncio.timeout(_LINGER_SECONDS):
                    while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                        pass
            except TimeoutError:
                pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _stopping() -> RefusalError:
    later = {"Retry-After": str(RETRY_AFTER_S)}
    return RefusalError(503, "the server is shutting down", code="stopping", headers=later)


def _is_local(host: str) -> bool:
    """Check whether a `Host` header names this machine."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _replay(body: bytes, receive: Receive) -> Receive:
    """Build a `receive` that gives a body that was read before, and then what comes after it."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
