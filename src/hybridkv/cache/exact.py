"""The rows of one KV layer that are kept as f16: the first tokens (sinks) and the newest (the tail).

Owns where they lie and when they leave: the sinks first in the planes and never moved, then an area in which the tail
slides. Rows leave the tail oldest first and in whole blocks; `hybridkv.cache.kv` packs what leaves. As long as nothing
has left, sinks and tail are contiguous.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from hybridkv.cache.planes import Planes
from hybridkv.cache.spec import EXACT_TYPE, FRESH_ROWS, LEAVING_ROWS, KVSpec
from hybridkv.formats import get_format
from hybridkv.kernels import Segment


class ExactRows:
    """Sinks in rows `[0, sinks)`, the tail in rows `[start, start + length)`.

    Attributes
    ----------
    n_sink, n_tail
        How many rows are wanted of each; with a tail of 0, no row but a sink is kept.
    sinks, length
        How many are held of each. The tail may hold more than is wanted.
    """

    __slots__ = ("_spec", "length", "n_sink", "n_tail", "planes", "sinks", "start")

    def __init__(self, spec: KVSpec) -> None:
        self._spec = spec
        fmt = get_format(EXACT_TYPE)
        self.planes = Planes(spec.facts, fmt, fmt)
        self.n_sink, self.n_tail = spec.sink, spec.tail
        self.start, self.sinks, self.length = self.n_sink, 0, 0

    @property
    def n_held(self) -> int:
        """Rows held."""
        return self.sinks + self.length

    @property
    def nbytes_used(self) -> int:
        """Bytes of the rows held."""
        return self.planes.batch * self.n_held * self._spec.exact_bytes_per_token

    def takes(self, n_new: int) -> int:
        """Count how many of `n_new` rows are kept here at first: all with a tail, else what the sinks lack."""
        return n_new if self.n_tail else min(n_new, self.n_sink - self.sinks)

    def leaving(self, n_more: int = 0) -> int:
        """Count the rows that leave the tail, held `n_more` rows longer, before it takes others: whole blocks."""
        return max(0, self.length + n_more - self.n_tail) // LEAVING_ROWS * LEAVING_ROWS

    def packs(self, n_new: int) -> bool:
        """Check whether a call of `n_new` tokens packs rows."""
        if not self.n_tail:
            return self.takes(n_new) < n_new
        return self.leaving(max(0, n_new - FRESH_ROWS) - (self.n_sink - self.sinks)) > 0

    def room(self, target: Callable[[int, int], int]) -> int:
        """Return how many rows `extend` takes at once as one by one, moving and packing none; 1 at least."""
        capacity, missing = self.planes.capacity, self.n_sink - self.sinks
        held = self.sinks if missing else self.n_sink + self.length
        if target(held + 1, capacity) != capacity or self._end + 1 > capacity:
            return 1
        before_leaving = missing + self.n_tail + LEAVING_ROWS - self.length if self.n_tail else missing
        return max(1, min(before_leaving, capacity - self._end))

    def extend(self, n_new: int, target: Callable[[int, int], int], batch: int, device: torch.device) -> int:
        """Count `n_new` more rows; the row of the first. The sinks are filled first, and the tail follows them.

        Without room, the tail moves to the front of its area. Memory becomes larger or smaller where `target` says so,
        which is given the rows needed and the present capacity.
        """
        capacity = self.planes.capacity
        needed = n_new + (self.sinks if self.sinks < self.n_sink else self.n_sink + self.length)
        wanted = target(needed, capacity)
        tail = slice(self.start, self.start + self.length)
        if wanted != capacity:
            self.planes.reallocate(batch, wanted, device, [(slice(0, self.sinks), 0), (tail, self.n_sink)])
            self.start = self.n_sink
        elif self._end + n_new > capacity:
            self.planes.move(tail, self.n_sink)
            self.start = self.n_sink
        row = self._end
        missing = min(n_new, self.n_sink - self.sinks)
        self.sinks += missing
        self.length += n_new - missing
        return row

    def write(self, k: Tensor, v: Tensor, row: int) -> None:
        """Round k and v `[B, Hkv, T, D]` into rows `[row, row + T)`."""
        for (plane,), x in ((self.planes.k, k), (self.planes.v, v)):
            plane.view(torch.float16)[:, :, row : row + x.shape[2]] = x

    def oldest(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the tail's oldest `n` rows of K and V, float16, where they are stored."""
        rows = slice(self.start, self.start + n)
        (k,), (v,) = self.planes.k, self.planes.v
        return k.view(torch.float16)[:, :, rows], v.view(torch.float16)[:, :, rows]

    def drop_oldest(self, n: int) -> None:
        """Let the tail's oldest `n` rows go."""
        self.start += n
        self.length -= n

    def drop_newest(self, n: int) -> int:
        """Let the tail's newest rows go, `n` of them or all; how many those were."""
        dropped = min(n, self.length)
        self.length -= dropped
        if not self.length:
            self.start = self.n_sink
        return dropped

    def segments(self, packed: Segment | None) -> tuple[Segment, ...]:
        """Return all rows in the order of their tokens, with the packed rows, if any, between sinks and tail."""
        if packed is None:
            return (self.planes.segment(0 if self.n_sink else self.start, self.n_held),)
        parts = (self.planes.segment(0, self.sinks), packed, self.planes.segment(self.start, self.length))
        return tuple(part for part in parts if part.length)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Copy K's and V's rows, sinks before tail."""
        sinks, tail = slice(0, self.sinks), slice(self.start, self.start + self.length)
        (k,), (v,) = (tuple(torch.cat([p[:, :, sinks], p[:, :, tail]], 2) for p in side) for side in self._sides())
        return k, v

    def load(self, k: Tensor, v: Tensor, target: Callable[[int, int], int]) -> None:
        """Hold the rows of a copy; none must be held yet."""
        assert not self.n_held, self.n_held
        row = self.extend(k.shape[2], target, k.shape[0], k.device)
        for (plane,), x in zip(self._sides(), (k, v), strict=True):
            plane[:, :, row : row + x.shape[2]] = x

    def _sides(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.planes.k, self.planes.v

    def copy(self) -> ExactRows:
        """Copy the rows into memory of their own."""
        twin = copy.copy(self)
        twin.planes = self.planes.copy()
        return twin

    @property
    def _end(self) -> int:
        return self.sinks if self.sinks < self.n_sink else self.start + self.length
