"""The packed rows of one layer, and the guard's eye on them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from hybridkv.cache import KVLayer
from hybridkv.policy import Schedule
from hybridkv.runtime.fallbacks import Fallbacks
from hybridkv.runtime.view import DeviceStep, LayerView, LayerWatch


class WatchedRows:
    """Stores new tokens and hands out what attention reads of them.

    Parameters
    ----------
    store
        The packed rows.
    watch
        The guard's part.

    Attributes
    ----------
    device_step
        Of a step that is being recorded.
    """

    def __init__(self, store: KVLayer, watch: LayerWatch) -> None:
        self.store = store
        self.watch = watch
        self.device_step: DeviceStep | None = None

    def store_new(self, k: Tensor, v: Tensor) -> LayerView:
        """Store T new tokens `[B, Hkv, T, D]`; what an attention over the packed rows reads."""
        if self.device_step is not None:
            view = self.store.write_reserved(k, v, self.device_step.row_counters)
            return LayerView(self.store, view, self.watch, k, v, self.device_step)
        fresh_k, fresh_v = self._unpacked(k, v) if self.watch.awaits_first_check else (k, v)
        return LayerView(self.store, self.store.append(k, v), self.watch, fresh_k, fresh_v)

    def _unpacked(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows that this call attends, before any is packed, if this call packs the first of them.

        A layer with a tail packs nothing in a short first prompt: what the guard compares with is then still there as
        f16 rows, for the last time.
        """
        store, past = self.store, self.store.past_rows()
        if not (self.watch.guard.measures and past and store.packs(k.shape[2])) or store.shows_packed(store.view(past)):
            return k, v
        old_k, old_v = store.decode(past)
        return torch.cat([old_k, k.float()], 2), torch.cat([old_v, v.float()], 2)

    def reset(self) -> None:
        """Forget all tokens; a raised type stays raised, and the next prompt is measured again."""
        self.store.reset()
        self.watch.awaits_first_check, self.watch.schedule = True, Schedule()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        # Of the rows alone, by name: a layer that has a state too repeats that itself.
        WatchedRows.batch_select_indices(self, torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        if self.store.batch:
            self.store.select_sequences(indices)

    def copy(self, n_ctx: int | None) -> Self:
        """Copy the rows, to continue from the same tokens independently; see `KVLayer.copy`."""
        twin = copy.copy(self)
        twin.store, twin.watch = self.store.copy(n_ctx), replace(self.watch, fallbacks=Fallbacks())
        return twin

    def empty(self, n_ctx: int | None) -> Self:
        """Build rows of the same types that hold nothing, for a context of their own, and that no guard looks at."""
        twin = copy.copy(self)
        twin.store = self.store.empty(n_ctx)
        twin.watch = LayerWatch(replace(self.watch.guard, mode="off"), self.watch.notify)
        return twin
