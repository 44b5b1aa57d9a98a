"""Transformers cache layers over packed rows and float32 states.

`QuantizedLayer` is `WatchedRows`; `QuantizedAndStateLayer` has the states of a `StateLayer` (`states.py`) too.
`hybridkv.hf.cache.ModelCache` is a list of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from hybridkv.cache import KVLayer
from hybridkv.errors import ModelError
from hybridkv.hf.states import StateLayer
from hybridkv.runtime import LayerView, LayerWatch, WatchedRows


class QuantizedLayer(WatchedRows, CacheLayerMixin):  # type: ignore[misc]
    """A Transformers cache layer that stores codes and scales.

    Parameters
    ----------
    store
        The packed rows.
    watch
        The guard's part.
    attends_packed
        Says at each call whether the model attends packed rows (`attn_implementation="hybridkv"`); if not,
        `update` gives dequantized tensors in the model's dtype.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, store: KVLayer, watch: LayerWatch, attends_packed: Callable[[], bool]) -> None:
        CacheLayerMixin.__init__(self)
        WatchedRows.__init__(self, store, watch)
        self.is_sliding = store.spec.facts.window is not None
        self._attends_packed = attends_packed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; the first `update` allocates memory."""
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store T new tokens `[B, Hkv, T, D]`; returns what the attention function reads."""
        del args, kwargs
        attended = self.store_new(key_states, value_states)
        if self._attends_packed():
            return attended, attended
        k, v = self.store.decode(attended.view.length)
        return k.to(key_states.dtype), v.to(value_states.dtype)

    def store_new(self, k: Tensor, v: Tensor) -> LayerView:
        """Store T new tokens `[B, Hkv, T, D]`; what an attention over the packed rows reads."""
        if self.device_step is None and not self.is_initialized:
            QuantizedLayer.lazy_initialization(self, k, v)
        return WatchedRows.store_new(self, k, v)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of rows that the next call attends, and the position of the first."""
        past = self.store.past_rows() - (self.device_step is not None)  # `reserve_only` has counted the new one
        return past + query_length, self.get_seq_length() - past

    def get_seq_length(self) -> int:
        """Count the tokens seen before the call."""
        return self.store.n_seen - (self.device_step is not None)

    def get_max_length(self) -> int:
        """Return -1: no maximum that masks would have to know."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """True if the newest tokens can be dropped."""
        return self.store.can_crop

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest `-tokens_to_remove` tokens (Transformers' sign)."""
        self.store.crop(abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder for beam search: sequence i continues from sequence `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def offload(self) -> None:
        """Refuse: packed rows are read where they are."""
        raise ModelError("a quantized cache cannot be offloaded", hint="drop offloading=True")

    prefetch = offload


class EmptyLayer:
    """A layer that remembers nothing: only experts or an MLP, or one that reads another layer's KV cache."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing: there is nothing to drop."""

    def reset(self) -> None:
        """Do nothing: there is nothing to forget."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Do nothing: there is nothing to reorder."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do nothing: there is nothing to repeat."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Do nothing: there is nothing to select."""

    def copy(self, n_ctx: int | None) -> EmptyLayer:
        """Return itself: it holds nothing that two could disagree on."""
        del n_ctx
        return self

    empty = copy

    def get_max_length(self) -> int:
        """Return -1: no maximum that masks would have to know."""
        return -1


class QuantizedAndStateLayer(StateLayer, QuantizedLayer):
    """A layer that has both (Falcon-H1, Zamba2)."""

    is_compileable = False
    is_croppable = False

    def __init__(
        self,
        store: KVLayer,
        watch: LayerWatch,
        attends_packed: Callable[[], bool],
        *,
        number_of_states: int = 1,
        takes_chunks: bool = True,
        recurs: bool = False,
    ) -> None:
        QuantizedLayer.__init__(self, store, watch, attends_packed)
        StateLayer.__init__(self, number_of_states, takes_chunks=takes_chunks, recurs=recurs)

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        """Initialize either part: two positional tensors are K and V; keywords are states."""
        if args:
            QuantizedLayer.lazy_initialization(self, *args)
        else:
            StateLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget all tokens."""
        StateLayer.reset(self)
        QuantizedLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder for beam search: sequence i continues from sequence `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        StateLayer.batch_repeat_interleave(self, repeats)
        QuantizedLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        StateLayer.batch_select_indices(self, indices)
        QuantizedLayer.batch_select_indices(self, indices)

    def copy(self, n_ctx: int | None) -> Self:
        """Copy the layer, to continue from the same tokens independently."""
        twin = StateLayer.copy(self, n_ctx)
        twin.store, twin.watch = self.store.copy(n_ctx), replace(self.watch)
        return twin

    def empty(self, n_ctx: int | None) -> Self:
        """Build a layer of the same types and kind that holds nothing."""
        twin = QuantizedLayer.empty(self, n_ctx)
        StateLayer._forget(twin)
        return twin

    def get_max_length(self) -> int:
        """Return -1: no maximum that masks would have to know."""
        return -1
