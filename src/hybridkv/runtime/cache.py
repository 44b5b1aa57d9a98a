"""`ModelCache`: everything that a model remembers of its sequences, for backends that need no Transformers.

Owns the packed rows and the states of all layers, and what the whole can do, which is what all its parts can do.
`hybridkv.hf.cache` makes a Transformers cache of it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Self

from torch import Tensor

from hybridkv.cache import KVLayer, KVSpec, LayerFacts, LayerKernels, resolve
from hybridkv.kernels import ENCODERS, KERNELS, Encoder, Kernel
from hybridkv.model.facts import layer_facts
from hybridkv.model.protocols import Config
from hybridkv.policy import Guard
from hybridkv.runtime.fallbacks import Fallbacks
from hybridkv.runtime.rows import WatchedRows
from hybridkv.runtime.states import States
from hybridkv.runtime.stored import StoredCache
from hybridkv.runtime.view import LayerWatch, Notify

LOG = logging.getLogger("hybridkv")


class ModelCache:
    """The memory of each layer: packed rows, states, or both.

    Parameters
    ----------
    config
        The model's config.
    specs
        One per KV layer, in order.
    n_ctx
        Tokens per sequence to reserve and not to exceed; None grows as needed.
    guard
        What is checked and what may be done about it.
    notify
        Where the guard reports; a logger's warning by default.
    kernels, encoders
        What may run; all that are built, by default.

    Raises
    ------
    NoKernelError
        If a layer has no kernel; nothing has been allocated then.

    Attributes
    ----------
    rows, states
        Of each layer of the model, in order; None where a layer has none.
    """

    rows: tuple[WatchedRows | None, ...]
    states: tuple[States | None, ...]

    def __init__(
        self,
        config: Config,
        specs: Sequence[KVSpec],
        *,
        device: str = "cpu",
        n_ctx: int | None = None,
        guard: Guard | None = None,
        notify: Notify = LOG.warning,
        kernels: Sequence[Kernel] = KERNELS,
        encoders: Sequence[Encoder] = ENCODERS,
    ) -> None:
        facts = layer_facts(config)
        parts = watched_parts(facts, specs, device, n_ctx, guard or Guard(), notify, kernels, encoders)
        self._hold(
            [None if part is None else WatchedRows(*part) for part in parts],
            [None if layer.state is None else States() for layer in facts],
        )

    def _hold(self, rows: Sequence[WatchedRows | None], states: Sequence[States | None]) -> None:
        """Take the layers' parts; which are there is asked at every step."""
        self.rows, self.states = tuple(rows), tuple(states)
        self.quantized = tuple(part for part in self.rows if part is not None)
        self.stateful = tuple(part for part in self.states if part is not None)

    @property
    def _parts(self) -> tuple[WatchedRows | States, ...]:
        return (*self.quantized, *self.stateful)

    @property
    def kv_layers(self) -> tuple[KVLayer, ...]:
        """The packed layers, in order."""
        return tuple(layer.store for layer in self.quantized)

    @property
    def specs(self) -> tuple[KVSpec, ...]:
        """Specs of the KV layers as they are stored now, fallbacks included."""
        return tuple(layer.spec for layer in self.kv_layers)

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for codes and scales."""
        return sum(layer.nbytes for layer in self.kv_layers)

    @property
    def kv_bytes_used(self) -> int:
        """Bytes of the rows held."""
        return sum(layer.nbytes_used for layer in self.kv_layers)

    @property
    def state_bytes(self) -> int:
        """Bytes allocated for recurrent and convolution states."""
        return sum(layer.nbytes for layer in self.stateful)

    @property
    def errors(self) -> dict[int, float]:
        """Model layer -> relative RMSE of its attention output, where the guard has measured it."""
        return {w.store.spec.facts.layer: w.watch.error for w in self.quantized if w.watch.error is not None}

    @property
    def limits(self) -> dict[int, float]:
        """Model layer -> the largest of these errors that the guard allows it, at the types that it has now."""
        measured = self.errors
        found = {w.store.spec.facts.layer: w.watch.guard.limit_for(w.store.types) for w in self.quantized}
        return {layer: limit for layer, limit in found.items() if layer in measured}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        for part in self._parts:
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        for part in self._parts:
            part.batch_select_indices(indices)

    def reset(self) -> None:
        """Forget all tokens."""
        for part in self._parts:
            part.reset()

    def copy(self, *, n_ctx: int | None = None) -> Self:
        """Copy the cache, to continue from the same tokens independently.

        Copy it before you continue one beginning in several ways: a state cannot go back.

        Parameters
        ----------
        n_ctx
            Of the copy, as in the constructor. Memory for it is reserved by the first new token.
        """
        twin = copy.copy(self)
        twin._hold(
            [part and part.copy(n_ctx) for part in self.rows], [part and part.copy(n_ctx) for part in self.states]
        )
        return twin

    def empty(self, *, n_ctx: int | None = None) -> Self:
        """Build a cache of the same types and kernels that holds nothing and is not guarded."""
        twin = copy.copy(self)
        rows = [part and part.empty(n_ctx) for part in self.rows]
        twin._hold(rows, [part and part.empty(n_ctx) for part in self.states])
        return twin

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """Every tensor that holds rows or states. The same objects mean the same memory."""
        rows = [segment.memory for layer in self.quantized for segment in layer.store.segments]
        return tuple(chain.from_iterable([*rows, *(layer.memory for layer in self.stateful)]))

    def stored(self, after: StoredCache | None = None) -> StoredCache:
        """Copy what is held now, never to be changed.

        Parameters
        ----------
        after
            An earlier copy of the same sequence at the same specs: packed rows that it holds, it or those before it,
            are left out.
        """
        before = [0] * len(self.quantized) if after is None else [rows.first + rows.n_packed for rows in after.rows]
        return StoredCache(
            specs=self.specs,
            rows=tuple(layer.store.stored(first) for layer, first in zip(self.quantized, before, strict=True)),
            pending=tuple(layer.watch.awaits_first_check for layer in self.quantized),
            errors=tuple(layer.watch.error for layer in self.quantized),
            states=tuple(layer.stored() for layer in self.stateful),
        )

    def load(self, copies: Sequence[StoredCache]) -> None:
        """Resume from the last of several copies of one sequence, each of which begins where the one before ends.

        The cache must have been built for their specs.
        """
        last = copies[-1]
        assert self.specs == last.specs, (self.specs, last.specs)
        for index, layer in enumerate(self.quantized):
            layer.store.load([copy.rows[index] for copy in copies])
            layer.watch.awaits_first_check, layer.watch.error = last.pending[index], last.errors[index]
        for layer_states, states in zip(self.stateful, last.states, strict=True):
            layer_states.load(states)

    def load_converted(self, other: ModelCache) -> None:
        """Resume from what another cache of the model holds at other types: rows are decoded and encoded again."""
        for own, theirs in zip(self.quantized, other.quantized, strict=True):
            own.store.load_converted(theirs.store)
            own.watch.awaits_first_check = False  # there are no unpacked rows left to compare with
        for states, others in zip(self.stateful, other.stateful, strict=True):
            states.load(others.stored())


def watched_parts(
    facts: Sequence[LayerFacts],
    specs: Sequence[KVSpec],
    device: str,
    n_ctx: int | None,
    guard: Guard,
    notify: Notify,
    kernels: Sequence[Kernel],
    encoders: Sequence[Encoder],
) -> Iterator[tuple[KVLayer, LayerWatch] | None]:
    """Yield each layer's packed rows and the guard's part; None for a layer without a KV cache.

    Raises
    ------
    NoKernelError
        If a layer has no kernel.
    """
    specs_by_layer = {spec.facts.layer: spec for spec in specs}
    kinds: set[KVSpec] = set()
    fallbacks = Fallbacks()

    def choose(spec: KVSpec) -> LayerKernels:
        return resolve(spec, device, kernels, encoders)

    for index, layer in enumerate(facts):
        if layer.attention is None:
            yield None
            continue
        spec = specs_by_layer[index]
        kind = replace(spec, facts=replace(spec.facts, layer=0))
        watch = LayerWatch(guard, notify, is_representative=kind not in kinds, fallbacks=fallbacks)
        fallbacks.last = watch  # of those up to here
        kinds.add(kind)
        yield KVLayer(spec, choose, n_ctx=n_ctx), watch
