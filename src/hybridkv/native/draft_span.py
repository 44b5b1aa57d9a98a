"""One cache's tokens in a step of several caches: guesses among them may be undone."""

from __future__ import annotations

from dataclasses import dataclass

from hybridkv.native.builder import Builder
from hybridkv.native.rows import rows_of
from hybridkv.native.states import cache_states
from hybridkv.runtime import ModelCache


@dataclass(frozen=True, slots=True)
class DraftSpan:
    """The tokens of a cache in a step of several caches, until `keep` comes.

    Attributes
    ----------
    builder
        Whose program ran: another cache's prompt may meanwhile have had larger buffers written.
    first_row, n_tokens
        Of its activation rows.
    """

    builder: Builder
    first_row: int
    n_tokens: int

    def keep(self, cache: ModelCache, n_kept: int) -> None:
        """Truncate the cache to the first of the tokens; states are those behind the last that stays."""
        assert 1 <= n_kept <= self.n_tokens, (n_kept, self.n_tokens)
        if self.n_tokens == 1:
            return
        builder = self.builder
        for call in builder.calls:
            rows_of(cache, call.layer).store.take_back(self.n_tokens - n_kept)
        if n_kept < self.n_tokens:
            states = builder.program.addresses(cache_states(builder, cache, 1), 1)
            builder.program.replay(self.first_row, n_kept, states)
            return
        for index in builder.state_layers:
            layer = cache.states[index]
            assert layer is not None
            layer.take_next()
