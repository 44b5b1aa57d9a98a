"""The number of tokens to guess: what makes the most text in a second, by what guesses and steps were worth up to now.

Arithmetic only. A step of several tokens costs more than one of a single token, by how much depends on the machine, the
weights and the context; how often guesses hold depends on the text. Both are measured as it goes. Where no number of
guesses pays, none are made for a while, and that while doubles as long as it stays so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, prod

FIRST_PAUSE, LONGEST_PAUSE = 32, 1024
"""Tokens without a guess, after guesses did not pay."""

GAIN = 1.02
"""The gain that guesses must promise before they are made: more text in the same time."""

_FORGET, _FORGET_SHARES = 0.9, 0.98
"""The weight of a count after the next one; of guesses that say how likely they are, a kind changes slowly."""

_FIRST_TRIALS, _TRIALS, _FORGET_TRIALS = 6, 16, 0.97
"""Steps with guesses that cost something, after which they are judged: first whether they are worth half of that, then
whether they are worth it; and what a step weighs after the next one."""

_TRY = 2.0
"""Single tokens' time that a try may lose; it then ends, whatever else may be hoped for."""

_LOST, _LEAST_LOST = 0.01, 0.0025
"""The share of the time of single tokens that guesses may lose: a pause is as long as what was lost asks for. It halves
from one try that fails to the next."""

_FIRST = 4
"""Measurements of which the least counts: the guard checks the first token after a prompt, which takes a while."""

_KNOWN = 2
"""Measurements without which a number of tokens is not known: one alone may have had memory taken or a buffer made."""

_ONE_IN = 16
"""Runs without a guess of which one is timed, once a few have been."""

_CLOSE = 0.2
"""Share by which a new time moves the time expected of a guess."""

_SLOWER, _FASTER = 0.05, 0.5
"""Shares by which a longer and a shorter time move the time expected of a step. Other programs only make one longer,
and a number of tokens that has come to look slow is not run any more, so that nothing would correct it."""

_LIKELY = 0.75
"""Share of guesses that hold, as long as nothing is known."""


def moved(known: float, seconds: float) -> float:
    """Move what is expected towards a measurement; one that something else has drawn out counts little."""
    return known + _CLOSE * (min(seconds, 2 * known) - known)


@dataclass(slots=True)
class Costs:
    """Seconds of a step by its tokens, those of all sequences. One for all sequences of a model.

    Attributes
    ----------
    seconds
        Rows -> what such a step took lately.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)
    _n_untimed: int = 0

    def is_due(self, n_tokens: int) -> bool:
        """Tell whether a run without a guess is to be timed, which costs something: the first, then one in a few."""
        if self._counts.get(n_tokens, 0) < _FIRST:
            return True
        self._n_untimed = (self._n_untimed + 1) % _ONE_IN
        return not self._n_untimed

    def note(self, n_tokens: int, seconds: float) -> None:
        """Take a measurement."""
        known = self.seconds.get(n_tokens)
        count = self._counts[n_tokens] = self._counts.get(n_tokens, 0) + 1
        if known is None or count <= _FIRST:
            self.seconds[n_tokens] = seconds if known is None else min(known, seconds)
        else:
            close = _SLOWER if seconds > known else _FASTER
            self.seconds[n_tokens] = known + close * (min(seconds, 2 * known) - known)

    def knows(self, n_tokens: int) -> bool:
        """Check whether steps of `n_tokens` tokens have been measured often enough to be compared with."""
        return n_tokens in self.seconds and self._counts.get(n_tokens, _KNOWN) >= _KNOWN

    def of(self, n_tokens: int) -> float:
        """Estimate a step's seconds: linear between measured counts, a quarter of a single token for each beyond.

        What was never tried looks cheap, so that it is tried; and so does what was tried once and took long.
        """
        if self.knows(n_tokens):
            return self.seconds[n_tokens]
        return min(self._between(n_tokens), self.seconds.get(n_tokens, inf))

    def _between(self, n_tokens: int) -> float:
        below = max((n for n in self.seconds if n < n_tokens), default=None)
        above = min((n for n in self.seconds if n > n_tokens), default=None)
        if below is None:
            return 1.0 if above is None else self.seconds[above]
        least = self.seconds[below]
        if above is None:
            return least * (1 + 0.25 * (n_tokens - below) / below)
        return least + (self.seconds[above] - least) * (n_tokens - below) / (above - below)


@dataclass(slots=True)
class Odds:
    """The share of guesses that hold, of one kind of guesses of one sequence.

    Attributes
    ----------
    prior
        The share that hold, as far as is known before any was tried; it counts as two guesses.
    right, wrong
        Guesses behind right ones, the newest counting most.
    pause, next_pause
        Tokens without a guess, now and after the next try.
    n_guessed, n_right
        All of them.
    """

    prior: float = _LIKELY
    right: float = field(init=False)
    wrong: float = field(init=False)
    forget: float = _FORGET
    pause: int = 0
    next_pause: int = FIRST_PAUSE
    n_guessed: int = 0
    n_right: int = 0

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was tried."""
        self.right, self.wrong = 2 * self.prior, 2 - 2 * self.prior

    @property
    def share(self) -> float:
        """Of guesses behind right ones, how many were right; as if two had been made before."""
        return self.right / (self.right + self.wrong)

    def note(self, n_right: int, n_wrong: int, n_guessed: int) -> None:
        """Take note of a step: how many of its guesses held, and how many are known to have been wrong."""
        self.right = self.forget * self.right + n_right
        self.wrong = self.forget * self.wrong + n_wrong
        self.n_guessed, self.n_right = self.n_guessed + n_guessed, self.n_right + n_right


