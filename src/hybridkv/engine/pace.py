"""How many tokens to guess: what makes the most text in a second, by what guesses and runs were worth up to now.

Arithmetic only. A run of several rows costs more than one of a single row, by how much depends on the machine, the
weights and the context; how often guesses hold depends on the text. Both are measured as it goes. Where no number of
guesses pays, none are made for a while, and that while doubles as long as it stays so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_PAUSE, LONGEST_PAUSE = 32, 1024
"""Tokens without a guess, after guesses did not pay."""

GAIN = 1.02
"""What guesses must promise before they are made: more text in the same time."""

_FORGET = 0.9
"""What a count weighs after the next one."""

_FIRST = 4
"""Measurements of which the least counts: the guard checks the first token after a prompt, which takes a while."""

_CLOSE = 0.2
"""How far a new time moves what is expected of a run."""


def moved(known: float, seconds: float) -> float:
    """Move what is expected towards a measurement; one that something else has drawn out counts little."""
    return known + _CLOSE * (min(seconds, 2 * known) - known)


@dataclass(slots=True)
class Costs:
    """Seconds of a run by its rows. One for all sequences of a model.

    Attributes
    ----------
    seconds
        Rows -> what such a run took lately.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    def note(self, n_rows: int, seconds: float) -> None:
        """Take a measurement."""
        known = self.seconds.get(n_rows)
        count = self._counts[n_rows] = self._counts.get(n_rows, 0) + 1
        if known is None or count <= _FIRST:
            self.seconds[n_rows] = seconds if known is None else min(known, seconds)
        else:
            self.seconds[n_rows] = moved(known, seconds)

    def knows(self, n_rows: int) -> bool:
        """Check whether steps of `n_rows` rows have been measured often enough to be compared with."""
        return n_rows in self.seconds and self._counts.get(n_rows, _FIRST) >= _FIRST

    def of(self, n_rows: int) -> float:
        """Estimate a step's seconds: linear between measured row counts, a quarter of a single row for each beyond.

        What was never tried looks cheap, so that it is tried.
        """
        if n_rows in self.seconds:
            return self.seconds[n_rows]
        below = max((n for n in self.seconds if n < n_rows), default=None)
        above = min((n for n in self.seconds if n > n_rows), default=None)
        if below is None:
            return 1.0 if above is None else self.seconds[above]
        least = self.seconds[below]
        if above is None:
            return least * (1 + 0.25 * (n_rows - below) / below)
        return least + (self.seconds[above] - least) * (n_rows - below) / (above - below)


@dataclass(slots=True)
class Odds:
    """How often a guess holds, of one kind of guesses of one sequence.

    Attributes
    ----------
    right, wrong
        Guesses behind right ones, the newest counting most.
    pause, next_pause
        Tokens without a guess, now and after the next try.
    n_guessed, n_right
        All of them.
    """

    right: float = 1.5
    wrong: float = 0.5
    pause: int = 0
    next_pause: int = FIRST_PAUSE
    n_guessed: int = 0
    n_right: int = 0

    @property
    def share(self) -> float:
        """Of guesses behind right ones, how many were right; as if two had been made before."""
        return self.right / (self.right + self.wrong)

    def note(self, n_right: int, *, ended: bool) -> None:
        """Take note of a run: how many guesses held, and whether the next one did not."""
        self.right = _FORGET * self.right + n_right
        self.wrong = _FORGET * self.wrong + ended

    def expected(self, n: int) -> float:
        """Estimate the tokens that a step with `n` guesses gives, the one that is no guess included."""
        share = self.share
        return n + 1 if share > 0.999 else (1 - share ** (n + 1)) / (1 - share)


class Pace:
    """Chooses how many of a sequence's tokens are guessed.

    Parameters
    ----------
    costs
        Of the model.
    n_max, n_min
        Most guesses in a run, and fewest.
    on_pause
        Told how many guesses of a kind were right, and how many were made, where they stop to pay.

    Attributes
    ----------
    n_guessed, n_right
        Guesses that were run, and those that held.
    """

    def __init__(
        self, costs: Costs, n_max: int, n_min: int = 1, on_pause: Callable[[int, int], None] | None = None
    ) -> None:
        self.costs, self.n_max, self.n_min = costs, n_max, n_min
        self._on_pause = on_pause
        self.n_guessed = self.n_right = 0
        self._odds: dict[int, Odds] = {}

    def choose(self, kind: int, n_most: int, n_others: int, seconds_each: float = 0.0) -> int:
        """Choose how many of up to `n_most` guesses of a kind to run; 0 for none.

        Parameters
        ----------
        n_others
            Rows of other sequences in the same run.
        seconds_each
            What it takes to make a guess.
        """
        odds = self._odds.setdefault(kind, Odds())
        if n_most < 1 or not (n_others or self.costs.knows(1)):
            return 0
        if odds.pause > 0:
            odds.pause -= 1
            return 0
        alone = (1 + n_others) / self.costs.of(1 + n_others) * GAIN
        best = 0
        for n in range(self.n_min, min(n_most, self.n_max) + 1):
            speed = (odds.expected(n) + n_others) / (self.costs.of(1 + n_others + n) + n * seconds_each)
            if speed > alone:
                best, alone = n, speed
        if not best and n_most >= self.n_min:
            odds.pause, odds.next_pause = odds.next_pause, min(2 * odds.next_pause, LONGEST_PAUSE)
            odds.right, odds.wrong = 1.5, 0.5  # another part of the text may be another matter
            if self._on_pause is not None and odds.n_guessed:
                self._on_pause(odds.n_right, odds.n_guessed)
        return best

    def note(self, kind: int, n_guessed: int, n_right: int, *, ended: bool) -> None:
        """Take note of a run's guesses."""
        self.n_guessed += n_guessed
        self.n_right += n_right
        odds = self._odds.setdefault(kind, Odds())
        odds.note(n_right, ended=ended)
        odds.n_guessed, odds.n_right = odds.n_guessed + n_guessed, odds.n_right + n_right
        if n_right > 1:
            odds.next_pause = FIRST_PAUSE
