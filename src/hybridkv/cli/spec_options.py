"""The options that say what guesses tokens ahead: shared by `run`, `chat` and `serve`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hybridkv.cli.show import notice
from hybridkv.errors import UsageError

if TYPE_CHECKING:
    from hybridkv.engine.speculation import Speculation
    from hybridkv.runtime import Notify, Step

_DEFAULT_MAX = 7


def add_spec_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group `speculation`."""
    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--spec",
        default="auto",
        metavar="auto|ngram|off",
        help="what guesses tokens ahead, so that one run of the model gives several; the text is the same. ngram: what "
        "followed the same words before; auto: ngram, where the engine takes guesses (default auto)",
    )
    group.add_argument(
        "--draft-max",
        "--draft",
        "--draft-n",
        "--spec-draft-n-max",
        type=int,
        metavar="N",
        help=f"most tokens guessed for a run; how many pay is measured (default {_DEFAULT_MAX})",
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

    if a.spec == "mtp":
        raise UsageError(
            "--spec mtp: heads that predict several tokens are skipped when a file is read; allowed: auto, ngram, off",
            hint="--spec ngram guesses from the text itself",
        )
    parse_spec(a.spec)
    given = [o for o, value in (("--draft-max", a.draft_max), ("--draft-min", a.draft_min)) if value is not None]
    if a.spec == "off":
        if given:
            notice(f"{', '.join(given)}: no effect with --spec off")
        return
    Speculation(n_max=_most(a), n_min=_least(a))


def speculation_from(a: argparse.Namespace, step: Step, notify: Notify, *, n_seqs: int = 1) -> Speculation | None:
    """What guesses; None for nothing, which is said where guesses were asked for.

    Parameters
    ----------
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
        return Speculation(n_max=_most(a), n_min=_least(a), notify=notify)
    if a.spec != "auto" or a.draft_max is not None:
        notice(f"--spec {a.spec}: nothing is guessed: {reason}")
    return None


def _most(a: argparse.Namespace) -> int:
    return _DEFAULT_MAX if a.draft_max is None else int(a.draft_max)


def _least(a: argparse.Namespace) -> int:
    return min(1, _most(a)) if a.draft_min is None else int(a.draft_min)