@dataclass(slots=True)
class Trial:
    """A trial of guesses that cost something to make, all kinds together: whether they pay.

    Attributes
    ----------
    gained, spent
        Seconds that right guesses saved, and those that guesses took, the newest counting most.
    lost
        Seconds that guesses, and reading the text for them, took since the last pause, less what they saved; of that, a
        few tokens' time at most.
    share
        Of the time of single tokens, what may be lost from now on.
    n_runs
        Since the last pause.
    pause, next_pause
        Tokens without a guess, now and after the next loss.
    """

    gained: float = 0.0
    spent: float = 0.0
    lost: float = 0.0
    share: float = _LOST
    n_runs: int = 0
    pause: int = 0
    next_pause: int = FIRST_PAUSE

    def note(self, gained: float, spent: float, alone: float) -> bool:
        """Take note of a step; return whether a pause begins.

        Parameters
        ----------
        alone
            Seconds of a token without guesses.
        """
        self.gained = _FORGET_TRIALS * self.gained + gained
        self.spent = _FORGET_TRIALS * self.spent + spent
        self.lost = max(self.lost + spent - gained, -_TRY * alone)
        self.n_runs += 1
        asked = self.spent if self.n_runs >= _TRIALS else self.spent / 2
        if self.lost <= _TRY * alone and (self.n_runs < _FIRST_TRIALS or self.gained > asked):
            if self.n_runs > 8 * _TRIALS:
                self.next_pause, self.share = FIRST_PAUSE, _LOST
            return False
        self.pause = max(self.next_pause, round(self.lost / (self.share * alone)))
        self.next_pause, self.share = min(2 * self.next_pause, LONGEST_PAUSE), max(self.share / 2, _LEAST_LOST)
        self.gained, self.spent, self.lost, self.n_runs = 0.0, 0.0, 0.0, 0
        return True


