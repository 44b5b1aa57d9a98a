"""A copy of what a `ModelCache` holds, in memory of its own and never changed.

A recurrent state cannot go back to an earlier token, so a caller that returns to one keeps a copy from there. Packed
rows only ever grow, so a later copy of the same sequence takes those after an earlier one's and is put behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from hybridkv.cache import KVSpec
from hybridkv.cache.stored import StoredRows


@dataclass(frozen=True, slots=True)
class StoredState:
    """One of the states of a layer: convolution and recurrent, as Transformers shapes them, and whether it was fed."""

    conv: Tensor | None
    recurrent: Tensor | None
    fed: bool

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(x.nbytes for x in (self.conv, self.recurrent) if x is not None)


@dataclass(frozen=True, slots=True)
class StoredCache:
    """The memory of a model at one token.

    Attributes
    ----------
    specs
        How each KV layer was stored, fallbacks included.
    rows
        Of each KV layer.
    pending
        Whether the guard still had to measure the layer.
    errors
        What it had measured; None if it had not.
    states
        Of each layer that has them, by their indices within the layer.
    """

    specs: tuple[KVSpec, ...]
    rows: tuple[StoredRows, ...]
    pending: tuple[bool, ...]
    errors: tuple[float | None, ...]
    states: tuple[tuple[StoredState, ...], ...]

    @property
    def packed_bytes(self) -> int:
        """Bytes of packed rows."""
        return sum(rows.packed_bytes for rows in self.rows)

    @property
    def own_bytes(self) -> int:
        """Bytes of states and exact rows."""
        return sum(rows.own_bytes for rows in self.rows) + sum(s.nbytes for layer in self.states for s in layer)

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return self.packed_bytes + self.own_bytes

    @property
    def layout(self) -> tuple[tuple[int, int], ...]:
        """Of each KV layer: tokens seen, and packed rows up to here; the others are exact."""
        return tuple((rows.n_seen, rows.first + rows.n_packed) for rows in self.rows)

    def packed_only(self) -> StoredCache:
        """Keep the packed rows alone: nothing can resume from here any more, but later copies lie behind them."""
        return replace(self, rows=tuple(rows.without_exact() for rows in self.rows), states=())

    def with_states_of(self, other: StoredCache) -> StoredCache:
        """Combine these packed rows with the states and exact rows of another copy of the same tokens."""
        rows = tuple(
            replace(own, exact_k=x.exact_k, exact_v=x.exact_v, center=x.center)
            for own, x in zip(self.rows, other.rows, strict=True)
        )
        return replace(other, rows=rows)
