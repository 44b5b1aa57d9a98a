"""Guessed tokens of one sequence: made, run together with the next token, and handed out as far as they were right.

Owns what is open between two runs: the tokens that were run, and the logits after each. Speculation changes when logits
are computed, and nothing else. A token is drawn from the same logits with the same generator, computed ahead or not,
and a guess is right if it is what was drawn: every sampler gives the text that it gives without. So each token has
exactly its own distribution; for a guess that is made with certainty, this is rejection sampling.

Source: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192, appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from hybridkv.engine.pace import Pace
from hybridkv.runtime import DraftStep, Fault, ModelCache, StepResult

SpecKind = Literal["auto", "ngram", "draft", "off"]


@dataclass(frozen=True, slots=True)
class Guess:
    """What may come next.

    Attributes
    ----------
    tokens
        As far as anything was found; they follow one another.
    kind
        Guesses of one kind are as good as each other: how long a match they come from.
    """

    tokens: list[int]
    kind: int


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

    def guess(self, text: Sequence[int], n: int) -> Guess:
        """Guess up to `n` tokens after a text, which begins with the text of the guess before."""
        ...


@dataclass(slots=True)
class Drafts:
    """One sequence's guesses.

    Attributes
    ----------
    step, guesser, pace
        What runs them, makes them, and says how many; None where nothing is guessed.
    tokens, logits, failed
        Of the open run: the next token and the guesses behind it, what came after each, and faults by their place.
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
    _kind: int = 0

    def propose(self, text: Sequence[int], cache: ModelCache, n_most: int, n_others: int = 0) -> list[int]:
        """Return the tokens to run: the text's last, which no step has processed, and guesses behind it.

        Parameters
        ----------
        n_most
            Tokens that are wanted beside the last; there is no use in guessing more.
        n_others
            Rows of other sequences in the same run.
        """
        if self.step is None or self.guesser is None or self.pace is None:
            return [text[-1]]
        n, each = min(n_most, self.pace.n_max), self.guesser.seconds_each
        if each is not None and n > 0:
            n = self.pace.choose(0, self._room(cache, n), n_others, each)
        guess = self.guesser.guess(text, n) if n > 0 else Guess([], 0)
        self._kind, n = guess.kind, len(guess.tokens)
        if each is None and n:
            n = self.pace.choose(guess.kind, self._room(cache, n), n_others)
        return [text[-1], *guess.tokens[:n]]

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

    def close(self, cache: ModelCache, *, ended: bool) -> None:
        """Undo in the cache what the text did not take; without an open run there is nothing to do.

        Parameters
        ----------
        ended
            Whether the text went on another way than was guessed, and did not merely stop.
        """
        if not self.tokens:
            return
        n_guessed = len(self.tokens) - 1
        if n_guessed and self.step is not None and self.pace is not None:
            self.step.keep(cache, self.n_taken)
            wrong = ended and self.n_taken <= n_guessed
            self.pace.note(self._kind, n_guessed, self.n_taken - 1, ended=wrong)
        self.drop()

    def drop(self) -> None:
        """Forget the open run, whose cache is of no more use."""
        self.tokens, self.logits, self.failed, self.n_taken = [], None, {}, 0
