"""Guesses from a model's own head of multi-token prediction.

Owns one sequence's part of it: which hidden states the head has not read yet, and the rows of its cache. A guess that
is only likely says how likely the head thinks it is; `hybridkv.engine.pace` measures what that is worth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridkv.engine import ngrams as lookup
from hybridkv.engine.drafts import NOTHING, GoesOn, Guess
from hybridkv.engine.ngrams import SIZES, NGrams
from hybridkv.engine.pace import moved
from hybridkv.kernels.threads import torch_on_one_thread
from hybridkv.native.predict import MOST_NEW, Predictor

STEPS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
"""Shares between which guesses are counted as of one kind: -1 for those below the first."""

PRIORS = {-1 - i: (low + high) / 2 for i, (low, high) in enumerate(zip((0.0, *STEPS), (*STEPS, 1.0), strict=True))}
"""Share of guesses of each kind that hold, before any was tried."""

_TRUSTED = SIZES[:2]
"""Matches so long that what followed them is guessed before the head is asked."""


_CAUGHT_UP = MOST_NEW // 2
"""New tokens of a text that are read along with guesses; more are a prompt, or what came in a pause."""


class HeadGuesser:
    """One sequence's guesses by a head.

    Parameters
    ----------
    predictor
        The model's.
    ngrams
        Asked first, since they cost nothing; None to ask the head alone.
    """

    name = "mtp"
    plans = False
    priors = PRIORS | lookup.PRIORS
    n_read = MOST_NEW

    def __init__(self, predictor: Predictor, ngrams: NGrams | None = None) -> None:
        self._predictor, self._ngrams = predictor, ngrams
        self.seconds_each = 0.0
        self.forget()

    def forget(self) -> None:
        """Begin again: the text is to be processed once more."""
        self._rows = self._predictor.new_rows()
        self._new: list[Tensor] = []
        self._n_new = self._n_added = self._end = 0

    def see(self, hidden: Tensor, end: int) -> None:
        """Take final hidden states `[n, hidden]` of the text's tokens up to `end`."""
        if end - len(hidden) != self._end:
            self.forget()
        # The rows of right guesses stay: they differ a little from what these hidden states give.
        kept = min(self._n_added, len(hidden) - 1)
        self._rows.store.take_back(self._n_added - kept)
        self._n_added, self._end, hidden = 0, self._end + kept, hidden[kept:]
        self._new.append(hidden)
        self._n_new += len(hidden)
        self._end = end
        while self._n_new - len(self._new[0]) >= MOST_NEW:
            self._n_new -= len(self._new.pop(0))

    def guess(self, text: Sequence[int], n: int, goes_on: GoesOn) -> Guess:
        """Guess up to `n` tokens after the text, which only ever grows."""
        if self._ngrams is not None:
            found = self._ngrams.guess(text, n, goes_on)
            if found.kinds and found.kinds[0] in _TRUSTED:
                return found
        if not goes_on([]) or not self._new or self._end != len(text) - 1:
            return NOTHING
        start, n_new = time.perf_counter(), self._n_new
        tokens, kinds = self._ask(text, n, goes_on)
        seconds = time.perf_counter() - start
        if n_new > _CAUGHT_UP:
            return Guess(tokens, kinds, reading=seconds)
        each = seconds / len(tokens)
        self.seconds_each = moved(self.seconds_each, each) if self.seconds_each else each
        return Guess(tokens, kinds, seconds)

    @torch_on_one_thread()
    @torch.inference_mode()
    def _ask(self, text: Sequence[int], n: int, goes_on: GoesOn) -> tuple[list[int], list[int]]:
        """Read what is new of the text, and guess one token after the other; the guesses' rows do not stay."""
        hidden = torch.cat(self._new)[-MOST_NEW:]
        self._new, self._n_new = [], 0
        first = self._end - len(hidden)
        self._predictor.read(self._rows, text[first + 1 :], hidden, first)
        tokens: list[int] = []
        kinds: list[int] = []
        while True:
            token, share = self._predictor.guess()
            tokens.append(token)
            kinds.append(-1 - sum(share >= step for step in STEPS))
            if len(tokens) == n or not goes_on(kinds):
                break
            self._predictor.add(self._rows, token, self._end + len(tokens) - 1)
            self._n_added += 1
        return tokens, kinds
