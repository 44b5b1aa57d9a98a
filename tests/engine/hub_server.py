"""A server that plays Hugging Face's hub, for one repository at a time."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it holds, and what was asked.

    Attributes
    ----------
    files
        Of each repository, by name.
    cut_after
        Bytes after which the connection of the next download is cut; None for none.
    """

    files: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut_after: int | None = None
    url: str = ""


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.requests.append((self.command, path, self.headers.get("Range")))
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                self._api("/".join(parts[2:4]), parts[4:], body=body)
            else:
                self._file("/".join(parts[:2]), "/".join(parts[4:]), body=body)

        def _api(self, name: str, rest: list[str], *, body: bool) -> None:
            files = hub.files.get(name)
            if files is None or name in hub.gated:
                code = "GatedRepo" if name in hub.gated else "RepoNotFound"
                self._send(403 if name in hub.gated else 404, b"{}", body=body, headers={"X-Error-Code": code})
            elif rest[:1] == ["tree"]:
                rows = [{"type": "file", "path": f, "size": len(d), "oid": _etag(d)} for f, d in files.items()]
                self._send(200, json.dumps(rows).encode(), body=body)
            else:
                siblings = [{"rfilename": file} for file in files]
                said = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self._send(200, json.dumps(said).encode(), body=body)

        def _file(self, name: str, file: str, *, body: bool) -> None:
            data = hub.files.get(name, {}).get(file)
            if data is None:
                self._send(404, b"", body=body, headers={"X-Error-Code": "EntryNotFound"})
                return
            headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            begin = 0
            if asked := self.headers.get("Range"):
                begin = int(asked.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            self._send(206 if begin else 200, data[begin:], body=body, headers=headers)

        def _send(self, status: int, data: bytes, *, body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            if hub.cut_after is not None and len(data) > hub.cut_after:
                data, hub.cut_after = data[: hub.cut_after], None
                self.wfile.write(data)
                self.close_connection = True
                return
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
