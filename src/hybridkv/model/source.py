"""The holder of a model's weights: a mapped file, a directory, or a model in memory."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from hybridkv.kernels.weights import Weight


class Source(Protocol):
    """Weights by their GGUF names, in the file's own order and conventions."""

    def has(self, name: str) -> bool:
        """Check whether there is a tensor of this name."""
        ...

    def weight(self, name: str) -> Weight:
        """Return a matrix `[1, n_out, n_in]` or a stack of them, as it lies; the same object each time."""
        ...

    def vector(self, name: str) -> Tensor:
        """Decode a small tensor: float32 in the file's shape."""
        ...

    def check(self) -> str | None:
        """Name the first tensor that holds NaN or infinity, and say where; None if there is none."""
        ...
