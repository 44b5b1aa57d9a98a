"""One answer: events with token ids become text, log probabilities and a reason to end.

Knows neither HTTP nor how replies are written. A streamed answer is the deltas as they come, any other their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hybridkv.engine.requests import Event, RequestHandle
from hybridkv.server.channels import CallDelta, Channels, Reading, Sorted, control_ids
from hybridkv.server.stops import StopStrings
from hybridkv.text.detokenize import TextStream, token_bytes

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token as bytes, with its log probability."""

    raw: bytes
    logprob: float | None

    @property
    def readable(self) -> str:
        r"""As text; a part of a character as OpenAI writes it, `bytes:\xe2\x82`."""
        try:
            return self.raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.raw)


@dataclass(frozen=True, slots=True)
class Scored:
    """A token of the answer; `start` is where its text begins in the answer, in characters.

    The first token of a prompt that is scored has no probability: its `token.logprob` is None.
    """

    token: TokenText
    top: tuple[TokenText, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Delta:
    """The addition of an event to the answer; `finish` is None while it continues."""

    text: str = ""
    scored: tuple[Scored, ...] = ()
    finish: Finish | None = None
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


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


class TextAssembler:
    """The text of one sequence as its events come.

    Parameters
    ----------
    tokenizer
        A fast Transformers tokenizer.
    prompt_ids
        What the answer continues.
    stops
        Texts that end what is said and are no part of it; thoughts and tool calls may contain them.
    reading
        How thoughts and tool calls are written; None takes all text as it is.
    most
        Tokens that are handed out at most; 0 for a prompt that is only scored.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
        reading: Reading | None = None,
        *,
        most: int | None = None,
    ) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stops = StopStrings(stops)
        self._channels = Channels(reading or Reading())
        self._shown = {} if reading is None else control_ids(tokenizer, reading.words)
        self._bytes: Callable[[int], bytes] = lambda token: token_bytes(tokenizer, token)
        self._waiting: list[Scored] = []  # their text is withheld
        self._n_read = self._n_cut = 0
        self._n_echoed = 0
        self.n_tokens = self.n_thought = 0

    def echo(self, prompt: str, handle: RequestHandle) -> Delta:
        """Return the prompt as the answer's beginning, with its tokens' log probabilities if they were asked for."""
        scored, start = [], 0
        for token, score in zip(handle.request.prompt_ids, handle.prompt_scores, strict=False):
            raw = self._bytes(token)
            top = () if score is None else tuple(TokenText(self._bytes(i), logprob) for i, logprob in score[1])
            scored.append(Scored(TokenText(raw, None if score is None else score[0]), top, start))
            start += len(raw.decode(errors="replace"))
        self._n_echoed = len(prompt)
        return Delta(prompt, tuple(scored))

    def push(self, event: Event) -> Delta:
        """Add an event; return what it adds to the answer.

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
        if self._most == 0:
            return Delta(finish="length")
        self.n_tokens += 1
        self.n_thought += self._channels.thinks
        out = Sorted()
        if event.finished != "stop":
            self._note(event)
            self._sort(out, self._text(event.token))
        if event.finished is not None and not self._over:
            self._sort(out, self._stream.close())
            self._join(out, self._channels.close())
            if not self._over:
                out.content += self._stops.close()
        finish: Finish | None = None
        if self._over or event.finished == "stop":
            finish = "tool_calls" if self._channels.n_calls else "stop"
        elif event.finished == "length":
            finish = "length"
        scored = self._take(everything=finish is not None and not self._stops.found)
        return Delta(out.content, scored, finish, out.reasoning, tuple(out.calls))

    @property
    def _over(self) -> bool:
        """True if the answer has ended, whatever the model says next."""
        return self._stops.found or self._channels.ended

    def _text(self, token: int) -> str:
        """Return what a token adds to the text; a control token that opens or closes something is a word of it."""
        if token not in self._shown:
            return self._stream.push(token)
        text = self._stream.close() + self._shown[token]
        self._stream = TextStream(self._tokenizer, [token])
        return text

    def _sort(self, out: Sorted, text: str) -> None:
        self._n_read += len(text)
        self._join(out, self._channels.push(text))

    def _join(self, out: Sorted, new: Sorted) -> None:
        """Add what was sorted; content goes by the stop strings."""
        n_held = self._stops.n_held
        content = self._stops.push(new.content)
        if self._stops.found and new.content:
            self._n_cut += n_held + len(new.content) - len(content)
        out.content += content
        out.reasoning += new.reasoning
        out.calls += new.calls

    def _note(self, event: Event) -> None:
        if event.logprob is None:
            return
        assert event.token is not None
        top = tuple(TokenText(self._bytes(token), logprob) for token, logprob in event.top_logprobs)
        self._waiting.append(Scored(TokenText(self._bytes(event.token), event.logprob), top, self._n_read))

    def _take(self, *, everything: bool) -> tuple[Scored, ...]:
        """Take the noted tokens whose text has begun to be handed out; drop the rest if a stop string cuts it off."""
        n_content = self._n_read - self._channels.n_held - self._stops.n_held - self._n_cut
        ready = [s for s in self._waiting if everything or s.start < n_content]
        self._waiting = self._waiting[len(ready) :]
        return tuple(Scored(s.token, s.top, s.start + self._n_echoed) for s in ready)
