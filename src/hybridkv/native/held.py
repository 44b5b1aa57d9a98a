"""One cache continued by one token after another: what a step needs is worked out once, then only lengths change.

Of one sequence, several guessed tokens may be taken at once, of which some stay.

Owns the check that it is still so. `hybridkv.kernels.held` keeps addresses, which nothing here may outlive: rows and
states of a cache can move at any time, and then all is worked out anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hybridkv.kernels.cache_rows import Health
from hybridkv.kernels.held import HeldStep
from hybridkv.kernels.threads import native_threads
from hybridkv.native.builder import Builder
from hybridkv.native.rows import n_before_check, rows_of
from hybridkv.runtime import ModelCache, WatchedRows
from hybridkv.runtime.states import States

MAX_TOKENS = 64
"""Tokens of one step at most. The next costs what any other step does, so that more would gain little."""


@dataclass(slots=True)
class HeldState:
    """A layer's states as they were when their addresses were taken."""

    owner: States
    conv: Tensor
    recurrent: Tensor | None
    following: tuple[Tensor, ...]

    @classmethod
    def of(cls, owner: States) -> HeldState:
        """Take a layer's states as they are; it has some."""
        conv = owner.conv_states[0]
        assert conv is not None
        return cls(owner, conv, owner.recurrent_states[0], owner.next_memory)

    @property
    def stays(self) -> bool:
        """True while the layer continues the same tensors."""
        owner = self.owner
        return (
            owner.conv_states[0] is self.conv
            and owner.recurrent_states[0] is self.recurrent
            and owner.next_memory is self.following
        )

    def take_next(self) -> HeldState:
        """Continue from what was written behind several tokens."""
        self.owner.take_next()
        return HeldState.of(self.owner)


class Continuation:
    """Continues a cache by single tokens while nothing about it changes but its length.

    Parameters
    ----------
    step
        The native part.
    builders
        Of the layers and of the head, whose buffers it uses.
    cache
        Remembered, but not kept alive.
    n_seqs
        Its sequences.
    position
        Of the next token.
    n_left
        Tokens that may follow: there is room for them, and the guard looks at none.
    """

    def __init__(
        self,
        step: HeldStep,
        builders: tuple[Builder, Builder],
        cache: ModelCache,
        states: Sequence[HeldState],
        n_seqs: int,
        position: int,
        n_left: int,
    ) -> None:
        self._step, self._builders, self._states = step, builders, states
        self._cache = weakref.ref(cache)
        self._keys = [(call.layer, rows_of(cache, call.layer).store.memory_key) for call in builders[0].calls]
        self._n_seqs, self._position, self._n_left, self._n_drafted = n_seqs, position, n_left, 0

    def takes(
        self, n_seqs: int, n_tokens: int, cache: ModelCache, position: int, builders: tuple[Builder, Builder]
    ) -> bool:
        """Check whether so many tokens of each sequence are the next of this cache, and all is where it was."""
        return (
            position == self._position
            and n_seqs == self._n_seqs
            and (n_tokens == 1 or self._step.takes_drafts(n_tokens))
            and self.has_room(n_tokens, cache, builders)
        )

    def has_room(self, n_tokens: int, cache: ModelCache, builders: tuple[Builder, Builder]) -> bool:
        """Check whether so many tokens may follow those of this cache, and all is where it was."""
        if (
            n_tokens > self._n_left
            or self._cache() is not cache
            or builders != self._builders
            or native_threads() != self._step.n_threads
        ):
            return False
        for index, key in self._keys:
            layer = rows_of(cache, index)
            store = layer.store
            if store.memory_key is not key or store.n_seen != self._position or layer.watch.awaits_first_check:
                return False
        return all(state.stays for state in self._states)

    def run(self, tokens: Tensor) -> tuple[Tensor, list[tuple[int, Health]]]:
        """Continue the cache by tokens that `takes` has taken.

        The logits `[B, V]`, and which attentions were not finite: by the number of their call.
        """
        cache, ids = self._cache(), tokens.flatten().tolist()
        assert cache is not None
        self._step.check(ids)
        for index, _ in self._keys:
            rows_of(cache, index).store.lengthen()
        self._position += 1
        self._n_left -= 1
        return self._step.run(ids)

    def draft(self, ids: list[int]) -> tuple[Tensor, list[tuple[int, Health]]]:
        """Continue the one sequence by several tokens that `takes` has taken; `keep` follows.

        The logits `[T, V]`, and what was not finite: by attention and token, counted in this order.
        """
        cache = self._cache()
        assert cache is not None
        self._step.check(ids)
        for index, _ in self._keys:
            rows_of(cache, index).store.lengthen(len(ids))
        self._n_drafted = len(ids)
        return self._step.draft(ids)

    def keep(self, n_kept: int) -> None:
        """Truncate the cache to the first tokens of the last `draft`."""
        cache, n_back = self._cache(), self._n_drafted - n_kept
        assert cache is not None
        assert 1 <= n_kept <= self._n_drafted, (n_kept, self._n_drafted)
        if n_back:
            for index, _ in self._keys:
                rows_of(cache, index).store.take_back(n_back)
        self._step.keep(n_kept)
        if not n_back:
            self._states = [state.take_next() for state in self._states]
        self._position += n_kept
        self._n_left -= n_kept


def n_tokens_ahead(layers: Sequence[WatchedRows]) -> int:
    """Return how many single tokens may follow that only lengthen rows, and at which the guard does not look."""
    return n_before_check(layers, min((MAX_TOKENS, *(layer.store.straight_room() for layer in layers))))
