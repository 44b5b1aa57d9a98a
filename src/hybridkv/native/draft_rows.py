"""The rows of an output matrix that a head guesses among: those of frequent tokens, and of the text's newest.

Scoring a whole vocabulary takes as long as the rest of a small model's head. A token that has no row here is never
guessed, which costs time where the text goes on with it, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridkv.kernels.cpu_native import allocate
from hybridkv.kernels.weights import Weight

_NEWEST = 512
"""Tokens of texts that have a row beside the frequent ones."""


class DraftRows:
    """A few rows of a matrix, side by side.

    Parameters
    ----------
    whole
        The matrix.
    tokens
        Which rows are always there; none for all, in place.

    Attributes
    ----------
    weight
        What is multiplied.
    """

    def __init__(self, whole: Weight, tokens: Sequence[int]) -> None:
        self._whole, self.weight = whole, whole
        self._ids = list(tokens)
        self._places = {token: place for place, token in enumerate(self._ids)}
        self._next = 0
        if not tokens or whole.n_stack != 1 or len(tokens) + _NEWEST >= whole.n_out:
            self._places, self._ids = {}, []
            return
        n_static = len(self._ids)
        self._ids += [self._ids[0]] * _NEWEST
        data = allocate((1, len(self._ids), whole.data.shape[2]))
        data[0, :n_static] = whole.data[0, torch.tensor(self._ids[:n_static])]
        data[0, n_static:] = 0  # of no token yet: a score of 0, which is nobody's best
        self._n_static = n_static
        self.weight = Weight(whole.format, data, whole.n_in)

    def take(self, tokens: Sequence[int]) -> None:
        """Give tokens of a text a row, in place of those that have had one longest."""
        if not self._ids:
            return
        for token in tokens:
            if token in self._places:
                continue
            place = self._n_static + self._next
            self._next = (self._next + 1) % _NEWEST
            if self._ids[place] != self._ids[0]:
                del self._places[self._ids[place]]
            self._ids[place], self._places[token] = token, place
            self.weight.data[0, place] = self._whole.data[0, token]

    def token(self, row: int) -> int:
        """Return the token of a row."""
        return self._ids[row] if self._ids else row
