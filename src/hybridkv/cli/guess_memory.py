"""What guessing tokens takes beside a run, counted from headers: before weights are read, and for `plan`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridkv.cli.model_options import Opened
    from hybridkv.engine.describe import Description
    from hybridkv.planner import Guesses


def guesses_of(
    a: argparse.Namespace, description: Description, *, device: str, engine: str, n_ctx: int, n_seqs: int = 1
) -> Guesses:
    """Count what guesses take under the options of `add_spec_arguments`; nothing where none are made.

    Parameters
    ----------
    device, engine
        What the model runs on; only the native step on the CPU takes guesses.
    n_seqs
        Sequences that share one cache: several of them are not guessed.

    Raises
    ------
    ModelFileError
        For a draft model that cannot be read.
    """
    from hybridkv.native.choice import rejects
    from hybridkv.planner import NO_GUESSES, Guesses, plan

    if a.spec == "off" or n_seqs > 1 or engine == "eager" or rejects(description.config, device) is not None:
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
        a, opened.description, device=opened.device_type, engine=opened.engine, n_ctx=opened.n_ctx, n_seqs=n_seqs
    )
