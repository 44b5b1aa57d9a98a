"""Applies `hybridkv.server.habits` to requests as they come: plain ASGI between the gate and the application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybridkv.server.habits import Relaxed

IGNORED_HEADER = "x-hybridkv-ignored"
_MAX_HEADER = 1000
_LONG = 1 << 16
"""Bytes of a body that is read beside the event loop."""


class Relax:
    """Brings bodies of completions into our words, and says in a header what was left out.

    Parameters
    ----------
    app
        What answers.
    model
        The served model's name.
    notify
        Told of what was left out, once for each set of names.
    """

    def __init__(self, app: ASGIApp, *, model: str, notify: Callable[[str], None]) -> None:
        self._app, self._model, self._notify = app, model, notify
        self._said: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; the gate has read its body as a whole."""
        path = scope.get("path", "").rstrip("/")
        if scope["type"] != "http" or scope["method"] != "POST" or not path.endswith("/completions"):
            await self._app(scope, receive, send)
            return
        body = (await receive()).get("body", b"")
        chat = path.endswith("/chat/completions")
        if len(body) > _LONG:
            body, ignored = await asyncio.to_thread(_relaxed, body, chat=chat, model=self._model)
        else:
            body, ignored = _relaxed(body, chat=chat, model=self._model)
        if ignored and ignored not in self._said and len(self._said) < 1000:
            self._said.add(ignored)
            self._notify(f"passed over in a request: {ignored}")
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        async def signed(message: Message) -> None:
            if ignored and message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[IGNORED_HEADER] = ", ".join(filter(None, (ignored, headers.get(IGNORED_HEADER))))
            await send(message)

        await self._app(scope, replay, signed)


def _relaxed(body: bytes, *, chat: bool, model: str) -> tuple[bytes, str]:
    """Translate a body to our words, and name what was left out; unchanged if it is no object."""
    try:
        asked = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return body, ""  # what is wrong with it is for the application to say
    if not isinstance(asked, dict):
        return body, ""
    relaxed = Relaxed(asked, chat=chat, model=model)
    return json.dumps(relaxed.body).encode(), printable(", ".join(relaxed.ignored))


def _no_number(name: str) -> float:
    raise ValueError(name)


def printable(names: str) -> str:
    """Replace characters of names that a header may not carry."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in names)[:_MAX_HEADER]