class Pace:
    """Chooses how many of a sequence's tokens are guessed.

    Parameters
    ----------
    costs
        Of the model.
    n_max, n_min
        Most guesses in a step, and fewest.
    on_pause
        Told how many guesses of a kind were right, and how many were made, where they stop to pay.
    priors
        How often guesses of some kinds hold, before any was tried; kinds below 0 are judged together.
    trial
        Whether guesses of such kinds pay; of all sequences.

    Attributes
    ----------
    n_guessed, n_right
        Guesses that were run, and those that held.
    """

    def __init__(
        self,
        costs: Costs,
        n_max: int,
        n_min: int = 1,
        on_pause: Callable[[int, int], None] | None = None,
        priors: Mapping[int, float] | None = None,
        trial: Trial | None = None,
    ) -> None:
        self.costs, self.n_max, self.n_min = costs, n_max, n_min
        self._on_pause = on_pause
        self.n_guessed = self.n_right = 0
        self._odds = {
            kind: Odds(share, forget=_FORGET_SHARES if kind < 0 else _FORGET) for kind, share in (priors or {}).items()
        }
        self._trial = trial or Trial()
        self._later = Odds(forget=_FORGET_SHARES)
        """Of guesses behind right ones, of all kinds: they hold more often than the first."""

    def pauses_beyond(self, n_tokens: int) -> bool:
        """Tell whether no guess that costs something will be made within the next tokens."""
        return self._trial.pause > n_tokens

    def goes_on(self, kinds: Sequence[int], n_others: int, seconds_each: float) -> bool:
        """Tell whether one more guess behind those of such kinds promises to pay, at what it takes to make it."""
        alone, n = self.costs.of(1 + n_others), len(kinds)
        if not kinds:
            if not (n_others or self.costs.knows(1)):
                return False
            self._trial.pause, paused = max(0, self._trial.pause - 1), self._trial.pause > 0
            return not paused
        shares = [self._of(kind).share for kind in kinds]
        # Of two sizes, since a step of three tokens may take longer than one of four.
        each = min((self.costs.of(1 + n_others + more) - alone) / more for more in (n + 1, n + 2))
        return prod(shares) * self._later.share * alone / (1 + n_others) > seconds_each + each

    def choose(self, kinds: Sequence[int], n_others: int, seconds_each: float = 0.0) -> int:
        """Choose how many of guesses of such kinds, one behind the other, to run; 0 for none.

        Parameters
        ----------
        n_others
            Rows of other sequences in the same step.
        seconds_each
            What it takes to make a guess.
        """
        if not kinds or not (n_others or self.costs.knows(1)):
            return 0
        odds, n_most = self._of(kinds[0]), len(kinds)
        if odds.pause > 0:
            odds.pause -= 1
            return 0
        alone = (1 + n_others) / self.costs.of(1 + n_others) * GAIN
        best, tokens, likely = 0, 1.0 + n_others, 1.0
        for n, kind in enumerate(kinds[: self.n_max], 1):
            likely *= self._of(kind).share
            tokens += likely
            speed = tokens / (self.costs.of(1 + n_others + n) + n * seconds_each)
            if n >= self.n_min and speed > alone:
                best, alone = n, speed
        if not best and n_most >= self.n_min and kinds[0] >= 0:
            odds.pause, odds.next_pause = odds.next_pause, min(2 * odds.next_pause, LONGEST_PAUSE)
            odds.begin()  # another part of the text may be another matter
            if self._on_pause is not None and odds.n_guessed:
                self._on_pause(odds.n_right, odds.n_guessed)
        return best

    def note(self, kinds: Sequence[int], n_right: int, *, ended: bool, seconds: float = 0.0, n_others: int = 0) -> None:
        """Take note of a step's guesses.

        Parameters
        ----------
        ended
            Whether the one behind those that were right was wrong.
        seconds
            What it took to make them.
        """
        self.n_guessed += len(kinds)
        self.n_right += n_right
        for kind in dict.fromkeys(kinds):
            right = kinds[:n_right].count(kind)
            wrong = ended and n_right < len(kinds) and kinds[n_right] == kind
            if right or wrong:
                self._of(kind).note(right, int(wrong), kinds.count(kind))
        if n_right:
            self._later.note(n_right - 1, int(ended and n_right < len(kinds)), len(kinds) - 1)
        if n_right > 1:
            self._of(kinds[0]).next_pause = FIRST_PAUSE
        if seconds:
            alone = self.costs.of(1 + n_others)
            more = self.costs.of(1 + n_others + len(kinds)) - alone
            self._judge(n_right * alone / (1 + n_others), seconds + more)

    def note_seconds(self, seconds: float) -> None:
        """Take note of what guesses took of which none was worth a step."""
        if seconds:
            self._judge(0.0, seconds)

    def note_reading(self, seconds: float) -> None:
        """Take note of what reading a prompt, or the text of a pause, took; no guess is judged by that."""
        self._trial.lost += seconds

    def _judge(self, gained: float, spent: float) -> None:
        if self._trial.note(gained, spent, self.costs.of(1)) and self._on_pause is not None:
            self._on_pause(self.n_right, self.n_guessed)

    def _of(self, kind: int) -> Odds:
        return self._odds.setdefault(kind, Odds())
