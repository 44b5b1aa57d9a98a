"""Cosines and sines of the positions that a step has come to, of each kind of RoPE that its model has."""

from __future__ import annotations

from collections.abc import Sequence

from hybridkv.kernels.step import Angles
from hybridkv.model.protocols import Config
from hybridkv.model.rope import rope_angles

_FIRST_POSITIONS = 1024


class RopeTables:
    """The tables of a model, as long as positions have needed them; half as long again when one is beyond.

    Parameters
    ----------
    config
        The model's.
    kinds
        Of RoPE, in the operations' order; none for a model without positions.
    """

    def __init__(self, config: Config, kinds: Sequence[str | None]) -> None:
        self._config, self._kinds = config, tuple(kinds)
        self._tables: list[Angles] = []

    @property
    def n_positions(self) -> int | None:
        """Positions that the tables have now; None where nothing turns."""
        return len(self._tables[0][0]) if self._tables else None

    def span(self, position: int, n_tokens: int) -> list[Angles]:
        """Return the tables' rows from `position` on, by kind: float32 `[T, n_rotated / 2]`."""
        end = position + n_tokens
        if self._kinds and end > (self.n_positions or 0):
            n_positions = max(_FIRST_POSITIONS, end + end // 2)
            self._tables = [rope_angles(self._config, n_positions, kind) for kind in self._kinds]
        return [(cos[position:end], sin[position:end]) for cos, sin in self._tables]

    def at(self, positions: Sequence[int]) -> list[Angles]:
        """Return the tables' rows at some positions, by kind."""
        return [(cos[positions], sin[positions]) for cos, sin in self.span(0, max(positions) + 1)]

    def of_kind(self, kind: str | None, positions: Sequence[int]) -> Angles:
        """Return the rows at some positions, of one of the kinds."""
        return self.at(positions)[self._kinds.index(kind)]
