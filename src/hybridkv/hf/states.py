"""Transformers cache layers that keep convolution and recurrent states.

Owns what Transformers calls on the states of one layer, and how far a convolution goes back. The states are
`hybridkv.runtime.states`'. Used by `layers.py`, `hybridkv.hf.cache.ModelCache` and the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from hybridkv.errors import ContextError, ModelError
from hybridkv.runtime import States, StoredState


class StateLayer(States, LinearAttentionLayer):  # type: ignore[misc]
    """Convolution and recurrent states of one layer; the recurrent ones in float32 whatever the model's dtype.

    Parameters
    ----------
    takes_chunks
        Whether the model's code continues a state over several tokens at once.
    recurs
        Whether there is a recurrent state, which cannot go back.
    """

    def __init__(self, number_of_states: int = 1, *, takes_chunks: bool = True, recurs: bool = False) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        States.__init__(self, number_of_states)
        self.takes_chunks, self.recurs = takes_chunks, recurs
        # Of each state, whether inputs before those held are gone.
        self._begun: dict[int, bool] = dict.fromkeys(range(number_of_states), False)

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        """Allocate; an accumulating state takes float32."""
        wide = None if recurrent_states is None else recurrent_states.float()
        LinearAttentionLayer.lazy_initialization(
            self,
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
        state = self.conv_states[state_idx]
        held = state.shape[0] if state is not None and self.has_previous_state[state_idx] else conv_states.shape[0]
        if held != conv_states.shape[0]:
            raise ModelError(
                f"the cache holds {held} sequences and was given {conv_states.shape[0]}",
                hint="use one cache per batch, or reset() it first",
            )
        states: Tensor = LinearAttentionLayer.update_conv_state(self, conv_states, state_idx, **kwargs)
        return states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Store the newest recurrent state.

        Raises
        ------
        ContextError
            If the native step has filled the states.
        """
        self._expect("transformers")
        states: Tensor = LinearAttentionLayer.update_recurrent_state(self, recurrent_states, state_idx, **kwargs)
        return states

    def filled_states(
        self, batch: int, conv: tuple[int, int], recurrent: tuple[int, ...], like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return convolution state `[B, channels, kernel]`, with dtype and device of `like`, and float32 recurrent
        state, to continue in place.
        """
        self._expect("transformers")
        if not self.has_previous_state[0]:
            self._fill(like.new_zeros((batch, *conv)), like.new_zeros((batch, *recurrent)))
        first, second = self.conv_states[0], self.recurrent_states[0]
        assert first is not None
        assert second is not None
        return first, second

    def _fill(self, conv: Tensor, recurrent: Tensor | None) -> None:
        """Take the first of each kind, as Transformers does."""
        self.lazy_initialization(conv_states=conv, recurrent_states=recurrent)
        self.has_previous_state[0] = True

    def activate_past_recording(self) -> None:
        """Keep a convolution's inputs until the next `crop`, so that it can go back; for assisted decoding.

        Raises
        ------
        ContextError
            If there is a recurrent state: behind a draft that was refused, it would go on from another text.
        """
        if self.recurs:
            raise ContextError(
                "assisted decoding and prompt lookup drop drafted tokens, and a recurrent state cannot go back: the "
                "text would be another one",
                hint="leave assistant_model and prompt_lookup_num_tokens out; `hybridkv run` guesses exactly",
            )
        if not self._records:
            self._begun = dict(self.has_previous_state)
        self.record_past = True

    def can_drop(self, n_tokens: int) -> bool:
        """Check whether the newest tokens can be dropped: a convolution's while their inputs are still held."""
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
        """True if a few tokens can be dropped: of convolutions alone, while their inputs are kept."""
        return self._records and all(state is None for state in self.recurrent_states.values())

    @property
    def _records(self) -> bool:
        return bool(getattr(self, "record_past", False))  # before Transformers 5.23, nothing is ever kept

    def load(self, states: Sequence[StoredState]) -> None:
        """Resume from copies of states."""
        States.load(self, states)
        for index, state in enumerate(states):
            if state.conv is not None:
                self.dtype, self.device = state.conv.dtype, state.conv.device
                self.conv_kernel_size[index] = state.conv.shape[-1]
                self.is_conv_states_initialized[index] = True
            self.is_recurrent_states_initialized[index] = state.recurrent is not None

    def _forget(self) -> None:
        StateLayer.__init__(self, self.number_of_states, takes_chunks=self.takes_chunks, recurs=self.recurs)
