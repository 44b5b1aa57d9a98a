"""The tokens of equally long sequences: one buffer, as long as the context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class History:
    """Tokens up to now, held once: as a tensor for the model, and as integers for what looks back.

    Parameters
    ----------
    n_ctx
        Most tokens of a sequence.

    Attributes
    ----------
    length
        Tokens of each sequence.
    """

    def __init__(self, n_ctx: int) -> None:
        self._rows = np.empty((1, n_ctx), np.int64)
        self.length = 0

    @property
    def tokens(self) -> Tensor:
        """int64 `[B, T]`, a view."""
        return torch.from_numpy(self._rows)[:, : self.length]

    @property
    def text(self) -> Sequence[int]:
        """The tokens of a single sequence, a view."""
        assert len(self._rows) == 1
        return memoryview(self._rows[0])[: self.length]  # its items are ints, where NumPy's are slow

    def begin(self, tokens: Sequence[int]) -> None:
        """Hold one sequence: these tokens, and nothing else."""
        if len(self._rows) > 1:
            self._rows = np.empty_like(self._rows[:1])
        self._rows[0, : len(tokens)] = tokens
        self.length = len(tokens)

    def branch(self, n_seqs: int) -> None:
        """Let so many sequences go on from the one."""
        self._rows = np.repeat(self._rows, n_seqs, axis=0)

    def append(self, tokens: Tensor) -> None:
        """Put one token behind each sequence, int64 `[B]`."""
        self._rows[:, self.length] = tokens.numpy()
        self.length += 1
