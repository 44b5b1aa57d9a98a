"""Guesses from the text itself: what followed the newest tokens where they stood before.

Owns the index of a sequence's n-grams. A guess costs microseconds and no model. Its longest match says best what it is
worth, and `hybridkv.engine.pace` measures that.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridkv.engine.drafts import NOTHING, GoesOn, Guess

SIZES = (12, 6, 3)
"""Tokens that must be alike, the longest match first: guesses of one such kind are as good as each other."""

CHANGED = 1
"""The kind of a guess behind a token that was changed: shorter than any match."""

PRIORS = {12: 0.9, 6: 0.75, 3: 0.75, CHANGED: 0.75}
"""Share of guesses behind such matches that hold, before any was tried."""

_LEAST, _MOST = SIZES[-1], SIZES[0]

_BITS = 24
"""Of a token in an n-gram. It is one number, since the collector of garbage looks at tuples."""

_MASK = (1 << _LEAST * _BITS) - 1

_PLACES = 16
"""Places that are compared, the newest first."""


class NGrams:
    """Guesses by prompt lookup.

    Where nothing stands twice, as in most text, a token costs one entry in a table, which is also what is looked up.
    A text that is written again with words changed (a name, a number) matches nothing for three tokens behind each of
    them: the match before it is gone on with.

    Source: Prompt Lookup Decoding, Apoorv Saxena, 2023; the newest place that matches longest is taken.
    """

    name = "ngram"
    seconds_each = None
    plans = False
    priors = PRIORS

    def __init__(self) -> None:
        self._text: list[int] = []
        self._ngram = -1  # no text begins with what its bits say
        self._newest: dict[int, int] = {}
        self._before = [0]
        """Place -> the one before it that the same tokens stand in front of; 0 for none."""
        self._period = 0
        """Distance of the last long match, in tokens; 0 before there was one."""

    def guess(self, text: Sequence[int], n: int, goes_on: GoesOn | None = None) -> Guess:
        """Guess up to `n` tokens after the text, which only ever grows."""
        del goes_on  # they cost nothing
        self._read(text)
        place = self._before[-1]
        if not place:
            if self._period and self._has_changed():
                return Guess(_after(self._text, len(self._text) - self._period, n), [CHANGED] * n)
            return NOTHING
        place, n_alike = self._longest(place)
        kind = next(size for size in SIZES if n_alike >= size)
        if kind > _LEAST:
            self._period = len(self._text) - place
        return Guess(_after(self._text, place, n), [kind] * n)

    def _read(self, text: Sequence[int]) -> None:
        """Note where each n-gram ends that is new."""
        own, newest, before, ngram = self._text, self._newest, self._before, self._ngram
        for token in text[len(own) :]:
            own.append(token)
            ngram = (ngram << _BITS | token) & _MASK
            before.append(newest.get(ngram, 0))
            newest[ngram] = len(own)
        self._ngram = ngram

    def _longest(self, place: int) -> tuple[int, int]:
        """Find the newest place that matches longest, from the newest that matches at all; it, and how long."""
        best, most = place, _LEAST
        for _ in range(_PLACES):
            n_alike = self._n_alike(place)
            if n_alike > most:
                best, most = place, n_alike
            place = self._before[place]
            if most == _MOST or not place:
                break
        return best, most

    def _has_changed(self) -> bool:
        """Tell whether the newest tokens are those of the last long match, but for one of the last three."""
        own, period = self._text, self._period
        unlike = [n for n in range(1, 2 * _LEAST) if own[-n] != own[-n - period]]
        return len(unlike) == 1 and unlike[0] <= _LEAST

    def _n_alike(self, place: int) -> int:
        """Count the tokens in front of a place that are those at the text's end, as far as that matters."""
        own, n = self._text, _LEAST
        most = min(_MOST, place)
        while n < most and own[place - 1 - n] == own[-1 - n]:
            n += 1
        return n


def _after(text: Sequence[int], place: int, n: int) -> list[int]:
    """Return the `n` tokens from a place on; past the text's end they repeat with the match's period."""
    period = len(text) - place
    return [text[place + i % period] for i in range(n)]
