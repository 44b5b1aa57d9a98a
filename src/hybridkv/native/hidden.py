"""Final hidden states of the last step of each cache, for a head that guesses from them."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from hybridkv.runtime import ModelCache


class HiddenStates:
    """Keeps them, once somebody has asked for it; until then nothing is copied."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[ModelCache, Tensor] | None = None
        self._unseen: WeakSet[ModelCache] = WeakSet()

    @property
    def is_asked(self) -> bool:
        """True once somebody has asked."""
        return self._of is not None

    def ask(self) -> None:
        """Keep them from now on."""
        if self._of is None:
            self._of = WeakKeyDictionary()

    def want(self, cache: ModelCache, *, wanted: bool) -> None:
        """Stop keeping those of a cache, or begin again."""
        if wanted:
            self._unseen.discard(cache)
        else:
            self._unseen.add(cache)

    def note(self, caches: Sequence[ModelCache], hidden: Tensor, spans: Sequence[int]) -> None:
        """Keep what a step leaves in its buffers, `[tokens, hidden]`, of caches of one sequence each."""
        if self._of is None or all(cache in self._unseen for cache in caches):
            return
        self._of |= dict(zip(caches, torch.split(hidden.clone(), list(spans)), strict=True))

    def take(self, cache: ModelCache) -> Tensor | None:
        """Take those of the last step's tokens of a cache, `[n, hidden]`; they are given once."""
        return None if self._of is None else self._of.pop(cache, None)
