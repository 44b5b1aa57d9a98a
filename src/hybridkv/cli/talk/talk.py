"""A conversation with a loaded model: its messages, and answers as they come. Knows no terminal."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hybridkv.cli.talk.thoughts import Kind, Thoughts
from hybridkv.engine.requests import Event, Request, RequestHandle
from hybridkv.engine.session import load_session
from hybridkv.errors import ContextError, HybridKVError, UsageError
from hybridkv.formats import get_format
from hybridkv.server.stops import StopStrings
from hybridkv.text.chat import chat_prompt
from hybridkv.text.control_words import ControlWords, Covered
from hybridkv.text.detokenize import TextStream

if TYPE_CHECKING:
    from hybridkv.cache import KVTypes
    from hybridkv.engine import SamplingParams, Scheduler
    from hybridkv.engine.sampling import Steering
    from hybridkv.model.protocols import LanguageModel

T = TypeVar("T")

Ended = Literal["end of text", "n", "context full", "interrupted"]


@dataclass(slots=True)
class Answered:
    """The last answer, and what it took.

    Attributes
    ----------
    n_prompt, n_cached
        Prompt tokens, and how many of these were not processed again.
    prompt_s, answer_s
        Until the first token, and since.
    kv_bytes
        Of the rows that its cache held at the end.
    """

    text: str = ""
    thought: str = ""
    ended: Ended = "end of text"
    n_prompt: int = 0
    n_cached: int = 0
    n_tokens: int = 0
    n_thought: int = 0
    prompt_s: float = 0.0
    answer_s: float = 0.0
    kv_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Habits:
    """The way answers are made.

    Attributes
    ----------
    sampling
        Its seed is that of the first answer; later ones draw their own, unless the seed was given.
    n_predict
        Most tokens of an answer; -1 for what the context holds.
    stops
        Texts before which an answer ends.
    end_ids
        Tokens that end one.
    variables
        Of the chat template.
    steering
        Makes what steers an answer from the prompt's text.
    """

    sampling: SamplingParams
    n_predict: int = -1
    stops: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    steering: Callable[[str], Steering | None] = lambda _: None


class Talk:
    """Messages, and a scheduler that answers them on this thread.

    Parameters
    ----------
    scheduler
        Holds the model; its stored prefixes are what a turn resumes from.
    model, tokenizer
        The loaded model and its tokenizer, with the chat template.
    types
        Of the KV cache.
    system
        The system message; None for none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        model: LanguageModel,
        tokenizer: Any,
        habits: Habits,
        types: KVTypes,
        system: str | None = None,
    ) -> None:
        self.scheduler, self.habits = scheduler, habits
        self.model, self.tokenizer = model, tokenizer
        self._words = ControlWords(tokenizer)
        self.messages: list[dict[str, str]] = []
        self.types = types
        self._asked_types: KVTypes | None = None
        self.last: Answered | None = None
        self.handle: RequestHandle | None = None
        self._asked: tuple[str, tuple[int, ...]] | None = None  # the last prompt, and its tokens
        self._held: tuple[int, ...] = ()  # all tokens up to the end of the last answer
        self.on_step: Callable[[int, int], None] | None = None
        self.set_system(system)

    # ---- What the conversation is.

    @property
    def system(self) -> str | None:
        """The system message."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first is not None and first["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Replace the system message; the turns stay."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.messages = ([] if text is None else [{"role": "system", "content": text}]) + turns

    def forget(self) -> None:
        """Drop all turns."""
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.last = None

    def set_types(self, text: str) -> None:
        """Store the cache as `q4_0`, or `q8_0/q4_0` for K and V, from the next answer on.

        Raises
        ------
        UsageError
            For an unknown type.
        """
        k, _, v = text.replace(" ", "/").partition("/")
        self.types = replace(self.types, type_k=get_format(k).name, type_v=get_format(v or k).name)
        self._asked_types = self.types

    # ---- Answers.

    def ask(self, text: str) -> Iterator[tuple[Kind, str]]:
        """Add a question and answer it; a question that gets no answer is taken back."""
        self.messages.append({"role": "user", "content": text})
        return self._answer(regenerates=False)

    def add_tool_result(self, text: str) -> Iterator[tuple[Kind, str]]:
        """Add what a tool has answered to the call in the last answer, and have it answered.

        Raises
        ------
        UsageError
            If nothing was answered yet, or if the chat template leaves such messages out.
        """
        if not self.messages or self.messages[-1]["role"] not in ("assistant", "tool"):
            raise UsageError("no tool was called: the last message is no answer", hint="ask something first")
        self.messages.append({"role": "tool", "content": text})
        try:
            rendered = chat_prompt(self._words, self.messages, self.habits.variables)
        except HybridKVError:
            self.messages.pop()
            raise
        if rendered.find_last(text) is None:
            self.messages.pop()
            raise UsageError("the chat template leaves out what tools answer", hint="say it as a message of yours")
        return self._answer(regenerates=False)

    def regenerate(self) -> Iterator[tuple[Kind, str]]:
        """Answer the last question anew.

        Raises
        ------
        UsageError
            If there is none.
        """
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] not in ("user", "tool"):
            raise UsageError("nothing was asked yet", hint="ask something first")
        return self._answer(regenerates=True)

    def stop(self) -> None:
        """End the answer that is coming, after the step that runs."""
        if self.handle is not None:
            self.handle.cancel()

    def _answer(self, *, regenerates: bool) -> Iterator[tuple[Kind, str]]:
        answered = Answered()
        try:
            request, prompt = self._request(again=regenerates or self.last is not None)
            yield from self._pieces(request, Thoughts(prompt), answered)
        except HybridKVError:
            if not answered.n_tokens:
                self.messages.pop()
            raise
        self.last = answered
        if answered.n_tokens:
            self.messages.append({"role": "assistant", "content": answered.text})
        elif answered.ended == "interrupted":
            self.messages.pop()

    def _request(self, *, again: bool) -> tuple[Request, str]:
        rendered = chat_prompt(self._words, self.messages, self.habits.variables)
        ids = self._ids(rendered)
        n_ctx = self.scheduler.admission.n_ctx
        room = n_ctx - len(ids)
        if room < 1:
            raise ContextError(
                f"the conversation has {len(ids)} tokens and the context holds {n_ctx}, answer included",
                hint="/reset begins anew; a larger -c holds more",
            )
        n = self.habits.n_predict
        sampling = self.habits.sampling
        if again and sampling.seed is not None:
            sampling = replace(sampling, seed=secrets.randbits(32))
        request = Request(
            tuple(ids),
            max_tokens=room if n < 0 else min(n, room),
            params=sampling,
            stop_ids=self.habits.end_ids,
            types=self._asked_types,
            steering=self.habits.steering(rendered.text),
        )
        self._asked = (rendered.text, request.prompt_ids)
        return request, rendered.text

    def _ids(self, rendered: Covered) -> list[int]:
        """Tokenize the conversation; earlier turns keep their tokens as they came, if the text begins with theirs."""
        if self._asked is not None and self._asked[0] == rendered.text:
            return list(self._asked[1])
        if self._held:
            begun = self.tokenizer.decode(self._held, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if rendered.text.startswith(begun):
                return [*self._held, *rendered.ids(len(begun))]
        return rendered.ids()

    def _pieces(self, request: Request, thoughts: Thoughts, answered: Answered) -> Iterator[tuple[Kind, str]]:
        events: list[Event] = []
        stream, stops = TextStream(self.tokenizer, request.prompt_ids), StopStrings(self.habits.stops)
        start = time.perf_counter()
        self.handle = handle = self.scheduler.submit(request, events.append)
        answered.n_prompt = len(request.prompt_ids)
        before = self.scheduler.stats().prompt_tokens
        while not handle.finished:
            self.scheduler.iterate()
            answered.kv_bytes = max(answered.kv_bytes, self.scheduler.stats().kv_bytes_used)
            if not answered.n_tokens and self.on_step is not None:
                done = self.scheduler.stats().prompt_tokens - before + handle.usage.cached_tokens
                self.on_step(done, answered.n_prompt)
            while events:
                event = events.pop(0)
                if event.finished == "error":
                    raise ContextError(event.message or "the answer failed")
                if event.token is None or event.finished == "stop":
                    continue
                if not answered.n_tokens:
                    answered.prompt_s, start = time.perf_counter() - start, time.perf_counter()
                answered.n_tokens += 1
                yield from self._split(thoughts, stops.push(stream.push(event.token)), answered)
                if stops.found:
                    handle.cancel()
        self._held = handle.token_ids
        answered.n_cached = handle.usage.cached_tokens
        answered.answer_s = time.perf_counter() - start
        answered.ended = self._ended(handle, stops)
        if not stops.found:
            yield from self._split(thoughts, stops.push(stream.close()) + stops.close(), answered)
        for kind, text in thoughts.close():
            yield self._note(kind, text, answered)

    def _split(self, thoughts: Thoughts, text: str, answered: Answered) -> Iterator[tuple[Kind, str]]:
        for kind, piece in thoughts.push(text) if text else ():
            yield self._note(kind, piece, answered)

    def _note(self, kind: Kind, text: str, answered: Answered) -> tuple[Kind, str]:
        if kind == "thought":
            answered.thought += text
            answered.n_thought = answered.n_tokens
        else:
            answered.text += text
        return kind, text

    def _ended(self, handle: RequestHandle, stops: StopStrings) -> Ended:
        last = handle.token_ids[-1]
        if stops.found or last in self.habits.end_ids:
            return "end of text"
        if handle.cancelled:
            return "interrupted"
        return "context full" if len(handle.token_ids) >= self.scheduler.admission.n_ctx else "n"

    # ---- Files.

    def save(self, path: Path) -> int:
        """Write the conversation and its cache; `hybridkv run --chat --session` resumes it. The tokens it holds.

        Raises
        ------
        UsageError, SessionError
            If nothing was answered, or it cannot be written.
        """
        handle = self.handle
        if handle is None:
            raise UsageError("nothing was answered yet: there is nothing to save", hint="ask something first")
        messages = tuple(self.messages)
        return self._aside(lambda: self.scheduler.save(handle, path, messages))

    def load(self, path: Path) -> None:
        """Resume a saved conversation in place of this one.

        Raises
        ------
        UsageError, SessionError
            For plain text, and for what is no session of this model.
        """
        session = load_session(path, self.model)
        if not session.messages:
            raise UsageError(
                f"{path} holds plain text, not a conversation", hint="`hybridkv run --session` continues it"
            )
        self._aside(lambda: self.scheduler.restore(path, self._asked_types))
        self.messages = [dict(message) for message in session.messages]
        self.last, self.handle = None, None
        self._asked, self._held = None, session.tokens[: session.n_cached]

    def _aside(self, work: Callable[[], T]) -> T:
        """Do what waits for the scheduler on another thread, while it is stepped on this one."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            while not future.done():
                self.scheduler.iterate()
                time.sleep(0.001)
            return future.result()


def history_of(messages: Sequence[Mapping[str, str]]) -> str:
    """Write messages as text, for a screen."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
