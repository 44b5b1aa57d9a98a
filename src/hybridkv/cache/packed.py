"""The packed rows of one KV layer: consecutive tokens in the layer's own formats, in growing memory.

Owns which rows of its planes are held, and the center that was subtracted from K. Encodes nothing: `hybridkv.cache.kv`
writes the rows that `extend` makes room for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybridkv.cache import planes
from hybridkv.cache.planes import Planes
from hybridkv.cache.spec import KVSpec
from hybridkv.cache.stored import StoredRows
from hybridkv.formats import get_format
from hybridkv.kernels import Segment


class PackedRows:
    """Rows `[start, start + length)` of growing planes.

    Attributes
    ----------
    center
        float32 `[B, Hkv, D]` that is subtracted from K before it is encoded, or None.
    """

    __slots__ = ("_spec", "center", "length", "planes", "start")

    def __init__(self, spec: KVSpec) -> None:
        self._spec = spec
        self.planes = Planes(spec.facts, get_format(spec.types.type_k), get_format(spec.types.type_v))
        self.start = 0
        self.length = 0
        self.center: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.planes.nbytes + (0 if self.center is None else self.center.nbytes)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the rows held."""
        if not self.length:
            return 0
        held = self.planes.batch * self.length * self._spec.bytes_per_token
        return held + (0 if self.center is None else self.center.nbytes)

    def extend(self, n_new: int, keep: int, target: Callable[[int, int], int], batch: int, device: torch.device) -> int:
        """Count `n_new` more rows; the row of the first.

        Without room for them, the newest `keep` rows move to the front; of other memory, if `target` gives another
        number of rows for those needed and the present capacity.
        """
        end = self.start + self.length
        if not self.planes.batch or end + n_new > self.planes.capacity:
            capacity = target(keep + n_new, self.planes.capacity)
            if self.planes.batch == batch and self.planes.capacity == capacity:
                self.planes.move(slice(end - keep, end), 0)
            else:
                self.planes.reallocate(batch, capacity, device, [(slice(end - keep, end), 0)])
            self.start, self.length = 0, keep
            if self._spec.center and capacity and self.center is None:
                f = self._spec.facts
                self.center = planes.allocate((batch, f.n_kv_heads, 4 * f.head_dim_k), device).view(torch.float32)
        row = self.start + self.length
        self.length += n_new
        return row

    def segment(self, length: int) -> Segment:
        """Return a segment of the newest `length` rows."""
        return self.planes.segment(self.start + self.length - length, length, self.center)

    def select(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self.planes.select(indices)
        if self.center is not None:
            self.center = self.center.index_select(0, indices.to(self.center.device))

    def stored(self, first: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Copy the planes' rows from the `first` held on."""
        rows = slice(self.start + first, self.start + self.length)
        k, v = (tuple(p[:, :, rows].clone() for p in side) for side in (self.planes.k, self.planes.v))
        return k, v

    def load(
        self, parts: Sequence[StoredRows], target: Callable[[int, int], int], batch: int, device: torch.device
    ) -> None:
        """Hold the rows of all parts, which must be nobody's yet, and the center of the last that has one."""
        for part in parts:
            assert part.first == self.length, (part.first, self.length)
            row = self.extend(part.n_packed, self.length, target, batch, device)
            for own, other in zip((*self.planes.k, *self.planes.v), (*part.packed_k, *part.packed_v), strict=True):
                own[:, :, row : row + part.n_packed] = other
            if part.center is not None:
                assert self.center is not None
                self.center.copy_(part.center)

    def copy(self) -> PackedRows:
        """Copy the rows into memory of their own."""
        twin = copy.copy(self)
        twin.planes = self.planes.copy()
        twin.center = None if self.center is None else self.center.clone()
        return twin
