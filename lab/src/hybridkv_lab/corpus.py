"""Text to windows of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridkv.errors import UsageError


@dataclass(frozen=True, slots=True)
class Corpus:
    """Windows of a text.

    Attributes
    ----------
    name
        Of the text.
    windows
        int64 `[n_ctx + 1]` each: the last token is only ever predicted.
    """

    name: str
    windows: tuple[Tensor, ...]

    @property
    def n_ctx(self) -> int:
        """Tokens that a model is given of each window."""
        return len(self.windows[0]) - 1

    @property
    def digest(self) -> str:
        """Of the tokens: two runs of one digest saw the same."""
        joined = torch.cat(self.windows).numpy().tobytes()
        return hashlib.sha256(joined).hexdigest()[:16]


def read_text(path: Path) -> str:
    """Read a UTF-8 text.

    Raises
    ------
    UsageError
        If it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"-f {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"-f {path}: not UTF-8 text (byte {error.start})") from error


def cut(name: str, ids: Sequence[int], n_ctx: int, n_windows: int | None) -> Corpus:
    """Cut the first `n_windows` windows of `n_ctx` tokens, one after the other; None takes all that are full.

    Raises
    ------
    UsageError
        If the text is too short.
    """
    there = (len(ids) - 1) // n_ctx
    wanted = there if n_windows is None else n_windows
    if wanted < 1 or wanted > there:
        raise UsageError(
            f"{name} has {len(ids)} tokens, enough for {there} windows of -c {n_ctx}; asked: {max(wanted, 1)}",
            hint="take a longer text (-f), a smaller -c or fewer --windows",
        )
    tokens = torch.tensor(ids[: wanted * n_ctx + 1])
    return Corpus(name, tuple(tokens[i * n_ctx : (i + 1) * n_ctx + 1] for i in range(wanted)))


def split(name: str, ids: Sequence[int], n_ctx: int, n_first: int, n_second: int) -> tuple[Corpus, Corpus]:
    """Split a text into two sets of windows that share no token, both spread over the whole text.

    Windows begin at equal distances, and the sets take turns as evenly as their sizes allow.

    Raises
    ------
    UsageError
        If the text is too short.
    """
    total = n_first + n_second
    distance = (len(ids) - 1) // total
    if distance < n_ctx + 1 and (total > 1 or distance < n_ctx):
        raise UsageError(
            f"{name} has {len(ids)} tokens; {total} windows of {n_ctx} need {total * (n_ctx + 1)}",
            hint="take a longer text (-f), or a smaller --window, --calibrate or --verify",
        )
    windows = [torch.tensor(ids[i * distance : i * distance + n_ctx + 1]) for i in range(total)]
    first = [(i + 1) * n_first // total > i * n_first // total for i in range(total)]
    return (
        Corpus(name, tuple(w for w, taken in zip(windows, first, strict=True) if taken)),
        Corpus(name, tuple(w for w, taken in zip(windows, first, strict=True) if not taken)),
    )


def snippet(tokenizer: Any | None, window: Tensor, position: int, n_before: int = 12) -> str:
    """Show the text before the token that follows `position`, and that token in brackets; ids without a tokenizer."""
    first = max(0, position + 1 - n_before)
    before, following = window[first : position + 1].tolist(), window[position + 1 : position + 2].tolist()
    if tokenizer is None:
        return f"{' '.join(map(str, before))} [{following[0]}]"
    return f"{tokenizer.decode(before)}[{tokenizer.decode(following)}]"
