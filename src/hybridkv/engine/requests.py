"""The input and output of a scheduler: requests, handles, events, counts. No HTTP, no model.

Submitting a `Request` gives a `RequestHandle`, which hands out one `Event` per token; the last says why the sequence
ended. `hybridkv.engine.scheduler.Scheduler` runs them; `hybridkv.server` turns them into replies.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from hybridkv.cache import KVTypes
from hybridkv.engine.sampling import SamplingParams, Steering
from hybridkv.errors import UsageError

Finish = Literal["stop", "length", "error", "cancelled"]

MAX_LOGPROBS = 20
"""Most likely tokens that a request may ask for beside each token's own probability."""


Score = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log probability, and `(id, logprob)` of the most likely tokens in its place, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate.

    Attributes
    ----------
    prompt_ids
        Tokens of the prompt, at least one.
    max_tokens
        Tokens to generate at most, at least 1. Memory is planned for all of them.
    params
        How tokens are drawn; a seed of its own per request.
    stop_ids
        Tokens that end the sequence; the one that does is its last event's token.
    logprobs
        None for none; 0 for each token's own; n for the n most likely tokens' too. They are the model's, before
        temperature and filters.
    types
        How this sequence's KV layers are stored; None takes the scheduler's specs.
    reuse
        Whether the sequence may begin from a stored prefix and leave one behind.
    marks
        Places in the prompt, in tokens, from which a later one may differ; a checkpoint is left before each.
    score_prompt
        Whether the prompt's own tokens get log probabilities, `RequestHandle.prompt_scores`; needs `logprobs`.
    steering
        Decides which tokens may come; for this request alone, because it follows them.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    types: KVTypes | None = None
    reuse: bool = True
    marks: tuple[int, ...] = ()
    score_prompt: bool = False
    steering: Steering | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise UsageError("the prompt is empty", hint="give at least one token")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens {self.max_tokens}; allowed: 1 or more")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UsageError(f"logprobs {self.logprobs}; allowed: 0 to {MAX_LOGPROBS}, or none")
        if self.score_prompt and self.logprobs is None:
            raise UsageError("scoring the prompt (echo) needs logprobs", hint="ask for logprobs: 0")


