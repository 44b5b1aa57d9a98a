"""The exception tree: every error a user can meet, each with what was asked, what is allowed, and a hint.

* `HybridKVError`
    * `UsageError`       an option, a type name or a value that is not allowed
    * `ModelFileError`   a model file that is missing, truncated, corrupted or not understood
    * `ModelError`       a model (its config, layers or weights) that cannot be run as asked
    * `NoKernelError`    no kernel resolves for an attention case; carries each candidate's reason
    * `ContextError`     more tokens than the context holds, or more bytes than the budget
    * `AdmissionError`   a request that a scheduler cannot take: it can never fit, or too many wait; carries the numbers
    * `SessionError`     a session file that is missing, torn, damaged or of another model
    * `GuardError`       the guard stopped a run on evidence

The command line prints `error: ...` and `hint: ...` and exits with code 2 for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar


class HybridKVError(Exception):
    """Base of all errors that hybridkv raises on purpose.

    Parameters
    ----------
    message
        What was asked and what is allowed, in one or two lines.
    hint
        What to do instead.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UsageError(HybridKVError):
    """An option, a type name or a value that is not allowed."""


T = TypeVar("T", bound=str)


def one_of(text: str, allowed: Sequence[T], problem: str, *, hint: str) -> T:
    """Match `text` with one of the names in `allowed`.

    Raises
    ------
    UsageError
        With the problem, the text and what is allowed.
    """
    for name in allowed:
        if name == text:
            return name
    raise UsageError(f"{problem} {text!r}; allowed: {', '.join(allowed)}", hint=hint)


class ModelFileError(HybridKVError):
    """A model file that is missing, truncated, corrupted or not understood."""


class ModelError(HybridKVError):
    """A model whose config, layers or weights cannot be run as asked."""


class NoKernelError(HybridKVError):
    """No kernel resolves for an attention case.

    Parameters
    ----------
    reasons
        One `(kernel name, reason)` per candidate.
    """

    def __init__(self, message: str, *, reasons: tuple[tuple[str, str], ...] = (), hint: str | None = None) -> None:
        lines = [message, *(f"  {name}: {reason}" for name, reason in reasons)]
        super().__init__("\n".join(lines), hint=hint)
        self.reasons = reasons


class ContextError(HybridKVError):
    """More tokens than the context holds, or more bytes than the budget allows."""


class AdmissionError(HybridKVError):
    """A request that a scheduler does not take.

    Parameters
    ----------
    reason
        `too_large`: it cannot fit even alone, and will not later either. `queue_full`: it may fit later. `closed`: the
        scheduler is shutting down.
    planned_bytes
        What the request would hold at its full length, KV rows and states; 0 if it does not come to that.
    budget_bytes
        What all sequences together may hold; None for no limit.
    n_tokens
        Prompt and new tokens that were asked for.
    most_tokens
        The most that would fit; None for no limit.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: Literal["too_large", "queue_full", "closed"],
        planned_bytes: int = 0,
        budget_bytes: int | None = None,
        n_tokens: int = 0,
        most_tokens: int | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason
        self.planned_bytes, self.budget_bytes = planned_bytes, budget_bytes
        self.n_tokens, self.most_tokens = n_tokens, most_tokens


class SessionError(HybridKVError):
    """A session file that is missing, torn, damaged, or of another model or version."""


class GuardError(HybridKVError):
    """The guard stopped a run on evidence: a measured error, or non-finite values."""
