"""From an answer to a reply: one JSON object, or server-sent events as the text comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hybridkv.server.answer import AnswerError, Delta
from hybridkv.server.pending import PendingReply
from hybridkv.server.refusals import RefusalError
from hybridkv.server.relax import IGNORED_HEADER, printable
from hybridkv.server.replies import Error, Reply
from hybridkv.server.writers import Writer

KEEP_ALIVE_S = 10.0
"""A waiting stream says so as often: proxies keep it open, and a client that is gone is found out."""


async def respond(
    pending: PendingReply, writer: Writer, request: Request, *, stream: bool, with_usage: bool
) -> Response:
    """Reply to a request that was started.

    Raises
    ------
    RefusalError
        If the engine fails before there is a reply.
    """
    if stream:
        return EventStream(pending, _events(pending, writer, with_usage=with_usage), _headers(pending))
    try:
        deltas = await _unless_gone(pending, request)
    except AnswerError as error:
        raise _failure(error) from error
    finally:
        pending.cancel()
    if deltas is None:
        return Response(status_code=499)  # to nobody
    return Response(
        writer.whole(deltas, pending.usage).model_dump_json(), media_type="application/json", headers=_headers(pending)
    )


def _headers(pending: PendingReply) -> dict[str, str]:
    """Name the fields that the request has and nothing reads."""
    return {IGNORED_HEADER: printable(", ".join(pending.ignored))} if pending.ignored else {}


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, nothing is generated for it any more."""

    media_type = "text/event-stream"

    def __init__(self, pending: PendingReply, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"} | headers)
        self._pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._pending.cancel()


async def _events(pending: PendingReply, writer: Writer, *, with_usage: bool) -> AsyncIterator[bytes]:
    """Stream the events' bytes; with `usage`, which is null but in the last, where it was asked for."""

    def event(reply: Reply) -> bytes:
        text = reply.model_dump_json(exclude=None if with_usage else {"usage"})
        return f"data: {text}\n\n".encode()

    yield b"".join(map(event, writer.opening(len(pending.parts)))) or b": hello\n\n"
    try:
        async for deltas in pending.deltas(idle_s=KEEP_ALIVE_S):
            pieces = [(index, piece) for index, delta in deltas for piece in _pieces(delta)]
            if pieces:
                yield b"".join(event(writer.chunk(index, piece)) for index, piece in pieces)
            elif not deltas:
                yield b": still here\n\n"
    except AnswerError as error:
        # The status is sent: all that is left is to say it here, and not to end as if all were well.
        yield f"data: {Error(error=_failure(error).body).model_dump_json()}\n\n".encode()
        return
    if with_usage:
        yield event(writer.closing(pending.usage))
    yield b"data: [DONE]\n\n"


def _pieces(delta: Delta) -> Iterable[Delta]:
    """Yield thoughts and text first, then calls, then the end in a chunk of its own, as OpenAI sends it."""
    if delta.reasoning:
        yield Delta(reasoning=delta.reasoning)
    if delta.text or delta.scored:
        yield Delta(delta.text, delta.scored)
    for call in delta.calls:
        yield Delta(calls=(call,))
    if delta.finish is not None:
        yield Delta(finish=delta.finish)


def _failure(error: AnswerError) -> RefusalError:
    if error.reason == "cancelled":
        return RefusalError(503, f"not finished: {error.message}", code="stopping")
    return RefusalError(500, error.message, code="engine_failed")


async def _unless_gone(pending: PendingReply, request: Request) -> list[list[Delta]] | None:
    """Collect the whole answers; None if the client leaves before they are there."""

    async def collect() -> list[list[Delta]]:
        answers: list[list[Delta]] = [[] for _ in pending.parts]
        async for deltas in pending.deltas():
            for index, delta in deltas:
                answers[index].append(delta)
        return answers

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.create_task(collect()), asyncio.create_task(gone())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        leaving.cancel()


def json_response(reply: Reply, status: int = 200) -> Response:
    """Write a reply as JSON."""
    return Response(reply.model_dump_json(), status, media_type="application/json")
