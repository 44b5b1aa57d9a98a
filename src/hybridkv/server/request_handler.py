"""Take requests to the scheduler: turn a body into prompts and sequences, and choose how their answers are read.

Owns what is served and what a request becomes. Knows no HTTP beyond refusals: `hybridkv.server.pending` brings back the
scheduler's events, and `hybridkv.server.respond` writes replies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hybridkv.cache import KVTypes
from hybridkv.engine.embed import Embedder
from hybridkv.engine.requests import Event, Request, RequestHandle, SchedulerStats
from hybridkv.engine.sampling import SamplingParams
from hybridkv.errors import HybridKVError
from hybridkv.server.answer import TextAssembler
from hybridkv.server.channels import Reading
from hybridkv.server.forms import Forms
from hybridkv.server.metrics import Metrics, Rate
from hybridkv.server.pending import Part, PendingReply
from hybridkv.server.prompts import Prompts, Rendered
from hybridkv.server.refusals import RefusalError
from hybridkv.server.replies import Status
from hybridkv.server.schema import ChatRequest, CompletionRequest, ReasoningFormat
from hybridkv.server.sessions import Keeper, Sessions
from hybridkv.text.breakers import breaker_ids

DEFAULT_MAX_TOKENS = 16
"""Of `/v1/completions`, as OpenAI documents it; a chat answer may fill the context."""


class Runner(Keeper, Protocol):
    """The scheduler, as far as the server needs it."""

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> RequestHandle:
        """Take a request; events go to the listener, on another thread."""

    def stats(self) -> SchedulerStats:
        """Count what was done up to now."""


def _say_nothing(_: str) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Served:
    """The model that a server serves, and its settings.

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
    strict
        Whether fields and values that mean nothing here are refused, not passed over.
    variables
        Of the chat template, where a request does not say.
    reasoning_format, reasoning_budget
        What becomes of thoughts, and how many tokens they may take (-1: any number), where a request does not say.
    sampling
        How tokens are drawn where a request does not say, by the names of its fields.
    max_tokens
        Of an answer where a request does not say; -1 for what the context holds, None for OpenAI's defaults.
    notify
        Where it is said what was passed over.
    embedder
        Makes embeddings, of a model that generates no text.
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
    strict: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    reasoning_format: ReasoningFormat = "auto"
    reasoning_budget: int = -1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    notify: Callable[[str], None] = _say_nothing
    embedder: Embedder | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt of a request, on its way to sequences."""

    ids: tuple[int, ...]
    max_tokens: int
    logprobs: int | None
    reading: Reading | None = None
    rendered: Rendered | None = None
    echo: str | None = None


class RequestHandler:
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
        self.forms = Forms(self.prompts, served.n_vocab, served.end_ids)
        self.sessions = Sessions(served.runner, served.session_dir)
        self.created = int(time.time())
        self._started = time.monotonic()
        self._rate = Rate()
        self._breakers: dict[tuple[str, ...], frozenset[int]] = {}

    async def complete(self, body: CompletionRequest) -> PendingReply:
        """Start the answers to prompts.

        Raises
        ------
        RefusalError, HybridKVError
            For what cannot be answered, or not now.
        """
        started = time.perf_counter()
        self._check_model(body.model)
        asked = []
        for prompt in body.prompt:
            ids = await self.prompts.completion(prompt, body.suffix or "")
            most = body.max_tokens
            if most is None and self.served.max_tokens is None:
                most = DEFAULT_MAX_TOKENS
            echo = None
            if body.echo:
                echo = prompt if isinstance(prompt, str) else self.served.tokenizer.decode(ids)
            asked.append(Asked(ids, self._most(body, most, ids), body.logprobs, echo=echo))
        return await self._start(body, asked, started)

    async def chat(self, body: ChatRequest) -> PendingReply:
        """Start the answer to a conversation.

        Raises
        ------
        RefusalError, HybridKVError
            For what cannot be answered, or not now.
        """
        started = time.perf_counter()
        self._check_model(body.model)
        tools = [tool.for_template() for tool in body.tools or ()]
        uses_tools = bool(tools) and body.tool_choice != "none"
        turns = [message.for_template() for message in body.messages]
        variables = self._variables(body)
        rendered = await self.prompts.chat(turns, tools if uses_tools else (), variables, self.served.variables)
        shown = body.reasoning_format or self.served.reasoning_format
        reading = Reading(
            thoughts=None if shown == "none" else self.prompts.thoughts,
            opened=rendered.opened,
            keeps_thoughts=shown == "deepseek-legacy",
            dialect=self.prompts.dialect if uses_tools else None,
            tools={tool["function"]["name"]: tool["function"]["parameters"] for tool in tools},
            one_call=body.parallel_tool_calls is False or not isinstance(body.tool_choice, str | None),
        )
        asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        most = self._most(body, asked, rendered.ids)
        pending = await self._start(body, [Asked(rendered.ids, most, logprobs, reading, rendered)], started)
        pending.ignored = rendered.unknown
        return pending

    def _variables(self, body: ChatRequest) -> dict[str, Any]:
        """Merge the chat template's variables: the server's, and over them the request's."""
        variables = {**self.served.variables, **(body.chat_template_kwargs or {})}
        if body.preserve_thinking is not None:
            variables.setdefault("preserve_thinking", body.preserve_thinking)
        known = self.prompts.variables
        if body.reasoning_effort is not None and "reasoning_effort" in known:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none" or self._budget(body) == 0:
            if "enable_thinking" in known or "thinking" in known:
                variables.setdefault("enable_thinking", False)
        elif body.reasoning_effort is not None and "reasoning_effort" not in known:
            variables.setdefault("reasoning_effort", body.reasoning_effort)  # the reply says that nothing reads it
        return variables

    def _budget(self, body: CompletionRequest | ChatRequest) -> int | None:
        if not isinstance(body, ChatRequest):
            return None
        if body.reasoning_effort == "none" and body.reasoning_budget is None:
            return 0
        budget = self.served.reasoning_budget if body.reasoning_budget is None else body.reasoning_budget
        return None if budget < 0 else budget

    def _most(self, body: CompletionRequest | ChatRequest, asked: int | None, ids: Sequence[int]) -> int:
        """Bound the tokens to generate: what was asked for, as far as the context goes."""
        room = max(1, self.served.n_ctx - len(ids))
        if asked is None and self.served.max_tokens is not None and self.served.max_tokens >= 0:
            return min(self.served.max_tokens, room)
        if asked is None or body.until_full:
            return room
        return asked if self.served.strict else min(asked, room)

    def _check_model(self, name: str | None) -> None:
        if self.served.embedder is not None:
            raise RefusalError(
                400, f"{self.served.name!r} is an embedding model; allowed: /v1/embeddings", code="embedding_model"
            )
        if name is not None and name != self.served.name:
            raise RefusalError(
                404, f"model {name!r}; this server has {self.served.name!r}", code="model_not_found", param="model"
            )

    async def _params(self, body: CompletionRequest | ChatRequest) -> SamplingParams:
        def breakers(words: Sequence[str]) -> frozenset[int]:
            key = tuple(words)
            if key not in self._breakers:
                if len(self._breakers) > 16:
                    self._breakers.clear()
                self._breakers[key] = breaker_ids(self.served.tokenizer, key)
            return self._breakers[key]

        unsaid = {name: value for name, value in self.served.sampling.items() if getattr(body, name) is None}
        body = body.model_copy(update=unsaid)
        if body.dry_multiplier:
            return await asyncio.to_thread(body.params, breakers)
        return body.params(breakers)

    async def _start(
        self, body: CompletionRequest | ChatRequest, asked: Sequence[Asked], started: float
    ) -> PendingReply:
        """Submit every sequence of a request, or none."""
        self.sessions.check(body.session)
        params = await self._params(body)
        pending = PendingReply(self.metrics, started)
        try:
            for prompt in asked:
                for sample in range(body.n or 1):
                    await self._submit(pending, body, prompt, params.for_sample(sample), first=not sample)
        except (RefusalError, HybridKVError):
            pending.cancel()
            raise
        self.sessions.remember(body.session, pending.parts[0].submitted)
        return pending

    async def _submit(
        self,
        pending: PendingReply,
        body: CompletionRequest | ChatRequest,
        asked: Asked,
        params: SamplingParams,
        *,
        first: bool,
    ) -> None:
        steering = await self.forms.steering(body, asked.rendered, self._budget(body))
        # A grammar that is at its end lets nothing but an end through.
        ends = () if body.ignore_eos and (steering is None or steering.matcher is None) else self.served.end_ids
        request = Request(
            prompt_ids=asked.ids,
            max_tokens=max(1, asked.max_tokens),
            params=params,
            stop_ids=(*ends, *(body.stop_token_ids or ())),
            logprobs=asked.logprobs,
            types=None if body.kv_types is None else KVTypes(**body.kv_types.model_dump()),
            reuse=body.cache_prompt is not False,
            marks=() if asked.rendered is None else asked.rendered.marks,
            score_prompt=asked.echo is not None and asked.logprobs is not None,
            steering=steering,
        )
        most = asked.max_tokens if asked.max_tokens == 0 else None
        answer = TextAssembler(self.served.tokenizer, asked.ids, body.stop or (), asked.reading, most=most)
        pending.submit(Part(answer, echo=asked.echo, first=first), request, self.served.runner.submit)

    def status(self) -> Status:
        """Collect what the chat page shows."""
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
