"""Memory of stored rows: the planes of one K format and one V format, for a number of sequences.

Owns allocation and moving; not which rows are valid, which `hybridkv.cache.packed` and `hybridkv.cache.exact` know.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from hybridkv.cache.spec import AttentionFacts
from hybridkv.formats import KVFormat
from hybridkv.kernels import Segment, cpu_native

Move = tuple[slice, int]
"""Rows, and the row that the first of them moves to."""


class Planes:
    """The planes of one layer's K and V.

    Attributes
    ----------
    k, v
        One uint8 tensor `[B, Hkv, capacity, plane bytes]` per plane of the format; empty before `reallocate`.
    batch, capacity
        Sequences, and rows allocated for each; 0 before.
    key
        Another object for every memory: who keeps addresses compares it.
    """

    __slots__ = ("_facts", "_format_k", "_format_v", "batch", "capacity", "k", "key", "v")

    def __init__(self, facts: AttentionFacts, format_k: KVFormat, format_v: KVFormat) -> None:
        self._facts, self._format_k, self._format_v = facts, format_k, format_v
        self.k: tuple[Tensor, ...] = ()
        self.v: tuple[Tensor, ...] = ()
        self.batch = self.capacity = 0  # numbers of their own: every token asks for them
        self.key = object()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(plane.nbytes for plane in (*self.k, *self.v))

    def segment(self, start: int, length: int, center: Tensor | None = None) -> Segment:
        """Return rows `[start, start + length)` as a segment for a kernel."""
        return Segment(self.k, self.v, self._format_k, self._format_v, start, length, center)

    def reallocate(self, batch: int, capacity: int, device: torch.device, kept: Sequence[Move]) -> None:
        """Take memory of another size, with the `kept` rows of the old, if any, in their places."""
        f = self._facts
        shape = (batch, f.n_kv_heads, capacity)
        self.k = _moved(self.k, kept, shape, self._format_k.plane_bytes(f.head_dim_k), device)
        self.v = _moved(self.v, kept, shape, self._format_v.plane_bytes(f.head_dim_v), device)
        self.batch, self.capacity, self.key = batch, capacity, object()

    def move(self, rows: slice, to: int) -> None:
        """Move rows within the memory."""
        for plane in (*self.k, *self.v):
            plane[:, :, to : to + rows.stop - rows.start] = plane[:, :, rows].clone()  # the places may overlap

    def select(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (int64 `[B']`), in that order, in memory of their own."""
        self.k = tuple(plane.index_select(0, indices.to(plane.device)) for plane in self.k)
        self.v = tuple(plane.index_select(0, indices.to(plane.device)) for plane in self.v)
        self.batch, self.key = len(indices) if self.k else 0, object()

    def copy(self) -> Planes:
        """Copy the rows into memory of their own."""
        twin = copy.copy(self)
        twin.select(torch.arange(self.batch))
        return twin


def _moved(
    planes: tuple[Tensor, ...],
    kept: Sequence[Move],
    shape: tuple[int, int, int],
    plane_bytes: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Allocate planes of `shape` (batch, heads, rows) and move the `kept` rows of the old planes there, if any."""
    fresh = tuple(allocate((*shape, nbytes), device) for nbytes in plane_bytes)
    for new, old in zip(fresh, planes, strict=False):
        for rows, to in kept:
            new[:, :, to : to + rows.stop - rows.start] = old[:, :, rows]
    return fresh


def allocate(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Allocate uninitialized memory: nothing may read a row that was not written."""
    if device.type == "cpu":
        return cpu_native.allocate(shape)
    return torch.empty(shape, dtype=torch.uint8, device=device)
