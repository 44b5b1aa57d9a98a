"""A replica of the server on Ray Serve: the application of one process, and its scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import Message

from hybridkv.engine import Scheduler
from hybridkv.server.app import create_app
from hybridkv.server.cluster import HEALTH_SECONDS, REPLICA_HEADER, Forwarded
from hybridkv.server.gate import GateOptions, GateState
from hybridkv.server.request_handler import Served


class ModelLoader(Protocol):
    """A replica's way to its model; pickled, and carried out where the replica is."""

    def __call__(self) -> tuple[Served, Scheduler]:
        """Load the model."""


class Replica:
    """One model and its scheduler, in a process of its own.

    Parameters
    ----------
    loader
        Loads the model.
    """

    def __init__(self, loader: ModelLoader) -> None:
        served, self._scheduler = loader()
        self._name = serve.get_replica_context().replica_tag
        # The front's gate has let the request in.
        self._app = create_app(served, GateOptions(max_body_bytes=2**62), GateState())
        self._pool = ThreadPoolExecutor(1, "scheduler")
        self._running = self._pool.submit(self._scheduler.run_forever)

    async def answer(self, asked: Forwarded) -> AsyncIterator[list[Message]]:
        """Yield what the application sends in answer to a request: ASGI's messages, as many as there are each time."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        unread = [{"type": "http.request", "body": asked.body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(asked.scope, receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            last = False
            while not last:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                last = batch[-1] is None
                yield [self._signed(message) for message in batch if message is not None]
            await task  # what went wrong is for Ray's log
        finally:  # cancelled, if the client has left
            gone.set()
            if not task.done():
                task.cancel()
            await asyncio.wait([task])

    def _signed(self, message: Message) -> Message:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[REPLICA_HEADER] = self._name
        return message

    async def metrics(self) -> tuple[str, bytes]:
        """Return the replica's name and its counts."""
        messages = [m async for batch in self.answer(Forwarded(_get("/metrics"), b"")) for m in batch]
        return self._name, b"".join(message.get("body", b"") for message in messages)

    async def check_health(self) -> None:
        """Check that the scheduler's thread answers; called by Ray every few seconds.

        Raises
        ------
        RuntimeError
            If it has ended, or does not answer; Ray then replaces this replica.
        """
        if self._running.done():
            raise RuntimeError(f"the scheduler has ended: {self._running.exception()!r}")
        async with asyncio.timeout(HEALTH_SECONDS):
            await asyncio.wrap_future(self._scheduler.call(lambda: None))

    def __del__(self) -> None:
        """Shut the scheduler down; called by Ray before the process ends."""
        self._scheduler.shutdown(drain=False)
        self._pool.shutdown(wait=True)


def _get(path: str) -> dict[str, Any]:
    """Build a request of our own as ASGI says it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [],
    }
