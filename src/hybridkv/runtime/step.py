"""The step: the one interface that the engine calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hybridkv.policy import MismatchError, NonFiniteError
from hybridkv.runtime.cache import ModelCache

Fault = NonFiniteError | MismatchError
"""What a sequence can be rebuilt after, at larger types."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step for sequences of separate caches.

    Attributes
    ----------
    logits
        float32 `[N, V]`; of a sequence that failed, whatever is there.
    failed
        Sequence -> what the guard found in the first of its layers that is not sound. Its cache is of no more use; the
        others are not touched by it.
    """

    logits: Tensor
    failed: dict[int, Fault]


class Step(Protocol):
    """One way to run a model over new tokens."""

    @property
    def name(self) -> str:
        """Printed wherever the choice is shown."""
        ...

    @property
    def takes_chunks(self) -> bool:
        """True if a prompt may come in several chunks: a state is continued over several tokens at once."""
        ...

    def forward(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence of the cache, which holds `position` tokens each.

        Parameters
        ----------
        tokens
            int64 `[B, T]`.

        Returns
        -------
        Tensor
            float32 `[B, V]`: the logits after the last token.
        """
        ...

    def forward_many(self, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> StepResult:
        """Continue sequences of separate caches by one token each; every one as `forward` continues it alone.

        Parameters
        ----------
        tokens
            int64 `[N]`.
        caches, positions
            Of one sequence each; no cache twice.
        """
        ...

    def logits(self, tokens: Tensor, cache: ModelCache, position: int) -> Tensor:
        """Continue every sequence as `forward` does; float32 `[B, T, V]`: the logits after every token."""
        ...


@runtime_checkable
class DraftStep(Step, Protocol):
    """A step that takes guesses: several tokens of a sequence at once, of which those that were wrong are undone.

    What is left is, to the byte, what so many single tokens leave.
    """

    def room(self, cache: ModelCache, n_tokens: int) -> int:
        """Return how many of the next `n_tokens` of this cache one step takes; 1 where it must be a single one."""
        ...

    def forward_drafts(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[ModelCache], positions: Sequence[int]
    ) -> StepResult:
        """Continue sequences of separate caches by several tokens each; every token as `forward` takes it alone.

        Parameters
        ----------
        tokens
            Of each cache, at most as many as there is `room` for. `keep` must follow for each that has several.
        caches, positions
            Of one sequence each; no cache twice.

        Returns
        -------
        StepResult
            By rows: the tokens of all caches one after the other.
        """
        ...

    def keep(self, cache: ModelCache, n_kept: int) -> None:
        """Truncate a cache to the first `n_kept` tokens, one or more, that the last `forward_drafts` took of it."""
        ...

    def take_hidden(self, cache: ModelCache) -> Tensor | None:
        """Take the final hidden states of the tokens that the last step took of a cache, `[n, hidden]`; given once.

        None where nobody has asked for them to be kept.
        """
        ...

    def keep_hidden(self, cache: ModelCache, *, wanted: bool) -> None:
        """Stop keeping hidden states of a cache, or begin again: at first they are kept of all where the model guesses.

        Where they are not, a step costs what it costs without a head.
        """
        ...


def one_by_one(step: Step, tokens: Tensor, caches: Sequence[ModelCache], positions: Sequence[int]) -> StepResult:
    """Run `Step.forward_many` as one call of `Step.forward` per sequence."""
    logits: list[Tensor | None] = []
    failed: dict[int, Fault] = {}
    for index, (cache, position) in enumerate(zip(caches, positions, strict=True)):
        try:
            logits.append(step.forward(tokens[index].view(1, 1), cache, position))
        except (NonFiniteError, MismatchError) as error:
            logits.append(None)
            failed[index] = error
    width = max((part.shape[1] for part in logits if part is not None), default=0)
    rows = [torch.full((1, width), torch.nan) if part is None else part for part in logits]
    return StepResult(torch.cat(rows), failed)
