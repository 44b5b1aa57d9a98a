"""Guesses from the text itself: what followed the newest tokens where they stood before.

Owns the index of a sequence's n-grams. A guess costs microseconds and no model. Its longest match says best what it is
worth, and `hybridkv.engine.pace` measures that.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridkv.engine.drafts import GoesOn, Guess

SIZES = (12, 6, 3)
"""Tokens that must be alike, the longest match first."""


class NGrams:
    """Guesses by prompt lookup.

    Source: Prompt Lookup Decoding, Apoorv Saxena, 2023; the newest place that matches longest is taken.
    """

    name = "ngram"
    seconds_each = None
    plans = False

    def __init__(self) -> None:
        self._places: tuple[dict[tuple[int, ...], int], ...] = tuple({} for _ in SIZES)
        self._n_read = 0

    def guess(self, text: Sequence[int], n: int, goes_on: GoesOn | None = None) -> Guess:
        """Guess up to `n` tokens after the text, which only ever grows."""
        del goes_on  # they cost nothing
        self._read(text)
        for size, places in zip(SIZES, self._places, strict=True):
            place = places.get(tuple(text[-size:]))
            if place is not None:
                return Guess(_after(text, place, n), [size] * n)
        return Guess([], [])

    def _read(self, text: Sequence[int]) -> None:
        """Note where each n-gram was last followed by a token."""
        for end in range(max(1, self._n_read), len(text)):
            for size, places in zip(SIZES, self._places, strict=True):
                if end >= size:
                    places[tuple(text[end - size : end])] = end
        self._n_read = len(text)


def _after(text: Sequence[int], place: int, n: int) -> list[int]:
    """Return the `n` tokens from a place on; past the text's end they repeat with the match's period."""
    period = len(text) - place
    return [text[place + i % period] for i in range(n)]
