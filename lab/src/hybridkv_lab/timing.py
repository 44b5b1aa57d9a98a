"""Timing of calls against each other. Owns no case and no peer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

ROUNDS = 5
_LONG_S = 0.05  # a call of this length warms itself up
_MOST_CALLS = 2000
_PAUSE_S = 0.002  # idle threads of another library continue spinning for about this long


@dataclass(frozen=True, slots=True)
class Spread:
    """Wall time of one call over many, milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    n_calls: int


def spread(seconds: Iterable[float]) -> Spread:
    """Compute median, 10th and 90th percentile of some durations."""
    times = sorted(1e3 * s for s in seconds)
    assert times
    tenth = len(times) // 10
    return Spread(times[len(times) // 2], times[tenth], times[-1 - tenth], len(times))


def interleaved(calls: Mapping[str, Callable[[], object]], *, budget_s: float) -> dict[str, Spread]:
    """Time several calls in rounds of one burst each, so that a slow second of the machine hits them all.

    Parameters
    ----------
    calls
        Name -> what to call.
    budget_s
        Seconds for each of them, all rounds together; a call that takes longer is made three times.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n_done in range(ROUNDS):
        for name, call in calls.items():
            if n_done >= 3 and sum(times[name]) > budget_s:
                continue
            time.sleep(_PAUSE_S)
            times[name] += _burst(call, budget_s / ROUNDS)
    return {name: spread(each) for name, each in times.items()}


def _burst(call: Callable[[], object], share_s: float) -> list[float]:
    """Time at least one call, as many as fit; the first counts only if it is long."""
    times: list[float] = []
    begin = time.perf_counter()
    end = begin + share_s
    call()
    now = time.perf_counter()
    if now - begin > _LONG_S:
        times.append(now - begin)
    while not times or (now < end and len(times) < _MOST_CALLS // ROUNDS):
        begin = time.perf_counter()
        call()
        now = time.perf_counter()
        times.append(now - begin)
    return times
