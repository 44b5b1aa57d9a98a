"""The guard's changes in one cache, in words: a line for each layer where they are few, else one for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

from hybridkv.cache import KVTypes

MOST_LINES = 3
"""Layers that have lines of their own; more share one."""


@dataclass(frozen=True, slots=True)
class Raised:
    """One layer's climb to another rung of the ladder.

    Attributes
    ----------
    reason
        What did not hold, with the layer's number.
    types
        What it is stored as since.
    added_bytes
        What that takes more.
    """

    layer: int
    reason: str
    error: float
    types: KVTypes
    added_bytes: int

    def line(self) -> str:
        """Say it."""
        return f"{self.reason}: stored as {self.types.label} instead, {self.added_bytes / 2**10:+.0f} KiB"


class Awaiting(Protocol):
    """The guard's part of a layer; see `LayerWatch`."""

    awaits_first_check: bool


@dataclass(slots=True)
class Fallbacks:
    """Climbs that were not reported yet: those of one step of the model are reported behind its last KV layer.

    Attributes
    ----------
    last
        The watch of the cache's last KV layer; without one, climbs are reported as they come.
    """

    last: Awaiting | None = None
    _climbs: list[Raised] = field(default_factory=list)

    def add(self, climb: Raised, notify: Callable[[str], None]) -> None:
        """Take a climb; report it now if the last layer was measured before, and so nothing would come behind it."""
        self._climbs.append(climb)
        if self.last is None or not self.last.awaits_first_check:
            self.report(notify)

    def report(self, notify: Callable[[str], None]) -> None:
        """Report the climbs."""
        climbs, self._climbs = self._climbs, []
        for line in [_together(climbs)] if len({s.layer for s in climbs}) > MOST_LINES else [s.line() for s in climbs]:
            notify(line)


def _together(climbs: Sequence[Raised]) -> str:
    """Say what became of many layers in a line."""
    final = {climb.layer: climb.types.label for climb in climbs}
    counts = Counter(final.values()).most_common()
    types = " and ".join(label if len(counts) == 1 else f"{label} ({n})" for label, n in counts)
    worst = max(climbs, key=lambda climb: climb.error if isfinite(climb.error) else float("inf"))
    added = sum(climb.added_bytes for climb in climbs) / 2**10
    return (
        f"{len(final)} KV layers are stored as {types} instead, {added:+.0f} KiB: layers {_spans(sorted(final))}; "
        f"the worst was {worst.reason}"
    )


def _spans(numbers: Sequence[int]) -> str:
    """Name numbers, neighbours together: `0-5, 8, 10-12`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)
