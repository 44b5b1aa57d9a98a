"""Guessed tokens of one sequence: made, run together with the next token, and handed out as far as they were right.

Owns what is open between two steps: the tokens that were run, and the logits after each. Speculation changes when
logits are computed, and nothing else. A token is drawn from the same logits with the same generator, ahead or not,
and a guess is right if it is what was drawn: every sampler gives the text that it gives without. So each token has
exactly its own distribution; for a guess that is made with certainty, this is rejection sampling.

Source: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, appendix A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from hybridkv.engine.pace import Pace
from hybridkv.runtime import DraftStep, Fault, ModelCache, StepResult

SpecKind = Literal["auto", "ngram", "mtp", "draft", "off"]

GoesOn = Callable[[list[int]], bool]
"""Predicate: one more guess behind those of such kinds promises to pay."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A token that may come next.

    Attributes
    ----------
    tokens
        As far as anything was found; they follow one another.
    kinds
        Of each: those of one kind are as good as each other, such as those that a match of one length gave.
    seconds
        What it took to make them.
    reading
        What it took to read much text before that: a prompt, or what came in a pause.
    """

    tokens: list[int]
    kinds: list[int]
    seconds: float = 0.0
    reading: float = 0.0


NOTHING = Guess([], [])
"""No guess."""


class Guesser(Protocol):
    """Makes guesses of one sequence."""

    @property
    def name(self) -> str:
        """Of the way of guessing."""
        ...

    @property
    def seconds_each(self) -> float | None:
        """What it takes to make one, which is then asked for only where it pays; None for next to nothing."""
        ...

    @property
    def plans(self) -> bool:
        """True if the number of guesses is chosen before they are made, all being of kind 0."""
        ...

    def guess(self, text: Sequence[int], n: int, goes_on: GoesOn) -> Guess:
        """Guess up to `n` tokens after a text, which begins with the text of the guess before."""
        ...


@runtime_checkable
class SeesHidden(Protocol):
    """A guesser that reads the model's hidden states.

    Attributes
    ----------
    n_read
        Tokens of a text that it reads at most before it guesses.
    """

    n_read: int

    def see(self, hidden: Tensor, end: int) -> None:
        """Take the final hidden states `[n, hidden]` of a text's newest tokens, up to token `end` of it."""
        ...

    def forget(self) -> None:
        """Begin again: the text is to be processed once more."""
        ...


