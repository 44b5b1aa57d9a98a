"""Takes requests to the scheduler and brings what it says back to the event loop.

Owns what is served and the life of a request: from its body to a ticket, from the scheduler's thread to the loop, and
its end when the client leaves. Knows no HTTP beyond refusals; `hybridkv.server.respond` writes replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hybridkv.cache import KVTypes
from hybridkv.engine.requests import Event, Request, SchedulerStats, Ticket
from hybridkv.engine.sampling import SamplingParams
from hybridkv.server.answer import Answer, Delta
from hybridkv.server.metrics import Metrics, Rate
from hybridkv.server.prompts import Prompts
from hybridkv.server.refusals import RefusalError
from hybridkv.server.replies import PromptDetails, Status, Usage
from hybridkv.server.schema import ChatRequest, CompletionRequest
from hybridkv.server.sessions import Keeper, Sessions

DEFAULT_MAX_TOKENS = 16
"""Of `/v1/completions`, as OpenAI documents it; a chat answer may fill the context."""


class Runner(Keeper, Protocol):
    """The scheduler, as far as the server needs it."""

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> Ticket:
        """Take a request; events go to the listener, on another thread."""

    def stats(self) -> SchedulerStats:
        """Counts up to now."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a server serves.

    Attributes
    ----------
    runner
        Runs requests.
    tokenizer
        The model's.
    name
        By which clients ask for it.
    types, types_label
        How the KV layers are stored, of the first if they differ; and in words, of all.
    n_ctx
        Tokens in a sequence's context.
    parallel
        Sequences that run at once.
    n_vocab
        Tokens of the model.
    end_ids
        Tokens that end an answer.
    fingerprint
        Says in each reply what made it: version and types.
    session_dir
        Where sessions are kept; None keeps none.
    """

    runner: Runner
    tokenizer: Any
    name: str
    types: KVTypes
    types_label: str
    n_ctx: int
    parallel: int
    n_vocab: int
    end_ids: tuple[int, ...]
    fingerprint: str
    session_dir: Path | None = None


class Run:
    """A request on its way: deltas as they come, and its counts."""

    def __init__(self, answer: Answer, metrics: Metrics, started: float) -> None:
        self._answer, self._metrics, self._last = answer, metrics, started
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.ticket: Ticket | None = None
        self.created = int(time.time())

    def listen(self, event: Event) -> None:
        """Bring an event to the loop; called on the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def deltas(self, idle_s: float | None = None) -> AsyncIterator[list[Delta]]:
        """What has come since the last time, until the answer's end; an empty list after `idle_s` without anything.

        Raises
        ------
        AnswerError
            If there is no proper end.
        """
        while True:
            try:
                async with asyncio.timeout(idle_s):
                    events = [await self._events.get()]
            except TimeoutError:
                yield []
                continue
            while not self._events.empty():
                events.append(self._events.get_nowait())
            new = []
            for event in events:
                self._time()
                new.append(self._answer.push(event))
                if new[-1].finish is not None:
                    self.cancel()  # a stop string ends it here, while the engine goes on
                    yield new
                    return
            yield new

    def _time(self) -> None:
        now = time.perf_counter()
        note = self._metrics.next_token if self._answer.n_tokens else self._metrics.first_token
        note(now - self._last)
        self._last = now

    def cancel(self) -> None:
        """Nobody wants the rest. No effect on a sequence that has ended."""
        if self.ticket is not None and not self.ticket.finished:
            self.ticket.cancel()

    @property
    def usage(self) -> Usage:
        """Counts of tokens up to now."""
        assert self.ticket is not None
        used, n_tokens = self.ticket.usage, self._answer.n_tokens
        return Usage(
            prompt_tokens=used.prompt_tokens,
            completion_tokens=n_tokens,
            total_tokens=used.prompt_tokens + n_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=used.cached_tokens),
        )


class Desk:
    """Takes requests in.

    Parameters
    ----------
    served
        What is served.
    metrics
        Where times are counted.
    """

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self.served, self.metrics = served, metrics
        self.prompts = Prompts(served.tokenizer, served.n_vocab)
        self.sessions = Sessions(served.runner, served.session_dir)
        self.created = int(time.time())
        self._started = time.monotonic()
        self._rate = Rate()

    async def complete(self, body: CompletionRequest) -> Run:
        """Start the answer to a prompt.

        Raises
        ------
        RefusalError, HybridKVError
            For what cannot be answered, or not now.
        """
        started = time.perf_counter()
        self._check_model(body.model)
        ids = await self.prompts.completion(body.prompt)
        return self._start(body, ids, body.max_tokens or DEFAULT_MAX_TOKENS, body.logprobs, started)

    async def chat(self, body: ChatRequest) -> Run:
        """Start the answer to a conversation; likewise."""
        started = time.perf_counter()
        self._check_model(body.model)
        ids = await self.prompts.chat(body.messages)
        asked = body.max_tokens or body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._start(body, ids, asked or max(1, self.served.n_ctx - len(ids)), logprobs, started)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            raise RefusalError(
                404, f"model {name!r}; this server has {self.served.name!r}", code="model_not_found", param="model"
            )

    def _start(
        self,
        body: CompletionRequest | ChatRequest,
        ids: Sequence[int],
        max_tokens: int,
        logprobs: int | None,
        started: float,
    ) -> Run:
        self.sessions.check(body.session)
        ends = () if body.ignore_eos else self.served.end_ids
        request = Request(
            prompt_ids=tuple(ids),
            max_tokens=max_tokens,
            params=_sampling(body),
            stop_ids=(*ends, *(body.stop_token_ids or ())),
            logprobs=logprobs,
            types=None if body.kv_types is None else KVTypes(**body.kv_types.model_dump()),
            reuse=body.cache_prompt is not False,
        )
        run = Run(Answer(self.served.tokenizer, ids, body.stop or ()), self.metrics, started)
        run.ticket = self.served.runner.submit(request, run.listen)
        self.sessions.remember(body.session, run.ticket)
        return run

    def status(self) -> Status:
        """What the chat page shows."""
        stats, served = self.served.runner.stats(), self.served
        return Status(
            model=served.name,
            types=served.types_label,
            chat=self.prompts.can_chat,
            n_ctx=served.n_ctx,
            parallel=served.parallel,
            running=stats.running,
            waiting=stats.waiting,
            kv_bytes=stats.kv_bytes,
            kv_bytes_used=stats.kv_bytes_used,
            state_bytes=stats.state_bytes,
            reserved_bytes=stats.reserved_bytes,
            budget_bytes=stats.budget_bytes,
            prefix_bytes=stats.prefix_bytes,
            generated_tokens=stats.generated_tokens,
            generation_tok_s=self._rate.read(stats.generated_tokens),
            uptime_s=time.monotonic() - self._started,
        )


def _sampling(body: CompletionRequest | ChatRequest) -> SamplingParams:
    """OpenAI's defaults: everything may be drawn, as likely as the model says."""
    seed = None if body.seed is None else body.seed % 2**63
    return SamplingParams(
        temp=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=seed,
    )
