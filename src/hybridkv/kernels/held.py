"""Steps of one token that differ in lengths and positions alone: their arguments are given once.

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


class HeldStep:
    """Runs a model's layers and its head over one token of each sequence, as often as its rows have room.

    Parameters
    ----------
    layers, head
        Programs over buffers of at least `n_seqs` rows. `layers` begins with the embedding in `x`, where it leaves what
        `head` begins with in `head_x` and makes `logits` of.
    x, head_x, logits
        Those buffers, `[rows, hidden size]` and `[rows, V]`.
    embedding, embed_scale
        Its rows times the factor are the tokens' hidden states.
    n_seqs
        Sequences of the one cache.
    angles
        Of the next tokens, as many as may follow: float32 `[T, n_rotated / 2]` each.
    states
        Of `StepProgram.addresses`; continued in place. Their memory and that of `rows` is not kept: the caller knows at
        every step that it is still there.
    next_states
        Memory of the same sizes, for `draft`; none where it is not to be called.
    rows
        One per attention: where the sequences' last token lies, and what it attended.
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
        n_seqs: int,
        angles: Sequence[Angles],
        states: Sequence[int],
        next_states: Sequence[int] = (),
        rows: Sequence[CacheRows],
    ) -> None:
        hidden, self._n_vocab = x.shape[1], logits.shape[1]
        assert embedding.n_in == hidden == head_x.shape[1], (embedding.n_in, x.shape, head_x.shape)
        assert all(each.is_contiguous() and len(each) >= n_seqs for each in (x, head_x, logits)), n_seqs
        assert not next_states or (n_seqs == 1 and len(next_states) == len(states)), (n_seqs, len(next_states))
        self._n_seqs, self._n_rows = n_seqs, embedding.n_out
        self._most_drafts = min(map(len, (x, head_x, logits))) if next_states or not states else 0
        self._keep = (layers, head, x, head_x, logits, embedding, angles)  # rows and states are their cache's
        self.n_threads = native_threads()
        first = (embedding.format.name, embedding.n_out, embedding.n_in, embedding.address(0))
        layers.check_angles(angles, len(angles[0][0]) if angles else 0)
        layers.check_states(states)
        turned = [(cos.data_ptr(), sin.data_ptr(), cos.stride(0)) for cos, sin in angles]
        buffers = x.data_ptr(), head_x.data_ptr(), logits.data_ptr(), self._n_vocab
        self._native = cpu_native._native().HeldStep(
            layers.native, head.native, first, embed_scale, *buffers, cpu_native.isa(), n_seqs, turned,
            states, next_states, layers.native_calls(rows, n_seqs), self.n_threads,
        )  # fmt: skip

    def check(self, tokens: list[int]) -> None:
        """Raise unless these are tokens that `run` takes, one of each sequence, or that `draft` takes."""
        assert len(tokens) == self._n_seqs or self.takes_drafts(len(tokens)), tokens
        check_rows(tokens, self._n_rows)

    def takes_drafts(self, n_tokens: int) -> bool:
        """Check whether `draft` takes so many tokens of one sequence."""
        return self._n_seqs == 1 <= n_tokens <= self._most_drafts

    def run(self, tokens: list[int]) -> tuple[Tensor, list[tuple[int, Health]]]:
        """Continue every sequence by a token that was checked.

        The logits `[B, V]`, and the attentions that were not finite, by number. The caller knows that the rows have
        room, in memory that is still theirs.
        """
        logits = torch.empty(self._n_seqs, self._n_vocab)
        health = self._native.step(tokens, logits.data_ptr())
        return logits, _faults(health)

    def draft(self, tokens: list[int]) -> tuple[Tensor, list[tuple[int, Health]]]:
        """Continue the one sequence by several tokens that were checked, each as if it came alone; `keep` follows.

        The logits `[T, V]`, and what was not finite, by number: attention by attention, token by token.
        """
        logits = torch.empty(len(tokens), self._n_vocab)
        health = self._native.draft(tokens, logits.data_ptr())
        return logits, _faults(health)

    def keep(self, n_tokens: int) -> None:
        """Continue behind the first tokens of the last `draft`: behind all in the next states, else in those before."""
        self._native.keep(n_tokens)


def _faults(health: list[int]) -> list[tuple[int, Health]]:
    return [(number, HEALTH[code]) for number, code in enumerate(health) if code]
