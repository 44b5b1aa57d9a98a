"""One step of several sequences that decode together, and the tokens that it gives each of them.

Owns the order: guesses are made, everything runs at once, and then every sequence draws as long as what it drew was
guessed. A prompt goes in alone, a chunk at a time. `hybridkv.engine.scheduler` draws and hands out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hybridkv.engine.model_context import bad_logits
from hybridkv.engine.pace import Costs
from hybridkv.engine.running_sequence import RunningSequence
from hybridkv.errors import HybridKVError
from hybridkv.kernels.threads import torch_on_one_thread
from hybridkv.policy import MismatchError, NonFiniteError
from hybridkv.runtime import DraftStep, Fault, Step, finite_rows


@dataclass(slots=True)
class Taken:
    """The next token's logits of sequences whose last token has been run.

    Attributes
    ----------
    sequences, logits
        Those that may draw, and finite float32 `[N, V]`.
    failed
        Sequences in which the guard found something.
    """

    sequences: list[RunningSequence]
    logits: Tensor
    failed: list[tuple[RunningSequence, Fault]]


def run_next(step: Step, batch: Sequence[RunningSequence], costs: Costs | None) -> None:
    """Run the last token of every sequence, and what each guesses behind it; `costs` learn what that takes."""
    tokens = []
    for sequence in batch:
        assert sequence.cache is not None
        sequence.drafts.close(sequence.cache, sequence.position, ended=True)
        n_most = sequence.n_ctx - len(sequence.history) - 1
        tokens.append(sequence.drafts.propose(sequence.history, sequence.cache, n_most, len(batch) - 1))
    caches = [s.cache for s in batch if s.cache is not None]
    positions = [s.position for s in batch]
    n_rows = sum(map(len, tokens))
    timed = costs is not None and (n_rows > len(batch) or costs.is_due(n_rows))
    if timed:
        alone = [s for s, own in zip(batch, tokens, strict=True) if len(own) == 1]
        timed = all(s.cache is not None and s.drafts.is_ordinary(s.cache) for s in alone)
    start = time.perf_counter()
    if n_rows == len(batch):
        answers = step.forward_many(torch.tensor([own[0] for own in tokens]), caches, positions)
    else:
        # Only a step that takes guesses is given any; `isinstance` of a protocol takes 20 us.
        answers = cast(DraftStep, step).forward_drafts(tokens, caches, positions)
    first_row = 0
    for sequence, own in zip(batch, tokens, strict=True):
        sequence.drafts.open(own, answers, first_row)
        first_row += len(own)
    if costs is not None and timed:
        costs.note(n_rows, time.perf_counter() - start)


def run_prompt(step: Step, sequence: RunningSequence, end: int) -> Tensor:
    """Run a prompt's next tokens, up to `end`; return the logits after them, `[1, V]`."""
    assert sequence.cache is not None
    begin = sequence.position
    tokens = torch.tensor([sequence.history[begin:end]])
    if not sequence.handle.request.score_prompt:
        return step.forward(tokens, sequence.cache, begin)
    rows = step.logits(tokens, sequence.cache, begin)[0]
    sequence.score(rows, begin)
    return rows[-1:]


def ask_steering(
    batch: Sequence[RunningSequence], logits: Tensor
) -> tuple[list[RunningSequence], Tensor, list[tuple[RunningSequence, HybridKVError]]]:
    """Ask each sequence's steering which tokens may come: those that may draw, their logits, those that cannot say."""
    kept, lost = [], []
    for index, sequence in enumerate(batch):
        try:
            sequence.sampler.steer()
        except HybridKVError as error:
            lost.append((sequence, error))
        else:
            kept.append(index)
    return [batch[i] for i in kept], logits if not lost else logits[kept], lost


@torch_on_one_thread()
def take_next(batch: Sequence[RunningSequence]) -> Taken:
    """Take the computed logits after each sequence's last token; list the sequences that have none yet."""
    ready, rows, failed = [], [], []
    for sequence in batch:
        try:
            row = sequence.drafts.take(sequence.history[-1])
        except (NonFiniteError, MismatchError) as error:
            failed.append((sequence, error))
        else:
            if row is None:
                continue
            ready.append(sequence)
            rows.append(row)
        sequence.position += 1
    logits = _together(rows) if rows else torch.empty(0, 1)
    finite = finite_rows(logits) if rows else []
    good = [i for i, fine in enumerate(finite) if fine]
    for sequence in (s for s, fine in zip(ready, finite, strict=True) if not fine):
        assert sequence.cache is not None
        failed.append((sequence, bad_logits(sequence.cache, sequence.position)))
    return Taken([ready[i] for i in good], logits if len(good) == len(ready) else logits[good], failed)


def _together(rows: Sequence[Tensor]) -> Tensor:
    """Return logits `[1, V]` each as `[N, V]`: no copy where a step has left them behind one another."""
    first, width = rows[0], rows[0].shape[1]
    size, whole = width * first.element_size(), first.untyped_storage()
    in_order = all(row.data_ptr() == first.data_ptr() + i * size for i, row in enumerate(rows))
    if in_order and first.data_ptr() + len(rows) * size <= whole.data_ptr() + whole.nbytes():
        return first.as_strided((len(rows), width), (width, 1))
    return torch.cat(list(rows))
