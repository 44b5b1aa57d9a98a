"""One answer: events with token ids become text, log probabilities and a reason to end.

Knows neither HTTP nor how replies are written. A streamed answer is the deltas as they come, any other their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybridkv.engine.requests import Event
from hybridkv.server.stops import StopStrings
from hybridkv.text.detokenize import TextStream, token_bytes

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as bytes, with its log probability."""

    raw: bytes
    logprob: float

    @property
    def readable(self) -> str:
        r"""As text; a part of a character as OpenAI writes it, `bytes:\xe2\x82`."""
        try:
            return self.raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.raw)


@dataclass(frozen=True, slots=True)
class Scored:
    """A token of the answer; `start` is where its text begins in the answer, in characters."""

    token: TokenText
    top: tuple[TokenText, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What an event adds to the answer; `finish` is None while it goes on."""

    text: str = ""
    scored: tuple[Scored, ...] = ()
    finish: Finish | None = None


class AnswerError(Exception):
    """The engine gave up on a sequence, or was told to.

    Parameters
    ----------
    message
        Why, for the client.
    reason
        `error` or `cancelled`.
    """

    def __init__(self, message: str, reason: Literal["error", "cancelled"]) -> None:
        super().__init__(message)
        self.message, self.reason = message, reason


class Answer:
    """The text of one sequence as its events come.

    Parameters
    ----------
    tokenizer
        A `TextTokenizer`, or a fast Transformers tokenizer.
    prompt_ids
        What the answer continues.
    stops
        Texts that end it and are no part of it.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stops: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)
        self._bytes: Callable[[int], bytes] = lambda token: token_bytes(tokenizer, token)
        self._waiting: list[Scored] = []  # their text is withheld
        self._n_read = self._n_said = 0
        self.n_tokens = 0

    def push(self, event: Event) -> Delta:
        """What an event adds.

        Raises
        ------
        AnswerError
            If it says that the sequence came to no proper end.
        """
        if event.finished in ("error", "cancelled"):
            cancelled = event.finished == "cancelled"
            raise AnswerError(
                event.message or ("the request was cancelled" if cancelled else "the engine failed"),
                "cancelled" if cancelled else "error",
            )
        assert event.token is not None, event
        self.n_tokens += 1
        text = ""
        if event.finished != "stop":
            self._note(event)
            text = self._read(self._stream.push(event.token))
        if event.finished is not None and not self._stops.found:
            text += self._read(self._stream.close())
            text += self._stops.close()
        finish: Finish | None = None
        if self._stops.found or event.finished == "stop":
            finish = "stop"
        elif event.finished == "length":
            finish = "length"
        self._n_said += len(text)
        return Delta(text, self._take(everything=finish is not None and not self._stops.found), finish)

    def _read(self, text: str) -> str:
        self._n_read += len(text)
        return self._stops.push(text)

    def _note(self, event: Event) -> None:
        if event.logprob is None:
            return
        assert event.token is not None
        top = tuple(TokenText(self._bytes(token), logprob) for token, logprob in event.top_logprobs)
        self._waiting.append(Scored(TokenText(self._bytes(event.token), event.logprob), top, self._n_read))

    def _take(self, *, everything: bool) -> tuple[Scored, ...]:
        """The noted tokens whose text has begun to be handed out; the rest is dropped if a stop string cuts it off."""
        ready = [s for s in self._waiting if everything or s.start < self._n_said]
        self._waiting = self._waiting[len(ready) :]
        return tuple(ready)
