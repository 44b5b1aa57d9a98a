"""A request on its way: its sequences, from the scheduler's thread to the event loop, until they or the client end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial

from hybridkv.engine.requests import Event, Request, RequestHandle
from hybridkv.server.answer import Delta, TextAssembler
from hybridkv.server.metrics import Metrics
from hybridkv.server.replies import CompletionDetails, PromptDetails, Usage

Submit = Callable[[Request, Callable[[Event], None]], RequestHandle]


@dataclass(slots=True)
class Part:
    """One sequence of a request.

    Attributes
    ----------
    answer
        Its text.
    echo
        The prompt's text, if it is to stand before the answer.
    first
        Whether it is the first of its prompt, whose tokens are counted once.
    """

    answer: TextAssembler
    echo: str | None = None
    first: bool = True
    handle: RequestHandle | None = None
    last: float = field(default=0.0)
    done: bool = False

    @property
    def submitted(self) -> RequestHandle:
        """Its handle."""
        assert self.handle is not None
        return self.handle


class PendingReply:
    """Deltas of all sequences as they come, and their counts.

    Parameters
    ----------
    metrics
        Where times are counted.
    started
        When the request came.

    Attributes
    ----------
    ignored
        What the request asked for and nothing reads.
    """

    def __init__(self, metrics: Metrics, started: float) -> None:
        self._metrics, self._started = metrics, started
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.parts: list[Part] = []
        self.created = int(time.time())
        self.ignored: tuple[str, ...] = ()

    def submit(self, part: Part, request: Request, submit: Submit) -> None:
        """Start a sequence."""
        part.last = self._started
        part.handle = submit(request, partial(self._listen, len(self.parts)))
        self.parts.append(part)

    def _listen(self, index: int, event: Event) -> None:
        """Bring an event to the loop; called on the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def deltas(self, idle_s: float | None = None) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Yield what has come since the last time, by sequence, until all have ended; empty after `idle_s`.

        Raises
        ------
        AnswerError
            If a sequence has no proper end.
        """
        while not all(part.done for part in self.parts):
            try:
                async with asyncio.timeout(idle_s):
                    events = [await self._events.get()]
            except TimeoutError:
                yield []
                continue
            while not self._events.empty():
                events.append(self._events.get_nowait())
            new = [(index, delta) for index, event in events for delta in self._push(self.parts[index], event)]
            if new:
                yield new

    def _push(self, part: Part, event: Event) -> list[Delta]:
        """Add an event to its sequence: nothing after the end, the prompt before the first if it is echoed."""
        if part.done:
            return []
        self._time(part)
        new = []
        if part.echo is not None:
            new.append(part.answer.echo(part.echo, part.submitted))
            part.echo = None
        new.append(part.answer.push(event))
        if new[-1].finish is not None:
            part.done = True
            _cancel(part)  # a stop string ends it here, while the engine continues
        return new

    def _time(self, part: Part) -> None:
        now = time.perf_counter()
        note = self._metrics.next_token if part.answer.n_tokens else self._metrics.first_token
        note(now - part.last)
        part.last = now

    def cancel(self) -> None:
        """Cancel all sequences: nobody wants the rest. No effect on those that have ended."""
        for part in self.parts:
            _cancel(part)

    @property
    def usage(self) -> Usage:
        """Counts of tokens up to now."""
        used_by_all = [part.submitted.usage for part in self.parts]
        prompts = [part.submitted.usage for part in self.parts if part.first]
        n_right = sum(used.right_guesses for used in used_by_all)
        n_prompt = sum(used.prompt_tokens for used in prompts)
        n_generated = sum(part.answer.n_tokens for part in self.parts)
        return Usage(
            prompt_tokens=n_prompt,
            completion_tokens=n_generated,
            total_tokens=n_prompt + n_generated,
            prompt_tokens_details=PromptDetails(cached_tokens=sum(used.cached_tokens for used in prompts)),
            completion_tokens_details=CompletionDetails(
                reasoning_tokens=sum(part.answer.n_thought for part in self.parts),
                accepted_prediction_tokens=n_right,
                rejected_prediction_tokens=sum(used.guessed_tokens for used in used_by_all) - n_right,
            ),
        )


def _cancel(part: Part) -> None:
    if part.handle is not None and not part.handle.finished:
        part.handle.cancel()
