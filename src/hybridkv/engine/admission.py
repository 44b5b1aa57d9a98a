"""Admission of requests: their bytes at full length, counted the way the cache allocates them, against a budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hybridkv.cache import KVSpec
from hybridkv.cache.spec import FRESH_ROWS
from hybridkv.errors import AdmissionError
from hybridkv.model import layer_facts
from hybridkv.model.protocols import LanguageModel
from hybridkv.planner import largest_context, plan


class Admission:
    """Counts bytes of sequences.

    Parameters
    ----------
    model
        A Transformers causal language model.
    n_ctx
        Most tokens of a sequence, prompt and answer.
    budget_bytes
        What the KV rows and states of all running sequences may take; None for no limit.
    prefill_chunk
        Most prompt tokens processed at once.
    conv_itemsize
        Bytes per value of convolution states.
    n_states
        Copies of a sequence's states: two where guesses may have to be undone.
    more_bytes
        What else each sequence takes, whatever its length: the cache of what guesses.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        n_ctx: int,
        budget_bytes: int | None,
        prefill_chunk: int,
        conv_itemsize: int,
        n_states: int = 1,
        more_bytes: int = 0,
    ) -> None:
        self.n_ctx, self.budget_bytes = n_ctx, budget_bytes
        self._facts = layer_facts(model.config)
        self._waiting_rows = min(prefill_chunk, FRESH_ROWS)
        self._conv_itemsize, self._n_states, self._more_bytes = conv_itemsize, n_states, more_bytes

    def planned_bytes(self, specs: Sequence[KVSpec], n_tokens: int) -> int:
        """Count what one sequence takes at `n_tokens`, with the exact rows that wait while its prompt is processed."""
        planned = plan(specs, self._facts, n_ctx=n_tokens, conv_itemsize=self._conv_itemsize)
        states = (self._n_states - 1) * planned.state_bytes
        return planned.total_bytes + states + self._more_bytes + self._waiting_bytes(specs)

    def most_tokens(self, specs: Sequence[KVSpec]) -> int:
        """Return the length of the longest sequence that fits when it is alone."""
        if self.budget_bytes is None:
            return self.n_ctx
        free = self.budget_bytes - self.planned_bytes(specs, 0)
        most = 0 if free < 0 else largest_context(specs, free)
        return self.n_ctx if most is None else min(self.n_ctx, most)

    def check(self, specs: Sequence[KVSpec], n_prompt: int, n_new: int) -> int:
        """Return a sequence's planned bytes, after checking that it can ever fit.

        Raises
        ------
        AdmissionError
            If it cannot even alone, with the numbers.
        """
        n_tokens = n_prompt + n_new
        planned = self.planned_bytes(specs, n_tokens)
        over = self.budget_bytes is not None and planned > self.budget_bytes
        if n_tokens <= self.n_ctx and not over:
            return planned
        most = self.most_tokens(specs)
        asked = f"{n_prompt} prompt tokens and {n_new} new ones"
        if over:
            problem = f"{asked} take {planned} bytes, and {self.budget_bytes} are there for all sequences"
        else:
            problem = f"{asked} do not fit a context of {self.n_ctx} tokens"
        raise AdmissionError(
            problem,
            reason="too_large",
            planned_bytes=planned,
            budget_bytes=self.budget_bytes,
            n_tokens=n_tokens,
            most_tokens=most,
            hint=f"{most} tokens fit, prompt and answer together",
        )

    def _waiting_bytes(self, specs: Sequence[KVSpec]) -> int:
        return sum(self._waiting_rows * spec.exact_bytes_per_token for spec in specs if spec.tail)


def is_out_of_memory(error: Exception) -> bool:
    """Check whether torch or Python could not allocate; torch's CPU allocator has no error type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
