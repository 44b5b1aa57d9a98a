"""The times at which a layer's stored rows and attention are checked again after the first prompt. Arithmetic only.

A fault may show only later: past a window, at a block's edge, in the kernel of another phase. Checks whose number
grows with the logarithm of the tokens find these at a cost that fades.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

BLOCK_ROWS = 32
"""Rows of the blocks whose edges are looked at: every larger block's edges are among them."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The checks made so far.

    A prompt's first call is due, then each that doubles the tokens of the last one checked. Of the tokens that come
    one by one, the first is due, then the last and the first row of a block, then every row whose number is a power
    of two.

    Attributes
    ----------
    prompt_tokens
        Tokens in the cache at the last check of a call of several tokens.
    decoded
        Whether a call of one token has been checked.
    last_row, first_row
        Whether one at a block's last row, and one at its first, has been checked.
    """

    prompt_tokens: int = 0
    decoded: bool = False
    last_row: bool = False
    first_row: bool = False

    def due(self, n_seen: int, n_new: int) -> bool:
        """Decide whether to check a call of `n_new` tokens, after which the cache has seen `n_seen`."""
        if n_new > 1:
            return n_seen >= 2 * self.prompt_tokens
        row = n_seen - 1
        power_of_two = row >= BLOCK_ROWS and row & (row - 1) == 0
        return not self.decoded or power_of_two or self._edges(row) != (self.last_row, self.first_row)

    def checked(self, n_seen: int, n_new: int) -> Schedule:
        """Return the schedule once that call has been checked."""
        if n_new > 1:
            return replace(self, prompt_tokens=n_seen)
        last, first = self._edges(n_seen - 1)
        return replace(self, decoded=True, last_row=last, first_row=first)

    def _edges(self, row: int) -> tuple[bool, bool]:
        """Compute `last_row` and `first_row` as they are once this row is checked."""
        return self.last_row or row % BLOCK_ROWS == BLOCK_ROWS - 1, self.first_row or row % BLOCK_ROWS == 0
