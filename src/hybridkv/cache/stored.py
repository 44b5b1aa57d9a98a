"""A copy of what one KV layer holds, in memory of its own and never changed: what prefixes and sessions are made of.

Packed rows can be taken from some row on, so that a later copy of the same sequence need not repeat an earlier one's;
sinks, tail and center are few and always whole. `hybridkv.cache.kv` makes them and takes them back.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows of one layer.

    Attributes
    ----------
    n_seen
        Tokens that the layer had seen.
    first
        Which of its packed rows, from 0, is the first here.
    packed_k, packed_v
        The planes' bytes, uint8 `[B, Hkv, n, plane bytes]` each.
    exact_k, exact_v
        Sinks and tail in the order of their tokens, uint8 `[B, Hkv, n, plane bytes]` of f16; None without them.
    center
        float32 `[B, Hkv, D]`, or None.
    """

    n_seen: int
    first: int
    packed_k: tuple[Tensor, ...]
    packed_v: tuple[Tensor, ...]
    exact_k: Tensor | None = None
    exact_v: Tensor | None = None
    center: Tensor | None = None

    @property
    def n_packed(self) -> int:
        """Packed rows here."""
        return self.packed_k[0].shape[2]

    @property
    def n_exact(self) -> int:
        """f16 rows here."""
        return 0 if self.exact_k is None else self.exact_k.shape[2]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed rows, which later copies resume from."""
        return sum(plane.nbytes for plane in (*self.packed_k, *self.packed_v))

    @property
    def own_bytes(self) -> int:
        """Bytes of what only this copy needs."""
        return sum(x.nbytes for x in (self.exact_k, self.exact_v, self.center) if x is not None)

    def without_exact(self) -> StoredRows:
        """Return the packed rows alone, for later copies to resume from."""
        return StoredRows(self.n_seen, self.first, self.packed_k, self.packed_v)
