"""Transformers cache layers over packed rows and float32 states.

`QuantizedLayer` wraps a `KVLayer`, `StateLayer` keeps convolution and recurrent states, and
`QuantizedAndStateLayer` holds one of each. They are what `hybridkv.hf.cache.ModelCache` is a list of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from hybridkv.cache import KVLayer
from hybridkv.errors import ContextError, ModelError
from hybridkv.hf.stored import StoredState
from hybridkv.hf.view import Fixed, LayerView, LayerWatch
from hybridkv.policy import Schedule


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]
    """A Transformers cache layer that stores codes and scales.

    Parameters
    ----------
    store
        The packed rows.
    watch
        The guard's part.
    packed
        Says at each call whether the model attends packed rows (`attn_implementation="hybridkv"`); if not,
        `update` gives dequantized tensors in the model's dtype.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, store: KVLayer, watch: LayerWatch, packed: Callable[[], bool]) -> None:
        super().__init__()
        self.store = store
        self.watch = watch
        self.is_sliding = store.spec.facts.window is not None
        self.fixed: Fixed | None = None
        self._packed = packed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory is reserved by the first `update`."""
        del value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store T new tokens `[B, Hkv, T, D]`; returns what the attention function reads."""
        del args, kwargs
        packed = self.store_new(key_states, value_states)
        if self._packed():
            return packed, packed
        k, v = self.store.decode(packed.view.length)
        return k.to(key_states.dtype), v.to(value_states.dtype)

    def store_new(self, k: Tensor, v: Tensor) -> LayerView:
        """Store T new tokens `[B, Hkv, T, D]`; what an attention over the packed rows reads."""
        if self.fixed is not None:
            view = self.store.append_at(k, v, self.fixed.numbers)
            return LayerView(self.store, view, self.watch, k, v, self.fixed)
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        fresh_k, fresh_v = self._unpacked(k, v) if self.watch.pending else (k, v)
        return LayerView(self.store, self.store.append(k, v), self.watch, fresh_k, fresh_v)

    def _unpacked(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that this call attends as they are before any is packed, if this call packs the first of them.

        A layer with a tail packs nothing in a short first prompt: what the guard compares with is then still there as
        f16 rows, for the last time.
        """
        store, past = self.store, self.store.past_rows()
        if not (self.watch.guard.measures and past and store.packs(k.shape[2])) or store.shows_packed(store.view(past)):
            return k, v
        old_k, old_v = store.decode(past)
        return torch.cat([old_k, k.float()], 2), torch.cat([old_v, v.float()], 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Rows that the next call attends, and the position of the first."""
        past = self.store.past_rows() - (self.fixed is not None)  # `admit` has counted the new one
        return past + query_length, self.get_seq_length() - past

    def get_seq_length(self) -> int:
        """Tokens seen before the call."""
        return self.store.n_seen - (self.fixed is not None)

    def get_max_length(self) -> int:
        """-1: no maximum that masks would have to know."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be dropped."""
        return self.store.can_crop

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest `-tokens_to_remove` tokens (Transformers' sign)."""
        self.store.crop(abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens; a raised type stays raised, and the next prompt is measured again."""
        self.store.reset()
        self.watch.pending, self.watch.schedule = True, Schedule()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i continues from sequence `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        # Of the rows alone, by name: a layer that has a state too repeats that itself.
        QuantizedLayer.batch_select_indices(self, torch.arange(self.store.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        if self.store.batch:
            self.store.select_sequences(indices)

    def copy(self, n_ctx: int | None) -> QuantizedLayer:
        """A layer that goes on from the same tokens on its own; see `KVLayer.copy`."""
        twin = copy.copy(self)
        twin.store, twin.watch = self.store.copy(n_ctx), replace(self.watch)
        return twin

    def empty(self, n_ctx: int | None) -> QuantizedLayer:
        """A layer of the same types that holds nothing, for a context of its own, and that no guard looks at."""
        twin = copy.copy(self)
        twin.store = self.store.empty(n_ctx)
        twin.watch = LayerWatch(replace(self.watch.guard, mode="off"), self.watch.notify)
        return twin

    def offload(self) -> None:
        """Not offered: packed rows are read where they are."""
        raise ModelError("a quantized cache cannot be offloaded", hint="drop offloading=True")

    prefetch = offload


class EmptyLayer:
    """A layer that remembers nothing: only experts or an MLP, or one that reads another layer's KV cache."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to drop."""

    def reset(self) -> None:
        """Nothing to forget."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to reorder."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing to repeat."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Nothing to select."""

    def copy(self, n_ctx: int | None) -> EmptyLayer:
        """Itself: there is nothing that two could disagree on."""
        del n_ctx
        return self

    empty = copy

    def get_max_length(self) -> int:
        """-1: no maximum that masks would have to know."""
        return -1


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """Convolution and recurrent states of one layer; the recurrent ones in float32 whatever the model's dtype.

    Parameters
    ----------
    takes_chunks
        Whether the model's code continues a state over several tokens at once.
    """

    def __init__(self, number_of_states: int = 1, *, takes_chunks: bool = True) -> None:
        super().__init__(number_of_states=number_of_states)
        self.takes_chunks = takes_chunks

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        states = (*self.conv_states.values(), *self.recurrent_states.values())
        return sum(state.nbytes for state in states if state is not None)

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        """Allocate; an accumulating state takes float32."""
        wide = None if recurrent_states is None else recurrent_states.float()
        super().lazy_initialization(
            conv_states=conv_states,
            recurrent_states=wide,
            state_idx=state_idx,
            conv_kernel_size=conv_kernel_size,
        )

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Store the newest inputs `[B, channels, T]`; returns what the convolution reads.

        Raises
        ------
        ContextError
            If the model's code would start over from a zero state.
        ModelError
            For another number of sequences than the states are of.
        """
        if not self.takes_chunks and self.has_previous_state[state_idx] and conv_states.shape[-1] > 1:
            raise ContextError(
                f"{conv_states.shape[-1]} tokens at once after the first prompt: this model's code would start them "
                "from a zero state",
                hint="give the whole prompt at once, then single tokens",
            )
        held = self.conv_states[state_idx].shape[0] if self.has_previous_state[state_idx] else conv_states.shape[0]
        if held != conv_states.shape[0]:
            raise ModelError(
                f"the cache holds {held} sequences and was given {conv_states.shape[0]}",
                hint="use one cache per batch, or reset() it first",
            )
        states: Tensor = super().update_conv_state(conv_states, state_idx, **kwargs)
        return states

    def native_states(self, batch: int, conv: tuple[int, int], recurrent: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Convolution state `[B, kernel, channels]` and recurrent state, float32 and contiguous, to continue in place.

        Transformers keeps the former as `[B, channels, kernel]`; here its memory has the channels innermost, and what
        a Transformers forward pass left otherwise is brought into that order.
        """
        if not self.has_previous_state[0]:
            kernel, channels = conv
            self.lazy_initialization(
                conv_states=torch.zeros(batch, channels, kernel), recurrent_states=torch.zeros(batch, *recurrent)
            )
            self.has_previous_state[0] = True
        wide = self.conv_states[0].transpose(1, 2)
        if not wide.is_contiguous():
            wide = wide.contiguous()
            self.conv_states[0] = wide.transpose(1, 2)
        return wide, self.recurrent_states[0]

    def states(
        self, batch: int, conv: tuple[int, int], recurrent: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Convolution state `[B, channels, kernel]`, in the dtype and on the device of `like`, and float32 recurrent
        state, to continue in place.
        """
        if not self.has_previous_state[0]:
            self.lazy_initialization(
                conv_states=like.new_zeros((batch, *conv)), recurrent_states=like.new_zeros((batch, *recurrent))
            )
            self.has_previous_state[0] = True
        return self.conv_states[0], self.recurrent_states[0]

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """The tensors that hold the states; other ones once the batch has changed."""
        return tuple([s for s in (*self.conv_states.values(), *self.recurrent_states.values()) if s is not None])

    def crop(self, tokens_to_remove: int) -> None:
        """A state has no past to return to; 0 tokens is the only crop.

        Raises
        ------
        ContextError
            For any other count.
        """
        if tokens_to_remove:
            raise ContextError(
                f"{abs(tokens_to_remove)} tokens cannot be dropped: a recurrent or convolution state has no past",
                hint="reset the cache and process the shorter prompt again",
            )

    @property
    def is_croppable(self) -> bool:
        """False: states cannot be rolled back."""
        return False

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._map(lambda state: state.index_select(0, indices.to(state.device)))

    def copy(self, n_ctx: int | None) -> StateLayer:
        """A layer that goes on from the same states on its own."""
        del n_ctx  # a state is as large for any context
        twin = copy.copy(self)
        for name, by_index in vars(self).items():
            if isinstance(by_index, dict):
                setattr(twin, name, dict(by_index))
        twin._map(Tensor.clone)
        return twin

    def empty(self, n_ctx: int | None) -> StateLayer:
        """A layer of the same kind that has seen nothing."""
        del n_ctx
        twin = copy.copy(self)
        StateLayer.reset(twin)
        return twin

    def stored(self) -> tuple[StoredState, ...]:
        """Copies of the states."""

        def clone(state: Tensor | None) -> Tensor | None:
            return None if state is None else state.clone()

        return tuple(
            StoredState(clone(self.conv_states[i]), clone(self.recurrent_states[i]), self.has_previous_state[i])
            for i in range(self.number_of_states)
        )

    def load(self, states: Sequence[StoredState]) -> None:
        """Go on from copies of states."""
        StateLayer.reset(self)
        for index, state in enumerate(states):
            self.has_previous_state[index] = state.fed
            if state.conv is not None:
                self.dtype, self.device = state.conv.dtype, state.conv.device
                self.conv_states[index], self.conv_kernel_size[index] = state.conv.clone(), state.conv.shape[-1]
                self.is_conv_states_initialized[index] = True
            if state.recurrent is not None:
                self.recurrent_states[index] = state.recurrent.clone()
                self.is_recurrent_states_initialized[index] = True

    def reset(self) -> None:
        """Forget all tokens, and the batch size with them."""
        StateLayer.__init__(self, self.number_of_states, takes_chunks=self.takes_chunks)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state)


class QuantizedAndStateLayer(StateLayer, QuantizedLayer):
    """A layer that has both (Falcon-H1, Zamba2)."""

    is_compileable = False

    def __init__(
        self,
        store: KVLayer,
        watch: LayerWatch,
        packed: Callable[[], bool],
        *,
        number_of_states: int = 1,
        takes_chunks: bool = True,
    ) -> None:
        QuantizedLayer.__init__(self, store, watch, packed)
        StateLayer.__init__(self, number_of_states, takes_chunks=takes_chunks)

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        """Two positional tensors are K and V; keywords are states."""
        if args:
            QuantizedLayer.lazy_initialization(self, *args)
        else:
            StateLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget all tokens."""
        StateLayer.reset(self)
        QuantizedLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i continues from sequence `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        StateLayer.batch_repeat_interleave(self, repeats)
        QuantizedLayer.batch_repeat_interleave(self, repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        StateLayer.batch_select_indices(self, indices)
        QuantizedLayer.batch_select_indices(self, indices)

    def copy(self, n_ctx: int | None) -> QuantizedAndStateLayer:
        """A layer that goes on from the same tokens on its own."""
        twin = StateLayer.copy(self, n_ctx)
        assert isinstance(twin, QuantizedAndStateLayer)
        twin.store, twin.watch = self.store.copy(n_ctx), replace(self.watch)
        return twin

    def empty(self, n_ctx: int | None) -> QuantizedAndStateLayer:
        """A layer of the same types and kind that holds nothing."""
        twin = QuantizedLayer.empty(self, n_ctx)
        assert isinstance(twin, QuantizedAndStateLayer)
        StateLayer.reset(twin)
        return twin

    def get_max_length(self) -> int:
        """-1: no maximum that masks would have to know."""
        return -1
