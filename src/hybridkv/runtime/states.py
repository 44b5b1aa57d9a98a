"""Convolution and recurrent states of one layer, in the order of the code that fills them first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from hybridkv.errors import ContextError
from hybridkv.runtime.stored import StoredState

StateOrder = Literal["transformers", "file"]
"""In which order a state's heads are: Transformers', or that of GGUF files, in which the native step runs."""


class States:
    """States of one layer; the recurrent ones are float32 whatever the model's dtype.

    Parameters
    ----------
    number_of_states
        How many convolution and recurrent states the layer has of each.

    Attributes
    ----------
    conv_states
        `[B, channels, kernel]` each, by their numbers; None until they are filled.
    recurrent_states
        float32; None where there is none.
    has_previous_state
        Whether each was fed.
    """

    def __init__(self, number_of_states: int = 1) -> None:
        self.number_of_states = number_of_states
        self.conv_states: dict[int, Tensor | None] = dict.fromkeys(range(number_of_states))
        self.recurrent_states: dict[int, Tensor | None] = dict.fromkeys(range(number_of_states))
        self.has_previous_state: dict[int, bool] = dict.fromkeys(range(number_of_states), False)
        self.order: StateOrder | None = None
        self._next: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(state.nbytes for state in (*self.memory, *self._next))

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """The tensors that hold the states; other ones once the batch has changed."""
        return tuple([s for s in (*self.conv_states.values(), *self.recurrent_states.values()) if s is not None])

    def native_states(self, batch: int, conv: tuple[int, int], recurrent: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Return convolution state `[B, kernel, channels]` and, if it has a shape, recurrent state.

        Both are float32, contiguous, and continued in place.

        Transformers keeps the former as `[B, channels, kernel]`; here its memory has the channels innermost.

        Raises
        ------
        ContextError
            If Transformers' code has filled the states: its heads are in another order.
        """
        self._expect("file")
        if not self.has_previous_state[0]:
            self._fill(torch.zeros(batch, *conv).transpose(1, 2), torch.zeros(batch, *recurrent) if recurrent else None)
        held = self.conv_states[0]
        assert held is not None
        wide = held.transpose(1, 2)
        if not wide.is_contiguous():
            wide = wide.contiguous()
            self.conv_states[0] = wide.transpose(1, 2)
        state = self.recurrent_states[0]
        return (wide,) if state is None else (wide, state)

    @property
    def next_memory(self) -> tuple[Tensor, ...]:
        """What `next_states` has given last; another tuple once something else is to be written there."""
        return self._next

    def next_states(self, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return memory of its own beside what `native_states` gave, for states that may not be wanted; it is kept."""
        if [state.shape for state in self._next] != [state.shape for state in held]:
            self._next = tuple(torch.empty_like(state) for state in held)
        return self._next

    def take_next(self) -> None:
        """Continue from what was written to `next_states`."""
        wide, *rest = self._next
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        assert conv is not None
        self._next = (conv.transpose(1, 2),) if recurrent is None else (conv.transpose(1, 2), recurrent)
        self.conv_states[0], self.recurrent_states[0] = wide.transpose(1, 2), rest[0] if rest else None

    def file_states(
        self, batch: int, conv: tuple[int, int], recurrent: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, ...]:
        """Return convolution state `[B, channels, kernel]`, with dtype and device of `like`, and recurrent state.

        Both are continued in place, with heads in the order of GGUF files; the latter is float32, and there if it has
        a shape.

        Raises
        ------
        ContextError
            If Transformers' code has filled the states.
        """
        self._expect("file")
        if not self.has_previous_state[0]:
            state = like.new_zeros((batch, *recurrent), dtype=torch.float32) if recurrent else None
            self._fill(like.new_zeros((batch, *conv)), state)
        first, second = self.conv_states[0], self.recurrent_states[0]
        assert first is not None
        return (first,) if second is None else (first, second)

    def _fill(self, conv: Tensor, recurrent: Tensor | None) -> None:
        """Take the first of each kind, which is then fed."""
        self.conv_states[0], self.recurrent_states[0] = conv, recurrent
        self.has_previous_state[0] = True

    def _expect(self, order: StateOrder) -> None:
        """Note whose order the states are in; refuse to continue those of another."""
        if self.order not in (None, order):
            raise ContextError(
                "the native step and Transformers' own code cannot continue each other's states: their heads are in "
                "different orders",
                hint="reset() the cache, or let one of them run all of a sequence",
            )
        self.order = order

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._map(lambda state: state.index_select(0, indices.to(state.device)))

    def copy(self, n_ctx: int | None) -> Self:
        """Copy the states, to continue from the same tokens independently."""
        del n_ctx  # a state is as large for any context
        twin = copy.copy(self)
        twin._next = ()
        for name, by_index in vars(self).items():
            if isinstance(by_index, dict):
                setattr(twin, name, dict(by_index))
        twin._map(Tensor.clone)
        return twin

    def empty(self, n_ctx: int | None) -> Self:
        """Build states of the same kind that have seen nothing."""
        del n_ctx
        twin = copy.copy(self)
        twin._forget()
        return twin

    def stored(self) -> tuple[StoredState, ...]:
        """Copy the states."""

        def clone(state: Tensor | None) -> Tensor | None:
            return None if state is None else state.clone()

        return tuple(
            StoredState(clone(self.conv_states[i]), clone(self.recurrent_states[i]), self.has_previous_state[i])
            for i in range(self.number_of_states)
        )

    def load(self, states: Sequence[StoredState]) -> None:
        """Resume from copies of states."""
        self._forget()
        for index, state in enumerate(states):
            self.has_previous_state[index] = state.fed
            self.conv_states[index] = None if state.conv is None else state.conv.clone()
            self.recurrent_states[index] = None if state.recurrent is None else state.recurrent.clone()

    def reset(self) -> None:
        """Forget all tokens, and the batch size with them."""
        self._forget()

    def _forget(self) -> None:
        States.__init__(self, self.number_of_states)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = change(state)
