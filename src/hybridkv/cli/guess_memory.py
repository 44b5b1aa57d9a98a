"""The memory of guessing tokens beside a run, counted from headers: before weights are read, and for `plan`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridkv.cli.model_options import Opened
    from hybridkv.engine.describe import Description


@dataclass(frozen=True, slots=True)
class Guesses:
    """The memory of guessing tokens ahead beside a run, in bytes.

    Attributes
    ----------
    state_bytes
        Of one sequence: its states once more, so that wrong guesses can be undone.
    sequence_bytes
        Of one sequence: the cache of what guesses, for a whole context.
    weight_bytes
        Of a draft model.
    """

    state_bytes: int = 0
    sequence_bytes: int = 0
    weight_bytes: int = 0

    def of_sequences(self, n_seqs: int) -> int:
        """Sum what so many sequences take."""
        return n_seqs * (self.state_bytes + self.sequence_bytes)

    def total(self, n_seqs: int) -> int:
        """Sum all of it."""
        return self.of_sequences(n_seqs) + self.weight_bytes


NO_GUESSES = Guesses()


def guesses_of(
    a: argparse.Namespace, description: Description, *, device: str, backend: str, n_ctx: int, n_seqs: int = 1
) -> Guesses:
    """Count what guesses take under the options of `add_spec_arguments`; nothing where none are made.

    Parameters
    ----------
    device, backend
        What the model runs on; only the native step on the CPU takes guesses.
    n_seqs
        Sequences that share one cache: several of them are not guessed.

    Raises
    ------
    ModelFileError
        For a draft model that cannot be read.
    """
    from hybridkv.native.choice import rejects
    from hybridkv.planner import plan

    if a.spec == "off" or n_seqs > 1 or backend == "eager" or rejects(description.config, device) is not None:
        return NO_GUESSES
    states = plan((), description.facts, n_ctx=0).state_bytes
    if a.model_draft is not None:
        from hybridkv.engine.describe import describe
        from hybridkv.engine.draft_model import sequence_bytes

        small = describe(Path(a.model_draft))
        weights = small.held("auto", "cpu", "f32").n_bytes
        return Guesses(states, sequence_bytes(small.facts, n_ctx), weights)
    if a.spec == "ngram":
        return Guesses(states)
    from hybridkv.model import graph_of
    from hybridkv.native.predict import rows_bytes

    return Guesses(states, rows_bytes(graph_of(description.config)))


def guesses_for(a: argparse.Namespace, opened: Opened, *, n_seqs: int = 1) -> Guesses:
    """Count what guesses take of a run of an opened model; see `guesses_of`."""
    return guesses_of(
        a, opened.description, device=opened.device_type, backend=opened.backend, n_ctx=opened.n_ctx, n_seqs=n_seqs
    )
