"""A runner that says what a test wrote for it: for faults, splits and timings that no model gives on demand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hybridkv.engine.requests import Event, Request, RequestHandle, SchedulerStats
from hybridkv.errors import SessionError

Step = int | Event | Exception
"""A token, an event as it is, or what `submit` raises."""


@dataclass
class Scripted:
    """Answers every request with the same script, cut at `max_tokens`, with `wait_s` before each token."""

    script: Sequence[Step] = (1, 2, 3)
    wait_s: float = 0.0
    handles: list[RequestHandle] = field(default_factory=list)

    def submit(self, request: Request, listener: Callable[[Event], None] | None = None) -> RequestHandle:
        if self.script and isinstance(self.script[0], Exception):
            raise self.script[0]
        handle = RequestHandle(len(self.handles) + 1, request, listener)
        self.handles.append(handle)
        threading.Thread(target=self._run, args=(handle,), daemon=True).start()
        return handle

    def _run(self, handle: RequestHandle) -> None:
        for count, step in enumerate(self.script, 1):
            time.sleep(self.wait_s)
            if handle.cancelled:
                handle.put(Event(finished="cancelled"))
                return
            event = step if isinstance(step, Event) else self._event(handle.request, int(step), count)
            handle.put(event)
            if event.finished is not None:
                return
        handle.put(Event(finished="error", message="the script has ended"))

    def _event(self, request: Request, token: int, count: int) -> Event:
        logprob = None if request.logprobs is None else -0.5
        top = tuple((token + n, -0.5 - n) for n in range(request.logprobs or 0))
        finished = None
        if token in request.stop_ids:
            finished = "stop"
        elif count == request.max_tokens:
            finished = "length"
        return Event(token, logprob, top, finished)  # type: ignore[arg-type]

    def save(self, handle: RequestHandle, path: Path) -> int:
        raise SessionError(f"{path} cannot be written")

    def restore(self, path: Path) -> tuple[int, ...]:
        raise SessionError(f"{path} is no session")

    def stats(self) -> SchedulerStats:
        running = sum(not handle.finished for handle in self.handles)
        return SchedulerStats(
            running=running,
            waiting=0,
            kv_bytes=4096,
            kv_bytes_used=1024,
            state_bytes=512,
            reserved_bytes=4608,
            budget_bytes=None,
            prefix_bytes=0,
            prefix_budget_bytes=0,
            prefix_checkpoints=0,
            prompt_tokens=sum(handle.usage.prompt_tokens for handle in self.handles),
            cached_tokens=0,
            generated_tokens=sum(handle.usage.generated_tokens for handle in self.handles),
            guessed_tokens=0,
            right_guesses=0,
            prefill_s=0.0,
            decode_s=0.0,
            n_iterations=0,
            n_rebuilds=0,
            n_finished=0,
            n_cancelled=0,
            n_failed=0,
            step_s=(),
        )
