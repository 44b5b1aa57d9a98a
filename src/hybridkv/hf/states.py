"""Transformers cache layers that keep convolution and recurrent states.

Owns the states of one layer: storing, copying, and how far a convolution goes back. Does not own KV rows
(`layers.py`). Used by `layers.py`, `hybridkv.hf.cache.ModelCache` and the steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from hybridkv.errors import ContextError, ModelError
from hybridkv.hf.stored import StoredState

StateOrder = Literal["transformers", "file"]
"""In which order a state's heads are: Transformers', or that of GGUF files, in which the native step runs."""


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
        self.order: StateOrder | None = None
        # Of each state, whether inputs before those held are gone.
        self._begun: dict[int, bool] = dict.fromkeys(range(number_of_states), False)

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
        self._expect("transformers")
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

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Store the newest recurrent state.

        Raises
        ------
        ContextError
            If the native step has filled the states.
        """
        self._expect("transformers")
        states: Tensor = super().update_recurrent_state(recurrent_states, state_idx, **kwargs)
        return states

    def native_states(self, batch: int, conv: tuple[int, int], recurrent: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Convolution state `[B, kernel, channels]` and, if it has a shape, recurrent state, to continue in place.

        Both are float32 and contiguous.

        Transformers keeps the former as `[B, channels, kernel]`; here its memory has the channels innermost.

        Raises
        ------
        ContextError
            If Transformers' code has filled the states: its heads are in another order.
        """
        self._expect("file")
        if not self.has_previous_state[0]:
            kernel, channels = conv
            self.lazy_initialization(
                conv_states=torch.zeros(batch, channels, kernel),
                recurrent_states=torch.zeros(batch, *recurrent) if recurrent else None,
            )
            self.has_previous_state[0] = True
        wide = self.conv_states[0].transpose(1, 2)
        if not wide.is_contiguous():
            wide = wide.contiguous()
            self.conv_states[0] = wide.transpose(1, 2)
        return (wide, self.recurrent_states[0]) if recurrent else (wide,)

    def states(
        self, batch: int, conv: tuple[int, int], recurrent: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Convolution state `[B, channels, kernel]`, in the dtype and on the device of `like`, and float32 recurrent
        state, to continue in place.
        """
        self._expect("transformers")
        if not self.has_previous_state[0]:
            self.lazy_initialization(
                conv_states=like.new_zeros((batch, *conv)), recurrent_states=like.new_zeros((batch, *recurrent))
            )
            self.has_previous_state[0] = True
        return self.conv_states[0], self.recurrent_states[0]

    def _expect(self, order: StateOrder) -> None:
        """Note whose order the states are in; refuse to continue those of another."""
        if self.order not in (None, order):
            raise ContextError(
                "the native step and Transformers' own code cannot continue each other's states: their heads are in "
                "different orders",
                hint="reset() the cache, or let one of them run all of a sequence",
            )
        self.order = order

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """The tensors that hold the states; other ones once the batch has changed."""
        return tuple([s for s in (*self.conv_states.values(), *self.recurrent_states.values()) if s is not None])

    def activate_past_recording(self) -> None:
        """Keep a convolution's inputs until the next `crop`, so that it can go back; for assisted decoding."""
        if not self._records:
            self._begun = dict(self.has_previous_state)
        self.record_past = True

    def can_drop(self, n_tokens: int) -> bool:
        """Whether the newest tokens can be dropped: a convolution's if their inputs and those before are still held."""
        if not n_tokens:
            return True
        return self.is_croppable and all(
            not self._begun[i] or conv.shape[-1] - n_tokens >= self.conv_kernel_size[i]
            for i, conv in self.conv_states.items()
            if conv is not None
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest `-tokens_to_remove` tokens, and inputs that no later token needs.

        Raises
        ------
        ContextError
            If a state cannot go back so far; a recurrent one never can.
        """
        n_tokens = abs(tokens_to_remove)
        if not self.can_drop(n_tokens):
            raise ContextError(
                f"{n_tokens} tokens cannot be dropped: a recurrent or convolution state has no past",
                hint="reset the cache and process the shorter prompt again",
            )
        for i, conv in self.conv_states.items() if self._records else ():
            if conv is not None:
                end = conv.shape[-1] - n_tokens
                start = max(0, end - self.conv_kernel_size[i])
                self._begun[i] = self._begun[i] or start > 0
                self.conv_states[i] = conv[..., start:end]

    @property
    def is_croppable(self) -> bool:
        """Whether a few tokens can be dropped: of convolutions alone, while their inputs are kept."""
        return self._records and all(state is None for state in self.recurrent_states.values())

    @property
    def _records(self) -> bool:
        return bool(getattr(self, "record_past", False))  # before Transformers 5.23, nothing is ever kept

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
