"""Steps of caches that differ from step to step in lengths and positions alone: their arguments are given once.

A step of a small model takes a millisecond, of which preparing its arguments took a third.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybridkv.kernels import cpu_native
from hybridkv.kernels.cache_rows import HEALTH, CacheRows, Health
from hybridkv.kernels.step import Angles, StepProgram
from hybridkv.kernels.threads import native_threads
from hybridkv.kernels.weights import Weight, check_rows

Faults = list[tuple[int, Health]]
"""Attentions that were not finite, by number: attention by attention, token by token."""


class HeldCache:
    """One cache as its next steps need it, as often as its rows have room.

    Parameters
    ----------
    layers
        The program that will run.
    n_seqs
        Sequences of the cache.
    angles
        Of the next tokens, as many as may follow: float32 `[T, n_rotated / 2]` each.
    states
        Of `StepProgram.addresses`; continued in place. Their memory and that of `rows` is not kept: the caller knows at
        every step that it is still there.
    next_states
        Memory of the same sizes, for several tokens of one sequence; none where only single ones come.
    rows
        One per attention: where the sequences' last token lies, and what it attended.
    """

    def __init__(
        self,
        layers: StepProgram,
        *,
        n_seqs: int,
        angles: Sequence[Angles],
        states: Sequence[int],
        next_states: Sequence[int] = (),
        rows: Sequence[CacheRows],
    ) -> None:
        assert not next_states or (n_seqs == 1 and len(next_states) == len(states)), (n_seqs, len(next_states))
        layers.check_angles(angles, len(angles[0][0]) if angles else 0)
        layers.check_states(states)
        turned = [(cos.data_ptr(), sin.data_ptr(), cos.stride(0)) for cos, sin in angles]
        self.n_seqs = n_seqs
        self.takes_several = n_seqs == 1 and (bool(next_states) or not states)
        self._keep = angles
        self.native = cpu_native._native().HeldCache(
            n_seqs, turned, states, next_states, layers.native_calls(rows, n_seqs)
        )


class HeldStep:
    """Runs a model's layers and its head over the next tokens of one `HeldCache` or of several.

    Parameters
    ----------
    layers, head
        Programs. `layers` begins with the embedding in `x`, where it leaves what `head` begins with in `head_x` and
        makes `logits` of.
    x, head_x, logits
        Those buffers, `[rows, hidden size]` and `[rows, V]`.
    embedding, embed_scale
        Its rows times the factor are the tokens' hidden states.
    """

    def __init__(
        self,
        layers: StepProgram,
        head: StepProgram,
        *,
        x: Tensor,
        head_x: Tensor,
        logits: Tensor,
        embedding: Weight,
        embed_scale: float,
    ) -> None:
        hidden, self._n_vocab = x.shape[1], logits.shape[1]
        assert embedding.n_in == hidden == head_x.shape[1], (embedding.n_in, x.shape, head_x.shape)
        assert all(each.is_contiguous() for each in (x, head_x, logits))
        self.n_rows = min(map(len, (x, head_x, logits)))
        self._n_embedded = embedding.n_out
        self._keep = (layers, head, x, head_x, logits, embedding)
        self.n_threads = native_threads()
        first = (embedding.format.name, embedding.n_out, embedding.n_in, embedding.address(0))
        buffers = x.data_ptr(), head_x.data_ptr(), logits.data_ptr(), self._n_vocab
        self._native = cpu_native._native().HeldStep(
            layers.native, head.native, first, embed_scale, *buffers, cpu_native.isa(), self.n_threads
        )

    def check(self, tokens: Sequence[int]) -> None:
        """Raise unless the model has these tokens, and the buffers rows for them."""
        assert 0 < len(tokens) <= self.n_rows, (len(tokens), self.n_rows)
        check_rows(tokens, self._n_embedded)

    def run(self, cache: HeldCache, tokens: list[int]) -> tuple[Tensor, Faults]:
        """Continue every sequence of a cache by a token that was checked; the logits `[B, V]`.

        The caller knows that the rows have room, in memory that is still theirs.
        """
        logits = torch.empty(cache.n_seqs, self._n_vocab)
        return logits, _faults(self._native.step(cache.native, tokens, logits.data_ptr()))

    def run_many(self, caches: Sequence[HeldCache], tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Faults]:
        """Continue several caches by tokens that were checked, each as if it came alone; the logits of all, `[T, V]`.

        Where several tokens come of a cache, `keep` follows.
        """
        logits = torch.empty(sum(map(len, tokens)), self._n_vocab)
        return logits, _faults(self._native.step_many([cache.native for cache in caches], tokens, logits.data_ptr()))

    def keep(self, cache: HeldCache, n_tokens: int) -> None:
        """Continue behind the first of a cache's several tokens in the last `run_many`.

        Behind all in the next states, else in those before.
        """
        self._native.keep(cache.native, n_tokens)


def _faults(health: list[int]) -> Faults:
    return [(number, HEALTH[code]) for number, code in enumerate(health) if code]
