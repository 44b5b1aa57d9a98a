"""Counts and times for Prometheus, in a registry of the application's own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hybridkv.engine.requests import SchedulerStats

_FIRST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_NEXT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

_GAUGES = (
    ("running", "sequences being generated"),
    ("waiting", "requests that wait for room"),
    ("kv_bytes", "allocated for KV rows of running sequences"),
    ("kv_bytes_used", "of these, bytes of rows that are held"),
    ("state_bytes", "allocated for recurrent states of running sequences"),
    ("reserved_bytes", "planned for running sequences at their full length"),
    ("budget_bytes", "most that may be planned"),
    ("prefix_bytes", "held by stored prefixes"),
    ("prefix_budget_bytes", "most that stored prefixes may hold"),
    ("prefix_checkpoints", "prefixes from which a sequence can resume"),
)
_COUNTERS = (
    ("prompt_tokens", "prompt tokens processed"),
    ("cached_tokens", "prompt tokens taken from stored prefixes"),
    ("generated_tokens", "tokens generated"),
    ("guessed_tokens", "tokens guessed ahead and run"),
    ("right_guesses", "of these, tokens that were right"),
    ("prefill_s", "time in model steps over prompts"),
    ("decode_s", "time in model steps over new tokens"),
    ("n_iterations", "scheduler iterations that ran the model"),
    ("n_rebuilds", "caches rebuilt on values that were not finite"),
    ("n_finished", "sequences that came to their end"),
    ("n_cancelled", "sequences that were cancelled"),
    ("n_failed", "sequences that failed"),
)
_PROMETHEUS_NAMES = {"prefill_s": "prefill_seconds", "decode_s": "decode_seconds"}


class _SchedulerCollector(Collector):
    """Reads the scheduler's counts when somebody asks."""

    def __init__(self, stats: Callable[[], SchedulerStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Collect all metrics; a limit that does not exist is infinite."""
        stats = self._stats()
        for name, text in _GAUGES:
            value = getattr(stats, name)
            yield GaugeMetricFamily(f"hybridkv_{name}", text, math.inf if value is None else value)
        for name, text in _COUNTERS:
            called = _PROMETHEUS_NAMES.get(name, name.removeprefix("n_"))
            yield CounterMetricFamily(f"hybridkv_{called}", text, getattr(stats, name))


class Metrics:
    """The server's own counts, beside what it reads from the scheduler."""

    def __init__(self, stats: Callable[[], SchedulerStats]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_SchedulerCollector(stats))
        self._requests = Counter("hybridkv_http_requests", "replies", ("path", "status"), registry=self._registry)
        self._first = Histogram(
            "hybridkv_first_token_seconds",
            "from request to first token",
            buckets=_FIRST_BUCKETS,
            registry=self._registry,
        )
        self._next = Histogram(
            "hybridkv_next_token_seconds", "from token to token", buckets=_NEXT_BUCKETS, registry=self._registry
        )

    def count_reply(self, path: str, status: int) -> None:
        """Count one reply that was sent."""
        self._requests.labels(path, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """Record the time of a sequence's first token."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Record the time of a sequence's next token."""
        self._next.observe(seconds)

    def text(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class Rate:
    """Tokens per second over the last few seconds, from a count that only grows."""

    def __init__(self, window_s: float = 3.0) -> None:
        self._window_s = window_s
        self._seen: list[tuple[float, int]] = []

    def read(self, count: int, now: float | None = None) -> float:
        """Read the rate up to now; 0 the first time."""
        now = time.monotonic() if now is None else now
        self._seen.append((now, count))
        # The oldest one in the window, and the one before it, so that there are two even if nobody asks often.
        while len(self._seen) > 2 and self._seen[1][0] <= now - self._window_s:
            del self._seen[0]
        (start, before), (end, after) = self._seen[0], self._seen[-1]
        return (after - before) / (end - start) if end > start else 0.0
