"""Timing: every call gets its turn, and the spread is the spread."""

from __future__ import annotations

import time

from hybridkv_lab.timing import ROUNDS, interleaved, spread


def test_spread_is_in_milliseconds() -> None:
    found = spread([0.001 * i for i in range(100, 0, -1)])
    assert (round(found.median_ms), round(found.p10_ms), round(found.p90_ms)) == (51, 11, 90)
    assert spread([0.25]).p90_ms == 250
    assert spread([0.25]).n_calls == 1


def test_calls_take_turns() -> None:
    seen: list[str] = []
    found = interleaved({name: lambda n=name: seen.append(n) for name in "ab"}, budget_s=0.02)
    assert [name for i, name in enumerate(seen) if i == 0 or seen[i - 1] != name] == ["a", "b"] * ROUNDS
    assert found["a"].n_calls == seen.count("a") - ROUNDS  # the first call of each burst is a warm-up


def test_a_long_call_is_made_three_times_and_warms_itself_up() -> None:
    seen: list[int] = []

    def slow() -> None:
        seen.append(1)
        time.sleep(0.06)

    assert interleaved({"slow": slow}, budget_s=0.1)["slow"].n_calls == len(seen) == 3
