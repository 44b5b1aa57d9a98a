"""A scheduler's counts since it began."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from hybridkv.engine.requests import SchedulerStats

NEWEST_STEPS = 512
"""Iterations whose times are kept."""


@dataclass(slots=True)
class SchedulerCounters:
    """A scheduler's past, as `SchedulerStats` gives it; written by the scheduler's thread alone."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    right_guesses: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    n_iterations: int = 0
    n_rebuilds: int = 0
    n_finished: int = 0
    n_cancelled: int = 0
    n_failed: int = 0
    _times: deque[float] = field(default_factory=lambda: deque(maxlen=NEWEST_STEPS))

    def iteration(self, seconds: float) -> None:
        """Count an iteration that took so long."""
        self.n_iterations += 1
        self._times.append(seconds)

    def stats(self, **present: Any) -> SchedulerStats:
        """Combine these counts with what is present at this moment."""
        return SchedulerStats(
            **present,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            guessed_tokens=self.guessed_tokens,
            right_guesses=self.right_guesses,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            n_iterations=self.n_iterations,
            n_rebuilds=self.n_rebuilds,
            n_finished=self.n_finished,
            n_cancelled=self.n_cancelled,
            n_failed=self.n_failed,
            step_s=tuple(self._times.copy()),
        )
