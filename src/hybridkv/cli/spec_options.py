"""The options that say what guesses tokens ahead: shared by `run`, `chat` and `serve`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.engine.draft_model import DraftModel
    from hybridkv.engine.drafts import Guesser
    from hybridkv.engine.load import Loaded
    from hybridkv.engine.speculation import Speculation
    from hybridkv.runtime import Notify, Step

_DEFAULT_MAX = 7


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group `speculation`."""
    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--spec",
        default="auto",
        metavar="auto|ngram|mtp|draft|off",
        help="what guesses tokens ahead, so that one step gives several; the text is the same. ngram: what followed "
        "the same words before; mtp: the model's own head; draft: the model of -md; auto: with -md draft, "
        "without it ngram and the head, if there is one (default auto)",
    )
    group.add_argument(
        "-md",
        "--model-draft",
        "--spec-draft-model",
        metavar="PATH",
        help="small model of the same vocabulary that guesses tokens ahead",
    )
    group.add_argument(
        "--draft-max",
        "--draft",
        "--draft-n",
        "--spec-draft-n-max",
        type=int,
        metavar="N",
        help=f"most tokens guessed for a step; how many pay is measured (default {_DEFAULT_MAX})",
    )
    group.add_argument(
        "--draft-min",
        "--draft-n-min",
        "--spec-draft-n-min",
        type=int,
        metavar="N",
        help="fewest tokens that are worth a guess (default 1)",
    )


def check_spec(a: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before a model is touched.

    Raises
    ------
    UsageError
        Saying why.
    """
    from hybridkv.engine.speculation import Speculation, parse_spec

    parse_spec(a.spec)
    options = (("-md", a.model_draft), ("--draft-max", a.draft_max), ("--draft-min", a.draft_min))
    given = [option for option, value in options if value is not None]
    if a.spec == "draft" and a.model_draft is None:
        raise UsageError("--spec draft without a draft model", hint="-md FILE names one of the same vocabulary")
    if a.spec in ("ngram", "mtp") and a.model_draft is not None:
        raise UsageError(f"-md with --spec {a.spec}, which needs no other model", hint="leave one of them out")
    if a.model_draft is not None and not Path(a.model_draft).exists():
        raise UsageError(f"-md {a.model_draft}: there is no such file")
    if a.spec == "off":
        if given:
            notice(f"{', '.join(given)}: no effect with --spec off")
        return
    Speculation(n_max=_most(a), n_min=_least(a))


def speculation_from(
    a: argparse.Namespace, loaded: Loaded, step: Step, notify: Notify, *, n_ctx: int, n_seqs: int = 1
) -> Speculation | None:
    """Build what guesses; None for nothing, with a notice where guesses were asked for.

    Parameters
    ----------
    loaded, step
        The model, and what runs it.
    n_ctx
        Tokens of a sequence.
    n_seqs
        Sequences that share one cache.
    """
    from hybridkv.engine.speculation import Speculation, rejects_drafts

    if a.spec == "off":
        return None
    reason = rejects_drafts(step)
    if reason is None and n_seqs > 1:
        reason = f"-np {n_seqs} sequences of one prompt run in step"
    if reason is None:
        made = Speculation(n_max=_most(a), n_min=_least(a), notify=notify)
        if a.model_draft is not None:
            draft = _draft_model(a.model_draft, loaded, n_ctx)
            made.make_guesser, made.sequence_bytes = draft.guesser, draft.sequence_bytes
        elif a.spec != "ngram" and (head := head_guesser(step, a.spec)) is not None:
            from hybridkv.model import graph_of
            from hybridkv.native.predict import rows_bytes

            made.make_guesser, made.sequence_bytes = head, rows_bytes(graph_of(loaded.model.config))
        return made
    if a.spec != "auto" or a.draft_max is not None or a.model_draft is not None:
        notice(f"--spec {a.spec}: nothing is guessed: {reason}")
    return None


def head_guesser(step: Step, spec: str) -> Callable[[], Guesser] | None:
    """Return what makes guessers of the model's own head; None for a model without one, unless that was asked for.

    Raises
    ------
    UsageError
        If it was.
    """
    from hybridkv.engine.heads import HeadGuesser
    from hybridkv.engine.ngrams import NGrams
    from hybridkv.native import NativeStep

    predictor = step.predictor if isinstance(step, NativeStep) else None
    if predictor is not None:
        return lambda: HeadGuesser(predictor, NGrams() if spec == "auto" else None)
    if spec == "mtp":
        raise UsageError(
            "--spec mtp: the model has no head of multi-token prediction; allowed: auto, ngram, draft, off",
            hint="take a file that has its blocks (nextn_predict_layers), or --spec ngram",
        )
    return None


def _draft_model(path: str, loaded: Loaded, n_ctx: int) -> DraftModel:
    """Load a draft model onto the CPU, whose weights stay in its file.

    Raises
    ------
    ModelFileError, ModelError
        For one that cannot be read, or that has another vocabulary.
    """
    import torch

    from hybridkv.engine.describe import describe
    from hybridkv.engine.draft_model import DraftModel
    from hybridkv.engine.load import load
    from hybridkv.engine.steps import resolve_step

    description = describe(Path(path))
    small = load(description, dtype=torch.float32, device="cpu", weights="auto")
    draft = DraftModel(small.model, resolve_step(description.config, "cpu")(small.model), n_ctx=n_ctx)
    draft.check_vocabulary(small.tokenizer, loaded.model, loaded.tokenizer)
    print(f"draft model: {description.name}, {draft.step.name}", file=sys.stderr)
    return draft


def _most(a: argparse.Namespace) -> int:
    return _DEFAULT_MAX if a.draft_max is None else int(a.draft_max)


def _least(a: argparse.Namespace) -> int:
    return min(1, _most(a)) if a.draft_min is None else int(a.draft_min)
