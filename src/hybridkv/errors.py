"""The exception tree: every error a user can meet, each with what was asked, what is allowed, and a hint.

* `HybridKVError`
    * `UsageError`       an option, a type name or a value that is not allowed
    * `ModelFileError`   a model file that is missing, truncated, corrupted or not understood
    * `ModelError`       a model (its config, layers or weights) that cannot be run as asked
    * `NoKernelError`    no kernel resolves for an attention case; carries each candidate's reason
    * `ContextError`     more tokens than the context holds, or more bytes than the budget
    * `GuardError`       the guard stopped a run on evidence

The command line prints `error: ...` and `hint: ...` and exits with code 2 for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar


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
    """The name among `allowed` that `text` is.

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


class GuardError(HybridKVError):
    """The guard stopped a run on evidence: a measured error, or numbers that are not finite."""
