"""Writes replies in OpenAI's two shapes, whole and as chunks of a stream, from the deltas of answers."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from hybridkv.server.answer import Delta, Finish, Scored, TokenText
from hybridkv.server.channels import CallDelta
from hybridkv.server.replies import (
    AssistantMessage,
    Call,
    Called,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    MessageDelta,
    Reply,
    TokenLogprob,
    TopLogprob,
    Usage,
)


class Writer(Protocol):
    """Writes one kind of reply."""

    def whole(self, answers: Sequence[Sequence[Delta]], usage: Usage) -> Reply:
        """Return the whole reply."""

    def opening(self, n_answers: int, /) -> Iterable[Reply]:
        """Return the chunks before the first delta."""

    def chunk(self, index: int, delta: Delta) -> Reply:
        """Return a chunk of a stream, of one answer."""

    def closing(self, usage: Usage) -> Reply:
        """Return the chunk with the counts."""


class CompletionWriter:
    """Writes what `/v1/completions` answers."""

    def __init__(self, model: str, fingerprint: str, created: int) -> None:
        self._head = _head("cmpl", model, fingerprint, created)

    def whole(self, answers: Sequence[Sequence[Delta]], usage: Usage) -> Completion:
        """Return the whole reply."""
        choices = []
        for index, deltas in enumerate(answers):
            scored = [s for delta in deltas for s in delta.scored]
            choices.append(self._choice(index, "".join(delta.text for delta in deltas), scored, deltas[-1].finish))
        return Completion(**self._head, choices=choices, usage=usage)

    def opening(self, _: int) -> Iterable[Completion]:
        """Return nothing: a completion opens without a chunk."""
        return ()

    def chunk(self, index: int, delta: Delta) -> Completion:
        """Return a chunk of a stream."""
        return Completion(**self._head, choices=[self._choice(index, delta.text, delta.scored, delta.finish)])

    def closing(self, usage: Usage) -> Completion:
        """Return the chunk with the counts."""
        return Completion(**self._head, choices=[], usage=usage)

    def _choice(self, index: int, text: str, scored: Sequence[Scored], finish: Finish | None) -> CompletionChoice:
        logprobs = None
        if scored:
            tops = [{t.readable: t.logprob for t in s.top if t.logprob is not None} or None for s in scored]
            logprobs = CompletionLogprobs(
                tokens=[s.token.readable for s in scored],
                token_logprobs=[s.token.logprob for s in scored],
                top_logprobs=tops if any(tops) else None,
                text_offset=[s.start for s in scored],
            )
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish)


class ChatWriter:
    """Writes what `/v1/chat/completions` answers."""

    def __init__(self, model: str, fingerprint: str, created: int) -> None:
        self._head = _head("chatcmpl", model, fingerprint, created)

    def whole(self, answers: Sequence[Sequence[Delta]], usage: Usage) -> ChatCompletion:
        """Return the whole reply."""
        choices = [self._choice(index, deltas) for index, deltas in enumerate(answers)]
        return ChatCompletion(**self._head, choices=choices, usage=usage)

    def _choice(self, index: int, deltas: Sequence[Delta]) -> ChatChoice:
        finish = deltas[-1].finish
        assert finish is not None
        calls = _joined(call for delta in deltas for call in delta.calls)
        content = "".join(delta.text for delta in deltas)
        message = AssistantMessage(
            content=content if content or not calls else None,
            reasoning_content="".join(delta.reasoning for delta in deltas) or None,
            tool_calls=calls or None,
        )
        logprobs = _chat_logprobs([s for delta in deltas for s in delta.scored])
        return ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=finish)

    def opening(self, n_answers: int) -> Iterable[ChatChunk]:
        """Name the speaker."""
        for index in range(n_answers):
            yield self._chunk(index, MessageDelta(role="assistant", content=""), None, None)

    def chunk(self, index: int, delta: Delta) -> ChatChunk:
        """Return a chunk of a stream."""
        calls = [_call(call, index=call.index) for call in delta.calls]
        message = MessageDelta(
            content=delta.text or None, reasoning_content=delta.reasoning or None, tool_calls=calls or None
        )
        return self._chunk(index, message, _chat_logprobs(delta.scored), delta.finish)

    def closing(self, usage: Usage) -> ChatChunk:
        """Return the chunk with the counts."""
        return ChatChunk(**self._head, choices=[], usage=usage)

    def _chunk(
        self, index: int, delta: MessageDelta, logprobs: ChatLogprobs | None, finish: Finish | None
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**self._head, choices=[choice])


def _head(kind: str, model: str, fingerprint: str, created: int) -> dict[str, Any]:
    """Build what every chunk of a reply begins with."""
    return {
        "id": f"{kind}-{secrets.token_hex(12)}",
        "created": created,
        "model": model,
        "system_fingerprint": fingerprint,
    }


def _call(delta: CallDelta, *, index: int | None) -> Call:
    kind: Any = None if delta.id is None else "function"
    return Call(index=index, id=delta.id, type=kind, function=Called(name=delta.name, arguments=delta.arguments))


def _joined(deltas: Iterable[CallDelta]) -> list[Call]:
    """Join pieces to whole calls."""
    calls: dict[int, CallDelta] = {}
    for delta in deltas:
        begun = calls.get(delta.index)
        calls[delta.index] = (
            delta if begun is None else CallDelta(delta.index, begun.id, begun.name, begun.arguments + delta.arguments)
        )
    return [_call(delta, index=None) for delta in calls.values()]


def _chat_logprobs(scored: Sequence[Scored]) -> ChatLogprobs | None:
    if not scored:
        return None
    content = [
        TokenLogprob(**_fields(s.token), top_logprobs=[TopLogprob(**_fields(top)) for top in s.top]) for s in scored
    ]
    return ChatLogprobs(content=content)


def _fields(token: TokenText) -> dict[str, Any]:
    return {"token": token.readable, "logprob": token.logprob, "bytes": list(token.raw)}
