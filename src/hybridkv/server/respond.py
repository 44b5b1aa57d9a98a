"""From an answer to a reply: one JSON object, or server-sent events as the text comes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hybridkv.server.answer import AnswerError, Delta, Finish, Scored, TokenText
from hybridkv.server.desk import Run
from hybridkv.server.refusals import RefusalError
from hybridkv.server.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Error,
    MessageDelta,
    Reply,
    TokenLogprob,
    TopLogprob,
    Usage,
)

KEEP_ALIVE_S = 10.0
"""A waiting stream says so as often: proxies keep it open, and a client that is gone is found out."""


class Writer(Protocol):
    """Writes one kind of reply."""

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> Reply:
        """The reply in one piece."""

    def opening(self) -> Iterable[Reply]:
        """Chunks before the first delta."""

    def chunk(self, delta: Delta) -> Reply:
        """A piece of a stream."""

    def closing(self, usage: Usage) -> Reply:
        """The chunk with the counts."""


class CompletionWriter:
    """Writes what `/v1/completions` answers."""

    def __init__(self, model: str, fingerprint: str, created: int) -> None:
        self._head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> Completion:
        """The reply in one piece."""
        scored = [s for delta in deltas for s in delta.scored]
        choice = self._choice("".join(delta.text for delta in deltas), scored, _finish(deltas))
        return Completion(**self._head, choices=[choice], usage=usage)

    def opening(self) -> Iterable[Completion]:
        """Nothing."""
        return ()

    def chunk(self, delta: Delta) -> Completion:
        """A piece of a stream."""
        return Completion(**self._head, choices=[self._choice(delta.text, delta.scored, delta.finish)])

    def closing(self, usage: Usage) -> Completion:
        """The chunk with the counts."""
        return Completion(**self._head, choices=[], usage=usage)

    def _choice(self, text: str, scored: Sequence[Scored], finish: Finish | None) -> CompletionChoice:
        logprobs = None
        if scored:
            tops = [{t.readable: t.logprob for t in s.top} for s in scored]
            logprobs = CompletionLogprobs(
                tokens=[s.token.readable for s in scored],
                token_logprobs=[s.token.logprob for s in scored],
                top_logprobs=tops if any(tops) else None,
                text_offset=[s.start for s in scored],
            )
        return CompletionChoice(text=text, logprobs=logprobs, finish_reason=finish)


class ChatWriter:
    """Writes what `/v1/chat/completions` answers."""

    def __init__(self, model: str, fingerprint: str, created: int) -> None:
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> ChatCompletion:
        """The reply in one piece."""
        finish = _finish(deltas)
        assert finish is not None
        choice = ChatChoice(
            message=AssistantMessage(content="".join(delta.text for delta in deltas)),
            logprobs=_chat_logprobs([s for delta in deltas for s in delta.scored]),
            finish_reason=finish,
        )
        return ChatCompletion(**self._head, choices=[choice], usage=usage)

    def opening(self) -> Iterable[ChatChunk]:
        """Who speaks."""
        yield self._chunk(MessageDelta(role="assistant", content=""), None, None)

    def chunk(self, delta: Delta) -> ChatChunk:
        """A piece of a stream."""
        message = MessageDelta(content=delta.text or None)
        return self._chunk(message, _chat_logprobs(delta.scored), delta.finish)

    def closing(self, usage: Usage) -> ChatChunk:
        """The chunk with the counts."""
        return ChatChunk(**self._head, choices=[], usage=usage)

    def _chunk(self, delta: MessageDelta, logprobs: ChatLogprobs | None, finish: Finish | None) -> ChatChunk:
        choice = ChatChunkChoice(delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self._head, choices=[choice])


def _finish(deltas: Sequence[Delta]) -> Finish | None:
    return deltas[-1].finish


def _chat_logprobs(scored: Sequence[Scored]) -> ChatLogprobs | None:
    if not scored:
        return None
    content = [
        TokenLogprob(**_fields(s.token), top_logprobs=[TopLogprob(**_fields(top)) for top in s.top]) for s in scored
    ]
    return ChatLogprobs(content=content)


def _fields(token: TokenText) -> dict[str, Any]:
    return {"token": token.readable, "logprob": token.logprob, "bytes": list(token.raw)}


async def respond(run: Run, writer: Writer, request: Request, *, stream: bool, with_usage: bool) -> Response:
    """The reply to a request that was started.

    Raises
    ------
    RefusalError
        If the engine fails before there is a reply.
    """
    if stream:
        return EventStream(run, _events(run, writer, with_usage=with_usage))
    try:
        deltas = await _unless_gone(run, request)
    except AnswerError as error:
        raise _failure(error) from error
    finally:
        run.cancel()
    if deltas is None:
        return Response(status_code=499)  # to nobody
    return Response(writer.whole(deltas, run.usage).model_dump_json(), media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, nothing is generated for it any more."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the client leaves."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._run.cancel()


async def _events(run: Run, writer: Writer, *, with_usage: bool) -> AsyncIterator[bytes]:
    """The stream's bytes. `usage` is null in every chunk but the last, if it was asked for, and else not there."""

    def event(reply: Reply) -> bytes:
        text = reply.model_dump_json(exclude=None if with_usage else {"usage"})
        return f"data: {text}\n\n".encode()

    yield b"".join(map(event, writer.opening())) or b": hello\n\n"
    try:
        async for deltas in run.deltas(idle_s=KEEP_ALIVE_S):
            pieces = [piece for delta in deltas for piece in _pieces(delta)]
            if pieces:
                yield b"".join(event(writer.chunk(piece)) for piece in pieces)
            elif not deltas:
                yield b": still here\n\n"
    except AnswerError as error:
        # The status is sent: all that is left is to say it here, and not to end as if all were well.
        yield f"data: {Error(error=_failure(error).body).model_dump_json()}\n\n".encode()
        return
    if with_usage:
        yield event(writer.closing(run.usage))
    yield b"data: [DONE]\n\n"


def _pieces(delta: Delta) -> Iterable[Delta]:
    """The text first, then the end in a chunk of its own, as OpenAI sends it."""
    if delta.text or delta.scored:
        yield Delta(delta.text, delta.scored)
    if delta.finish is not None:
        yield Delta(finish=delta.finish)


def _failure(error: AnswerError) -> RefusalError:
    if error.reason == "cancelled":
        return RefusalError(503, f"not finished: {error.message}", code="stopping")
    return RefusalError(500, error.message, code="engine_failed")


async def _unless_gone(run: Run, request: Request) -> list[Delta] | None:
    """The whole answer; None if the client leaves before it is there."""

    async def collect() -> list[Delta]:
        return [delta async for deltas in run.deltas() for delta in deltas]

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
    """A reply of another kind."""
    return Response(reply.model_dump_json(), status, media_type="application/json")