@dataclass(frozen=True, slots=True)
class Event:
    """A token, the end of a sequence, or both.

    Attributes
    ----------
    token
        Id of the generated token; None in an event that only says how the sequence ended.
    logprob
        Of that token, if asked for.
    top_logprobs
        `(id, logprob)` of the most likely tokens, the likeliest first, if asked for.
    finished
        None while the sequence continues. `stop`: this token is one of the stop ids. `length`: it is the last that was
        asked for. `cancelled` and `error` come without a token.
    message
        What went wrong, for `error`.
    """

    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finished: Finish | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """The tokens that a sequence has taken so far.

    Attributes
    ----------
    prompt_tokens
        Of the request.
    cached_tokens
        Of these, how many came from a stored prefix and were not processed again.
    generated_tokens
        Tokens handed out, the stop token included.
    guessed_tokens, right_guesses
        Tokens that were guessed and run, and those of them that were right.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    guessed_tokens: int = 0
    right_guesses: int = 0


class RequestHandle:
    """A submitted request, for the thread that waits for its tokens. All of it may be called from any thread.

    Iterating gives events, blocking until the next one, and ends after the event that says `finished`. With a listener,
    events go there and iterating is not offered.

    Parameters
    ----------
    number
        Counts requests from 1.
    request
        What was asked for.
    listener
        Called with each event on the scheduler's thread; it must not block and must not raise.

    Attributes
    ----------
    prompt_scores
        Of each prompt token, if the request asks for them; complete before the first event. None for the first token,
        which nothing precedes.
    """

    def __init__(self, number: int, request: Request, listener: Callable[[Event], None] | None = None) -> None:
        self.number, self.request = number, request
        self._listener = listener
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._done = threading.Event()
        self._usage = Usage(len(request.prompt_ids), 0, 0)
        self._generated: list[int] = []
        self.prompt_scores: list[Score | None] = [None] * len(request.prompt_ids) if request.score_prompt else []

    def __iter__(self) -> Iterator[Event]:
        """Yield events until the last; once."""
        assert self._listener is None, "events go to the listener"
        while True:
            event = self._events.get()
            yield event
            if event.finished is not None:
                return

    def cancel(self) -> None:
        """Ask for an early end; its event is `cancelled`, unless another end comes first. Again: no effect."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """True if an early end was asked for."""
        return self._cancelled.is_set()

    @property
    def finished(self) -> bool:
        """True if the last event was handed out."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, for at most `timeout` seconds; whether it came."""
        return self._done.wait(timeout)

    @property
    def usage(self) -> Usage:
        """Counts of tokens up to now."""
        return self._usage

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and generated tokens up to now."""
        return (*self.request.prompt_ids, *self._generated)

    # The scheduler's side.

    def put(self, event: Event) -> None:
        """Hand out an event; for the scheduler alone."""
        assert not self.finished, event
        if event.token is not None:
            self._generated.append(event.token)
            self._usage = replace(self._usage, generated_tokens=self._usage.generated_tokens + 1)
        if event.finished is not None:
            self._done.set()
        if self._listener is None:
            self._events.put(event)
        else:
            self._listener(event)

    def count_cached(self, n_tokens: int) -> None:
        """Note how many prompt tokens came from a stored prefix; for the scheduler alone."""
        self._usage = replace(self._usage, cached_tokens=n_tokens)

    def count_guesses(self, n_guessed: int, n_right: int) -> None:
        """Count further tokens that were guessed, and those of them that were right; for the scheduler alone."""
        used = self._usage
        self._usage = replace(
            used, guessed_tokens=used.guessed_tokens + n_guessed, right_guesses=used.right_guesses + n_right
        )


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """A scheduler at one moment: what it holds, and counts since it began.

    Attributes
    ----------
    running, waiting
        Sequences admitted and not, now.
    kv_bytes, kv_bytes_used, state_bytes
        Of running sequences: allocated for KV rows, of these rows held, allocated for states.
    reserved_bytes, budget_bytes
        Planned for running sequences at their full length, and the most that may be; None for no limit.
    prefix_bytes, prefix_budget_bytes, prefix_checkpoints
        Held by stored prefixes, the most that may be, and how many prefixes a sequence can resume from.
    prompt_tokens, cached_tokens, generated_tokens
        Prompt tokens processed, prompt tokens taken from stored prefixes, and tokens generated.
    guessed_tokens, right_guesses
        Tokens that were guessed and run, and those of them that were right.
    prefill_s, decode_s
        Time in model steps over prompts, and over new tokens.
    n_iterations, n_rebuilds, n_finished, n_cancelled, n_failed
        Scheduling iterations that ran the model, rebuilds on values that were not finite, sequences by their end
        (`n_finished` counts `stop` and `length`).
    step_s
        Wall times of the newest iterations, oldest first.
    """

    running: int
    waiting: int
    kv_bytes: int
    kv_bytes_used: int
    state_bytes: int
    reserved_bytes: int
    budget_bytes: int | None
    prefix_bytes: int
    prefix_budget_bytes: int
    prefix_checkpoints: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    guessed_tokens: int
    right_guesses: int
    prefill_s: float
    decode_s: float
    n_iterations: int
    n_rebuilds: int
    n_finished: int
    n_cancelled: int
    n_failed: int
    step_s: tuple[float, ...]

    @property
    def generation_tok_s(self) -> float:
        """Generated tokens per second of decoding, all sequences together."""
        return self.generated_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def prompt_tok_s(self) -> float:
        """Prompt tokens per second of prefill."""
        return self.prompt_tokens / self.prefill_s if self.prefill_s else 0.0
