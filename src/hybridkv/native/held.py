"""Caches continued by one token after another: what a step needs is worked out once, then only lengths change.

Of one sequence, several guessed tokens may be taken at once, of which some stay.

Owns the check that it is still so. `hybridkv.kernels.held` keeps addresses, which nothing here may outlive: rows and
states of a cache can move at any time, and then all is worked out anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hybridkv.kernels.held import Faults, HeldCache, HeldStep
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
    """Continues a cache by its next tokens while nothing about it changes but its length.

    Parameters
    ----------
    step
        The native part, which others share.
    native
        What it needs of this cache.
    layers
        Of the program that runs: which layers attend.
    cache
        Remembered, but not kept alive.
    position
        Of the next token.
    n_left
        Tokens that may follow: there is room for them, and the guard looks at none.
    """

    def __init__(
        self,
        step: HeldStep,
        native: HeldCache,
        layers: Builder,
        cache: ModelCache,
        states: Sequence[HeldState],
        position: int,
        n_left: int,
    ) -> None:
        self.step, self.native, self._states = step, native, states
        self._cache = weakref.ref(cache)
        self._keys = [(call.layer, rows_of(cache, call.layer).store.memory_key) for call in layers.calls]
        self._position, self._n_left, self._n_drafted = position, n_left, 0

    def takes(self, n_seqs: int, n_tokens: int, cache: ModelCache, position: int, step: HeldStep) -> bool:
        """Check whether so many tokens of each sequence are the next of this cache, and all is where it was."""
        return (
            position == self._position
            and n_seqs == self.native.n_seqs
            and (n_tokens == 1 or self.native.takes_several)
            and self.has_room(n_tokens, cache, step)
        )

    def has_room(self, n_tokens: int, cache: ModelCache, step: HeldStep) -> bool:
        """Check whether so many tokens may follow those of this cache, and all is where it was."""
        if n_tokens > self._n_left or self._cache() is not cache or step is not self.step:
            return False
        for index, key in self._keys:
            layer = rows_of(cache, index)
            store = layer.store
            if store.memory_key is not key or store.n_seen != self._position or layer.watch.awaits_first_check:
                return False
        return all(state.stays for state in self._states)

    def lengthen(self, n_tokens: int) -> None:
        """Count the tokens of a step that comes; `keep` follows if they are several."""
        cache = self._cache()
        assert cache is not None
        for index, _ in self._keys:
            rows_of(cache, index).store.lengthen(n_tokens)
        self._n_drafted = n_tokens
        if n_tokens == 1:
            self._position += 1
            self._n_left -= 1

    def keep(self, n_kept: int) -> None:
        """Truncate the cache to the first of several tokens."""
        cache, n_back = self._cache(), self._n_drafted - n_kept
        assert cache is not None
        assert 1 <= n_kept <= self._n_drafted, (n_kept, self._n_drafted)
        if n_back:
            for index, _ in self._keys:
                rows_of(cache, index).store.take_back(n_back)
        self.step.keep(self.native, n_kept)
        if not n_back:
            self._states = [state.take_next() for state in self._states]
        self._position += n_kept
        self._n_left -= n_kept


def run_one(held: Continuation, tokens: Tensor) -> tuple[Tensor, Faults]:
    """Continue a cache by a token of each sequence, which `takes` has taken; the logits `[B, V]`."""
    ids: list[int] = tokens.flatten().tolist()
    held.step.check(ids)
    held.lengthen(1)
    return held.step.run(held.native, ids)


def run_many(held: Sequence[Continuation], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Faults]:
    """Continue caches by tokens that `takes` has taken of each; the logits of all, `[T, V]`."""
    step = held[0].step
    step.check([token for own in tokens for token in own])
    for each, own in zip(held, tokens, strict=True):
        each.lengthen(len(own))
    return step.run_many([each.native for each in held], tokens)


def n_tokens_ahead(layers: Sequence[WatchedRows]) -> int:
    """Return how many single tokens may follow that only lengthen rows, and at which the guard does not look."""
    return n_before_check(layers, min((MAX_TOKENS, *(layer.store.straight_room() for layer in layers))))
