"""What the libraries send in these calls, kept so that it is tested without them.

`WRITE_BODIES=1 pytest -n 0 tests/server/test_calls.py` writes it anew, where all of them are installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BODIES = Path(__file__).parents[2] / "data/clients/calls.json"


class Listening:
    """Plain ASGI around an application, which notes what comes."""

    def __init__(self, app: Any, heard: list[tuple[str, Any]]) -> None:
        self._app, self._heard = app, heard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        body = b""

        async def noting() -> Any:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.request" and not message.get("more_body") and body:
                self._heard.append((scope["path"], json.loads(body)))
                body = b""
            return message

        await self._app(scope, noting, send)


def _short(value: Any) -> Any:
    """The same with long texts cut: what a library writes into a prompt is its own, and does not matter here."""
    if isinstance(value, str):
        return value[:60]
    if isinstance(value, list):
        return [_short(held) for held in value]
    return {name: _short(held) for name, held in value.items()} if isinstance(value, dict) else value


def write(heard: dict[str, list[tuple[str, Any]]]) -> None:
    """Keep what was sent, each body once."""
    rows: list[Any] = []
    for name, requests in heard.items():
        for path, body in requests:
            row = {"call": name, "path": path, "body": _short(body)}
            if row not in rows:
                rows.append(row)
    BODIES.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
