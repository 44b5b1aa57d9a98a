"""The continuations of the caches that a model runs, and how they are worked out.

Owns which of it is still true: whatever else runs a cache says so with `forget`.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from hybridkv.kernels.held import HeldCache, HeldStep
from hybridkv.kernels.threads import native_threads
from hybridkv.kernels.weights import Weight
from hybridkv.native.builder import Builder
from hybridkv.native.held import Continuation, HeldState, n_tokens_ahead
from hybridkv.native.rope_tables import RopeTables
from hybridkv.native.rows import is_direct, rows_now, rows_of
from hybridkv.native.states import cache_states, next_states
from hybridkv.runtime import ModelCache

Builders = tuple[Builder, Builder]
"""Of the layers and of the head."""


class Continuations:
    """Holds one `Continuation` of each cache, for as long as the cache lives.

    Parameters
    ----------
    embedding, embed_scale
        Its rows times the factor are the tokens' hidden states.
    """

    def __init__(self, embedding: Weight, embed_scale: float, rope: RopeTables) -> None:
        self._embedding, self._embed_scale, self._rope = embedding, embed_scale, rope
        self._of: WeakKeyDictionary[ModelCache, Continuation] = WeakKeyDictionary()
        self._step: HeldStep | None = None
        self._builders: Builders | None = None

    def find(
        self, cache: ModelCache, n_seqs: int, n_tokens: int, position: int, builders: Builders
    ) -> Continuation | None:
        """Find what takes so many tokens of each sequence next, if all is where it was."""
        held = self._of.get(cache)
        if held is not None and held.takes(n_seqs, n_tokens, cache, position, self._step_of(builders)):
            return held
        return None

    def has_room(self, n_tokens: int, cache: ModelCache, builders: Builders) -> bool:
        """Check whether so many tokens are known to fit behind those of a cache."""
        held = self._of.get(cache)
        return held is not None and held.has_room(n_tokens, cache, self._step_of(builders))

    def keep(self, cache: ModelCache, held: Continuation | None) -> None:
        """Hold this of a cache, or nothing."""
        if held is not None:
            self._of[cache] = held

    def forget(self, cache: ModelCache) -> None:
        """Hold nothing of a cache: something else runs it, or a step that may fail."""
        self._of.pop(cache, None)

    def find_all(
        self, spans: Sequence[int], caches: Sequence[ModelCache], positions: Sequence[int], builders: Builders
    ) -> list[Continuation] | None:
        """Find or prepare what takes so many tokens of each cache, all of one sequence; None unless all have it."""
        found = []
        missing: list[tuple[int, int]] = []
        for i, (cache, n, position) in enumerate(zip(caches, spans, positions, strict=True)):
            held = self.find(cache, 1, n, position, builders)
            if held is None:
                n_left = self._n_ahead(cache, position)
                if n_left < n:
                    return None
                missing.append((i, n_left))
            found.append(held)
        for i, n_left in missing:
            found[i] = self._prepare(caches[i], 1, positions[i], builders, n_left, drafts=spans[i] > 1)
        return [held for held in found if held is not None]

    def hold(self, cache: ModelCache, n_seqs: int, position: int, builders: Builders) -> Continuation | None:
        """Prepare the next steps of a cache, if they are all alike."""
        n_left = self._n_ahead(cache, position)
        return self._prepare(cache, n_seqs, position, builders, n_left, drafts=False) if n_left > 0 else None

    def _prepare(
        self, cache: ModelCache, n_seqs: int, position: int, builders: Builders, n_left: int, *, drafts: bool
    ) -> Continuation:
        """Prepare the next `n_left` steps; with memory for the states behind guesses if they are to be `drafts`."""
        layers = builders[0]
        states = cache_states(layers, cache, n_seqs)
        owners = [owner for index in layers.state_layers if (owner := cache.states[index]) is not None]
        following: list[int] = []
        if drafts or (n_seqs == 1 and owners and all(owner.next_memory for owner in owners)):
            following = layers.program.addresses(next_states(layers, cache, states), 1)
        native = HeldCache(
            layers.program,
            n_seqs=n_seqs,
            angles=self._rope.span(position, n_left),
            states=layers.program.addresses(states, n_seqs),
            next_states=following,
            rows=[rows_now(rows_of(cache, call.layer)) for call in layers.calls],
        )
        owned = [HeldState.of(owner) for owner in owners]
        return Continuation(self._step_of(builders), native, layers, cache, owned, position, n_left)

    def _n_ahead(self, cache: ModelCache, position: int) -> int:
        """Count the next tokens that differ in lengths and positions alone."""
        layers = [layer for layer in cache.rows if layer is not None]
        if not all(map(is_direct, layers)):
            return 0
        n_left = n_tokens_ahead(layers)
        n_positions = self._rope.n_positions
        return n_left if n_positions is None else min(n_left, n_positions - position)

    def _step_of(self, builders: Builders) -> HeldStep:
        """Return what runs them, with the threads of today; another one once either has changed."""
        step = self._step
        if step is None or builders != self._builders or native_threads() != step.n_threads:
            layers, head = self._builders = builders
            step = self._step = HeldStep(
                layers.program,
                head.program,
                x=layers.buffer("x"),
                head_x=head.buffer("x"),
                logits=head.buffer("logits"),
                embedding=self._embedding,
                embed_scale=self._embed_scale,
            )
        return step
