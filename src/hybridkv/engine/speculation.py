"""The choice of what guesses tokens: prompt lookup, the model's own head, a small draft model, or nothing.

Owns the choice, and what all sequences of a model share of it: the costs of steps. `hybridkv.engine.drafts` has a
sequence's part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

from hybridkv.engine.drafts import Drafts, Guesser, SpecKind
from hybridkv.engine.ngrams import NGrams
from hybridkv.engine.pace import Costs, Pace, Trial
from hybridkv.errors import UsageError, one_of
from hybridkv.runtime import DraftStep, Notify, Step

DRAFT_MAX = 7
"""Guesses in a step where nothing else is asked for: with the token before them, eight activation rows of a product."""

MOST_DRAFTS = 63

_TELLING = 8
"""Guesses after which it is worth a line that they do not pay."""


def parse_spec(text: str) -> SpecKind:
    """Check what is to guess.

    Raises
    ------
    UsageError
        Listing what there is.
    """
    kinds: tuple[SpecKind, ...] = get_args(SpecKind)
    return one_of(text, kinds, "--spec", hint="auto: the draft model that -md names, else the model's head and ngram")


@dataclass(slots=True)
class Speculation:
    """Makes the guesses of every sequence of a model.

    Attributes
    ----------
    make_guesser
        Makes what guesses, for one sequence.
    n_max, n_min
        Most and fewest guesses in a step.
    notify
        Told once where guesses do not pay.
    costs
        Of the model's steps, as measured.
    trial
        Whether guesses of its own head pay.
    sequence_bytes
        What a guesser holds for its sequence: the cache of a draft model, or of the head.
    """

    make_guesser: Callable[[], Guesser] = NGrams
    n_max: int = DRAFT_MAX
    n_min: int = 1
    notify: Notify | None = None
    costs: Costs = field(default_factory=Costs)
    trial: Trial = field(default_factory=Trial)
    sequence_bytes: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n_max <= MOST_DRAFTS:
            raise UsageError(f"--draft-max {self.n_max}; allowed: 1 to {MOST_DRAFTS}", hint="--spec off guesses none")
        if not 0 <= self.n_min <= self.n_max:
            raise UsageError(f"--draft-min {self.n_min}; allowed: 0 to --draft-max {self.n_max}")

    def begin(self, step: Step) -> Drafts | None:
        """Begin a sequence; None where the step takes no guesses."""
        if rejects_drafts(step) is not None:
            return None
        assert isinstance(step, DraftStep)
        guesser = self.make_guesser()
        pace = Pace(
            self.costs, self.n_max, max(1, self.n_min), self._tell, getattr(guesser, "priors", None), self.trial
        )
        return Drafts(step, guesser, pace)

    def _tell(self, n_right: int, n_guessed: int) -> None:
        if self.notify is not None and n_guessed >= _TELLING:
            self.notify(
                f"speculation pauses where it does not pay: of {n_guessed} such guesses {n_right} were right; it is "
                "tried again further on"
            )
            self.notify = None


def rejects_drafts(step: Step) -> str | None:
    """Explain why a step takes no guesses; None if it does."""
    if isinstance(step, DraftStep):
        return None
    return f"{step.name} takes tokens one by one: a recurrent state cannot go back there"
