"""Convolution and recurrent states of a cache, as the operations of a step take them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import Tensor

from hybridkv.native.builder import Builder
from hybridkv.runtime import ModelCache


class StateAddresses:
    """The addresses of one cache's states, those of the last step while the same tensors are held."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._n_seqs = 0
        self._addresses: list[int] = []

    def of(self, builder: Builder, cache: ModelCache, n_seqs: int) -> list[int]:
        """List them in the operations' order."""
        layers = [cache.states[index] for index in builder.state_layers]
        fed = all(layer is not None and layer.has_previous_state[0] for layer in layers)
        held = [state for layer in layers if layer is not None for state in layer.memory]
        same = len(self._held) == len(held) and all(map(operator.is_, self._held, held))
        if fed and n_seqs == self._n_seqs and same:
            return self._addresses
        self._addresses = builder.program.addresses(cache_states(builder, cache, n_seqs), n_seqs)
        self._held = [state for layer in layers if layer is not None for state in layer.memory]
        self._n_seqs = n_seqs
        return self._addresses


def cache_states(builder: Builder, cache: ModelCache, n_seqs: int) -> list[Tensor]:
    """List convolution and recurrent state of every layer that has them, in the operations' order."""
    states: list[Tensor] = []
    for index, shapes in zip(builder.state_layers, builder.state_shapes, strict=True):
        layer = cache.states[index]
        assert layer is not None
        states += layer.native_states(n_seqs, *shapes)
    return states


def next_states(builder: Builder, cache: ModelCache, held: Sequence[Tensor]) -> list[Tensor]:
    """Return memory for the states of a step that may be undone, as `cache_states` gives those before it, `held`."""
    found: list[Tensor] = []
    for index, (_, recurrent) in zip(builder.state_layers, builder.state_shapes, strict=True):
        layer = cache.states[index]
        assert layer is not None
        n_states = 1 + bool(recurrent)
        found += layer.next_states(tuple(held[len(found) : len(found) + n_states]))
    return found
