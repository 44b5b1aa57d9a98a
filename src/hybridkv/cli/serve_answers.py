"""Options of `hybridkv serve` that say how answers are read: what is refused, the template's variables, thoughts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from hybridkv.cli.chat_options import add_variable_arguments, variables_of
from hybridkv.cli.sampler_options import add_sampling_defaults, sampling_defaults
from hybridkv.errors import UsageError, one_of

if TYPE_CHECKING:
    from hybridkv.server.schema import ReasoningFormat

FORMATS = ("auto", "none", "deepseek", "deepseek-legacy")


@dataclass(frozen=True, slots=True)
class AnswerDefaults:
    """A server's settings where a request does not say.

    Attributes
    ----------
    strict
        Whether fields that mean nothing are refused.
    variables
        Of the chat template.
    reasoning_format, reasoning_budget
        What becomes of thoughts, and their tokens at most; -1 for any number.
    sampling
        How tokens are drawn, by the names of a request's fields.
    max_tokens
        Of an answer; -1 for what the context holds, None for OpenAI's defaults.
    """

    strict: bool = False
    variables: dict[str, Any] = field(default_factory=dict)
    reasoning_format: ReasoningFormat = "auto"
    reasoning_budget: int = -1
    sampling: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None


def add_answer_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options."""
    group.add_argument(
        "--strict",
        action="store_true",
        help="refuse unknown fields and values (default: ignore them; the response header x-hybridkv-ignored and "
        "the log name them)",
    )
    add_variable_arguments(group, "default variables of the chat template")
    group.add_argument(
        "--reasoning-format",
        default="auto",
        metavar="FORMAT",
        help="field for thoughts: reasoning_content (auto, deepseek), content (none), both (deepseek-legacy)",
    )
    group.add_argument(
        "--reasoning-budget",
        type=int,
        default=-1,
        metavar="N",
        help="maximum tokens of thought, then the answer begins; 0: no thoughts, -1: no limit (default -1)",
    )
    group.add_argument(
        "-n",
        "--n-predict",
        "--predict",
        type=int,
        metavar="N",
        help="most tokens of an answer where a request has no limit; -1: until the context is full (default: 16 for a "
        "completion, -1 for a chat)",
    )
    add_sampling_defaults(group)


def answers_from(a: argparse.Namespace) -> AnswerDefaults:
    """Read the options.

    Raises
    ------
    UsageError
        For variables that are no JSON object, and for a format that there is not.
    """
    variables = variables_of(a)
    if a.reasoning_budget < -1:
        raise UsageError(f"--reasoning-budget {a.reasoning_budget}; allowed: -1 (any number), 0 (none) or more")
    kind = one_of(a.reasoning_format, FORMATS, "--reasoning-format", hint="auto puts thoughts in reasoning_content")
    most = None if a.n_predict is None else -1 if a.n_predict in (-1, -2) else int(a.n_predict)
    if most is not None and most < -1:
        raise UsageError(f"-n {most}; allowed: 0 or more, or -1 until the context is full")
    return AnswerDefaults(
        a.strict, variables, cast("ReasoningFormat", kind), a.reasoning_budget, sampling_defaults(a), most
    )
