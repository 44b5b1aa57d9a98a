"""One sequence of a scheduler, from its request to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridkv.cache import KVSpec
from hybridkv.engine.drafts import Drafts
from hybridkv.engine.filters import Tokens
from hybridkv.engine.pieces import Pieces
from hybridkv.engine.prefixes import Checkpoint, Key
from hybridkv.engine.requests import Event, Finish, RequestHandle
from hybridkv.engine.sampling import Sampler
from hybridkv.runtime import ModelCache


@dataclass(eq=False, slots=True)
class RunningSequence:
    """A sequence's tokens, and how far its cache has come with them.

    Attributes
    ----------
    handle
        Who waits for it.
    key
        How it was asked to be stored.
    specs
        How it is to be stored: raised ones after a rebuild.
    planned_bytes
        What it takes at its full length.
    history
        Prompt and generated tokens.
    n_prefill
        Tokens of the history to process before the next is drawn: the prompt's, or all of them after a rebuild.
    position
        Tokens that the cache holds.
    checkpoint
        The last that it left behind or began from.
    reuses
        Whether it takes part in the stored prefixes.
    drafts
        What is guessed of it, and computed already.
    """

    handle: RequestHandle
    key: Key
    specs: tuple[KVSpec, ...]
    planned_bytes: int
    reuses: bool
    sampler: Sampler = field(init=False)
    history: list[int] = field(init=False)
    n_prefill: int = field(init=False)
    position: int = 0
    checkpoint: Checkpoint | None = None
    cache: ModelCache | None = None
    drafts: Drafts = field(default_factory=Drafts)
    _seen: npt.NDArray[np.int64] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.handle.request.params, self.handle.request.steering)
        self.history = list(self.handle.request.prompt_ids)
        self.n_prefill = len(self.history)
        if self.sampler.params.looks_back:
            self._seen = np.empty(self.n_ctx, np.int64)
            self._seen[: self.n_prefill] = self.history

    @property
    def seen(self) -> Tokens:
        """The history as an array, without a copy of it at each token; nothing where no sampler looks back."""
        return () if self._seen is None else self._seen[: len(self.history)]

    @property
    def prefills(self) -> bool:
        """True if tokens are to be processed before the next is drawn."""
        return self.position < self.n_prefill

    @property
    def n_ctx(self) -> int:
        """Tokens at its full length."""
        request = self.handle.request
        return len(request.prompt_ids) + request.max_tokens

    def piece_end(self, pieces: Pieces | None) -> int:
        """Find where the prompt's next piece ends: at the next cut, wherever it begins, or at the end.

        So the pieces after a checkpoint at a cut are those of a sequence that started over.
        """
        return self.n_prefill if pieces is None else min(self.n_prefill, pieces.after(self.position))

    def start_over(self, specs: tuple[KVSpec, ...], planned_bytes: int) -> None:
        """Let the cache go; everything up to now is to be processed again, at other types."""
        self.cache = self.checkpoint = None
        self.drafts.drop()
        self.specs, self.planned_bytes, self.reuses = specs, planned_bytes, False
        self.position, self.n_prefill = 0, len(self.history)

    def undo_guesses(self) -> None:
        """Undo guesses that were not drawn: the cache then holds `position` tokens."""
        if self.cache is not None:
            self.drafts.close(self.cache, self.position, ended=False)

    def take(self, token: int, logits: Tensor) -> Event:
        """Append the next token, drawn from `logits` float32 `[V]`; its event, which may be the last."""
        request = self.handle.request
        if self._seen is not None:
            self._seen[len(self.history)] = token
        self.history.append(token)
        finished: Finish | None = None
        if token in request.stop_ids:
            finished = "stop"
        elif len(self.history) == self.n_ctx:
            finished = "length"
        if request.logprobs is None:
            return Event(token, finished=finished)
        return Event(token, *_logprobs(logits, token, request.logprobs), finished)

    def score(self, rows: Tensor, begin: int) -> None:
        """Score the prompt's tokens that follow those from `begin` on, from the logits `[T, V]` after each of these."""
        scores = self.handle.prompt_scores
        for place, row in enumerate(rows[: len(scores) - 1 - begin], begin + 1):
            scores[place] = _logprobs(row, self.history[place], self.handle.request.logprobs or 0)


def _logprobs(logits: Tensor, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    logprobs = torch.log_softmax(logits.float(), -1)
    best = torch.topk(logprobs, min(n, logprobs.shape[0])) if n else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return float(logprobs[token]), top