@dataclass(slots=True)
class Drafts:
    """One sequence's guesses.

    Attributes
    ----------
    step, guesser, pace
        What runs them, makes them, and says how many; None where nothing is guessed.
    tokens, logits, failed
        Of the open step: the next token and the guesses behind it, what came after each, and faults by their place.
    n_taken
        How many of its tokens are the text's.
    """

    step: DraftStep | None = None
    guesser: Guesser | None = None
    pace: Pace | None = None
    tokens: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    failed: dict[int, Fault] = field(default_factory=dict)
    n_taken: int = 0
    _kinds: list[int] = field(default_factory=list)
    _seconds: float = 0.0
    _n_others: int = 0
    _seeing: SeesHidden | None = field(default=None, init=False)
    _sees: bool = field(default=True, init=False)
    _free: bool = field(default=False, init=False)
    _counted: tuple[int, int] = field(default=(0, 0), init=False)

    def __post_init__(self) -> None:
        self._seeing = self.guesser if isinstance(self.guesser, SeesHidden) else None
        self._free = self.guesser is not None and self.guesser.seconds_each is None and not self.guesser.plans

    def propose(self, text: Sequence[int], cache: ModelCache, n_most: int, n_others: int = 0) -> list[int]:
        """Return the tokens to run: the text's last, which no step has processed, and guesses behind it.

        Parameters
        ----------
        n_most
            Tokens that are wanted beside the last; there is no use in guessing more.
        n_others
            Rows of other sequences in the same step.
        """
        if self.step is None or self.guesser is None or self.pace is None:
            return [text[-1]]
        n = min(n_most, self.pace.n_max)
        if n <= 0:
            guess = NOTHING
        elif self._free:
            guess = self.guesser.guess(text, n, _always)
            if guess is not NOTHING:  # only now it matters how much one run takes
                room = self._room(cache, len(guess.tokens))
                guess = replace(guess, tokens=guess.tokens[:room], kinds=guess.kinds[:room])
        else:
            guess = self._ask(text, cache, n, n_others)
        if guess is NOTHING:  # the common case, at a few microseconds
            return [text[-1]]
        n = len(guess.tokens)
        if n and not self.guesser.plans:
            n = self.pace.choose(guess.kinds, n_others)
        self.pace.note_reading(guess.reading)
        if not n:
            self.pace.note_seconds(guess.seconds)
        self._kinds, self._seconds, self._n_others = guess.kinds[:n], guess.seconds, n_others
        return [text[-1], *guess.tokens[:n]]

    def is_ordinary(self, cache: ModelCache) -> bool:
        """Tell whether the next token takes what any other does: the guard does not look at it, and no rows move."""
        return self.step is None or self.step.room(cache, 2) > 1

    def _ask(self, text: Sequence[int], cache: ModelCache, n: int, n_others: int) -> Guess:
        """Guess by what costs something, no more than one run takes."""
        pace, guesser, step = self.pace, self.guesser, self.step
        assert pace is not None and guesser is not None and step is not None
        each = guesser.seconds_each or 0.0
        if self._seeing is not None and self._sees == pace.pauses_beyond(self._seeing.n_read):
            # In a pause, a token costs what it costs without a guesser: nothing is kept for one that does not read.
            self._sees = not self._sees
            step.keep_hidden(cache, wanted=self._sees)
        room = self._room(cache, n)
        if guesser.plans:
            room = pace.choose([0] * room, n_others, each)
        if room <= 0:
            return NOTHING
        return guesser.guess(text, room, partial(pace.goes_on, n_others=n_others, seconds_each=each))

    def _room(self, cache: ModelCache, n: int) -> int:
        """Count how many of `n` guesses one step takes."""
        assert self.step is not None
        return self.step.room(cache, 1 + n) - 1

    def open(self, tokens: Sequence[int], answers: StepResult, first_row: int) -> None:
        """Take the answers to what was proposed, from a row of theirs on."""
        assert not self.tokens, self.tokens
        self.tokens, self.n_taken = list(tokens), 0
        rows = range(first_row, first_row + len(tokens))
        self.logits = answers.logits[rows.start : rows.stop]
        self.failed = {row - first_row: answers.failed[row] for row in rows if row in answers.failed}

    def take(self, token: int) -> Tensor | None:
        """Return the logits `[1, V]` after the text's next token, if the open guesses have it next.

        Raises
        ------
        NonFiniteError, MismatchError
            What the guard found at it.
        """
        place = self.n_taken
        if self.logits is None or place >= len(self.tokens) or self.tokens[place] != token:
            return None
        self.n_taken += 1
        if place in self.failed:
            raise self.failed[place]
        return self.logits[place : place + 1]

    def close(self, cache: ModelCache, end: int, *, ended: bool) -> None:
        """Undo in the cache what the text did not take; without an open step there is nothing to do.

        Parameters
        ----------
        end
            Tokens that the cache is to hold.
        ended
            Whether the text went on another way than was guessed, and did not merely stop.
        """
        if not self.tokens:
            return
        n_guessed = len(self.tokens) - 1
        if n_guessed and self.step is not None and self.pace is not None:
            self.step.keep(cache, self.n_taken)
            wrong = ended and self.n_taken <= n_guessed
            self.pace.note(self._kinds, self.n_taken - 1, ended=wrong, seconds=self._seconds, n_others=self._n_others)
        self.read(cache, end, self.n_taken)
        self._close()

    def read(self, cache: ModelCache, end: int, n_taken: int | None = None) -> None:
        """Show the guesser what the last step knew of a cache's newest tokens.

        Parameters
        ----------
        end
            Tokens that the cache holds.
        n_taken
            How many of the step's tokens are the text's; all by default.
        """
        guesser = self._seeing
        if guesser is None or self.step is None or not self._sees:
            return
        hidden = self.step.take_hidden(cache)
        if hidden is not None:
            guesser.see(hidden[:n_taken], end)

    def counts(self) -> tuple[int, int]:
        """Count guesses that were run since this was asked last, and those of them that were right."""
        if self.pace is None:
            return 0, 0
        now, (n_guessed, n_right) = (self.pace.n_guessed, self.pace.n_right), self._counted
        self._counted = now
        return now[0] - n_guessed, now[1] - n_right

    def drop(self) -> None:
        """Forget the open step, and the text up to now: the cache is of no more use."""
        self._close()
        self._sees = True  # another cache follows, and steps keep hidden states unless told otherwise
        if self._seeing is not None:
            self._seeing.forget()

    def _close(self) -> None:
        self.tokens, self.logits, self.failed, self.n_taken = [], None, {}, 0


def _always(kinds: list[int]) -> bool:
    """Answer that one more guess is welcome: it costs nothing."""
    del kinds
    return True
