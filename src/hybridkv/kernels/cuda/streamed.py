"""Stacks of matrices in main memory that reach a card window by window, packed, for the rows of a prompt.

What is sent lies in a mapped file, which a card cannot read: a chunk is copied to pinned memory, and sent from there
while the next one is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridkv.kernels.cuda.packed_layout import CHUNK_BYTES, PackedWeight, upload
from hybridkv.kernels.weights import Weight

_SLOTS = 3
"""Chunks that are under way at a time."""


class Staging:
    """Pinned memory through which chunks are sent; all stacks of a model share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        pinned = device.type == "cuda"
        self._slots = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(_SLOTS)]
        self._sent: list[torch.cuda.Event] = []
        if pinned:
            self._sent = [torch.cuda.Event() for _ in range(_SLOTS)]  # type: ignore[no-untyped-call]
        self._next = 0

    def send(self, chunk: Tensor) -> Tensor:
        """Return a copy of a chunk, uint8 of any shape, on the device; it may be under way still."""
        if chunk.numel() > CHUNK_BYTES:  # a single row that long
            return chunk.to(self._device)
        slot, self._next = self._next, (self._next + 1) % _SLOTS
        if self._sent:
            self._sent[slot].synchronize()
        staged = self._slots[slot][: chunk.numel()].view(chunk.shape)
        staged.copy_(chunk)
        sent = staged.to(self._device, non_blocking=True, copy=True)
        if self._sent:
            self._sent[slot].record()
        return sent


class StreamedStack:
    """A stack of matrices in main memory.

    Parameters
    ----------
    weights
        Of one type and width; the outputs of the first come first in every matrix.
    """

    def __init__(self, weights: Sequence[Weight], staging: Staging, device: torch.device) -> None:
        first = weights[0]
        self._weights, self._staging, self._device = tuple(weights), staging, device
        self.n_stack, self.n_in = first.n_stack, first.n_in
        self.n_out = sum(weight.n_out for weight in weights)

    def window(self, first: int, n: int) -> PackedWeight:
        """Send matrices [first, first + n) to the device."""
        parts = [Weight(w.format, w.data[first : first + n], w.n_in) for w in self._weights]
        return upload(parts, self._device, send=self._staging.send)
