"""Stored prefixes as a scheduler uses them: where sequences leave checkpoints, what they begin from, session files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hybridkv.cache import KVTypes
from hybridkv.engine.model_context import ModelContext
from hybridkv.engine.pieces import Pieces
from hybridkv.engine.prefixes import Checkpoint, PrefixStore
from hybridkv.engine.requests import Request
from hybridkv.engine.running_sequence import RunningSequence
from hybridkv.engine.session import Session, resume, stays_raised
from hybridkv.errors import SessionError
from hybridkv.runtime.stored import StoredCache

CHECKPOINT_TOKENS = 1024
"""Tokens of a prompt between two checkpoints, beside those near its end; rounded to whole chunks."""


class Reuse:
    """Stored prefixes as sequences leave them and resume from them. Used on the scheduler's thread alone.

    Parameters
    ----------
    context
        Makes the caches.
    store
        Holds the prefixes.
    pieces
        Where prompts are cut; None if the model takes a prompt at once, and so resumes from nothing.
    """

    def __init__(self, context: ModelContext, store: PrefixStore, pieces: Pieces | None) -> None:
        self._context, self._store, self._pieces = context, store, pieces
        self._said = False

    def wanted(self, request: Request) -> bool:
        """Check whether this request's sequence begins from stored prefixes and leaves its own."""
        return request.reuse and not request.score_prompt and self._pieces is not None and self._store.budget_bytes > 0

    def begin(self, sequence: RunningSequence) -> Checkpoint | None:
        """Give a sequence its cache, filled from the furthest checkpoint that leaves it a token to process."""
        found = None
        if sequence.reuses:
            found = self._store.find(sequence.key, sequence.history, len(sequence.history) - 1)
        specs = sequence.specs if found is None else found.stored.specs
        sequence.cache = self._context.new_cache(specs, sequence.n_ctx)
        if found is not None:
            sequence.cache.load(self._store.copies(found))
            sequence.position, sequence.checkpoint = found.end, found
        return found

    def is_due(self, sequence: RunningSequence) -> bool:
        """Decide whether to leave a checkpoint: at a prompt's last cut and at the last before each of the request's
        marks, and every so many tokens.

        Only at cuts: behind another place, the pieces of a longer prompt would begin elsewhere than without it, and
        sums would round differently. A reply's end gets one of its own.
        """
        pieces, place = self._pieces, sequence.position
        assert pieces is not None or not sequence.reuses
        if not sequence.reuses or pieces is None or not pieces.cuts_at(place):
            return False
        spacing = max(1, CHECKPOINT_TOKENS // pieces.chunk) * pieces.chunk
        ends = (sequence.n_prefill, *sequence.handle.request.marks)
        return any(place <= end <= pieces.after(place) for end in ends) or place % spacing == 0

    def leave(self, sequence: RunningSequence) -> None:
        """Store what a sequence has processed; say once that there was no room, for turns then start over."""
        assert sequence.cache is not None
        n_refused = self._store.n_refused
        sequence.checkpoint = self._store.add(
            sequence.key, sequence.history[: sequence.position], sequence.cache, sequence.checkpoint
        )
        if self._store.n_refused > n_refused and not self._said:
            self._said = True
            self._context.notify(
                f"a prefix of {sequence.position} tokens found no room in {self._store.budget_bytes / 2**20:.0f} MiB "
                "of stored prefixes: the next turn of such a conversation starts over"
            )

    def export_session(self, request: Request, tokens: tuple[int, ...], name: str) -> Session:
        """Export a sequence, as far as stored prefixes hold it, and the place where its prompt could be resumed.

        Raises
        ------
        SessionError
            If they hold none of it.
        """
        specs = self._context.specs_of(request.types)
        found = self._store.find(specs, tokens, len(tokens))
        if found is None:
            raise SessionError(
                f"none of the {len(tokens)} tokens of {name} are stored any more",
                hint="give stored prefixes more memory",
            )
        begun = self._store.last_within(found, len(request.prompt_ids) - 1)
        earlier = None if begun is None else (begun.end, self._whole(begun))
        asked = tuple(spec.types for spec in specs)
        return Session(tokens, found.end, self._whole(found), earlier=earlier, asked=asked)

    def _whole(self, checkpoint: Checkpoint) -> StoredCache:
        """Copy a checkpoint into contiguous memory."""
        cache = self._context.new_cache(checkpoint.stored.specs, checkpoint.end)
        cache.load(self._store.copies(checkpoint))
        return cache.stored()

    def import_session(self, session: Session, path: Path, types: KVTypes | None = None) -> None:
        """Take a file's session into the stored prefixes, for requests of these types.

        Raises
        ------
        SessionError
            If there is no room for it, or the model cannot resume from it.
        """
        if self._pieces is None:
            raise SessionError(
                "this model's code takes a prompt at once and cannot resume from a session",
                hint="`hybridkv run --session` resumes its own sessions",
            )
        end: Checkpoint | None = None
        notice = raised = None
        for part in (session.rewound(), session):
            if part is not None:
                held, specs = part.tokens[: part.n_cached], self._context.specs_of(types)
                cache, notice = resume(part, specs, partial(self._context.new_cache, n_ctx=len(held)))
                raised = None if notice is not None else stays_raised(specs, cache)
                # Rows that are encoded again are not sure to be those of the earlier place: each has its own then.
                end = self._store.add(specs, held, cache, end if notice is None else None)
        if end is None or end.end < session.n_cached:
            raise SessionError(
                f"no room for the {session.n_cached} tokens of {path}: stored prefixes may take "
                f"{self._store.budget_bytes} bytes",
                hint="give stored prefixes more memory",
            )
        if (said := notice or raised) is not None:
            self._context.notify(f"{path.name}: {said}")
